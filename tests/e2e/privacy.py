"""Looking for people where none may be named."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

import sqlalchemy as sa

from mail_pipelines.database.engine import reading
from mail_pipelines.database.models import Contact
from mail_pipelines.demo.people import SURNAMES

_ADDRESS = re.compile(rb"[A-Za-z0-9._+-]+@[A-Za-z0-9.-]+")


def people_named(engine: sa.Engine, files: Iterable[Path]) -> list[str]:
    """Files that hold a contact's address or a surname of the made-up people, with what was found."""
    with reading(engine) as connection:
        addresses = {address.encode() for address in connection.execute(sa.select(Contact.address)).scalars()}
    surnames = [surname.encode() for surname in SURNAMES]
    found = []
    for path in files:
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            # SQLite's side files come and go while Dagster runs; what was in them is in the database by now.
            continue
        named = {match.lower() for match in _ADDRESS.findall(content)} & addresses
        named |= {surname for surname in surnames if surname in content}
        found += [f"{path}: {name.decode()}" for name in sorted(named)]
    return found


def dagster_files(home: Path) -> list[Path]:
    """Everything that Dagster, its daemon, its web server and the runs have written below a home."""
    found = [path for path in [*(home / "dagster").rglob("*"), *(home / "log").glob("*.log")] if path.is_file()]
    # Side files first, so that what moves from one into its database meanwhile is read there.
    return sorted(found, key=lambda path: not path.name.endswith(("-wal", "-journal")))
