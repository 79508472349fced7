"""A home with declared sources, and what of them is in the database."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
import yaml

from mail_pipelines.database.engine import reading
from mail_pipelines.database.models import Contact, ContactList, Subscription
from mail_pipelines.sources import declaration, running
from mail_pipelines.sources.declaration import Source

Declare = Callable[..., Source]
MAP = {"id": "external_id", "mail": "email", "name": "first_name", "city": "city", "orders": "orders"}


@pytest.fixture
def home(tmp_path: Path) -> Path:
    folder = tmp_path / "home"
    (folder / "sources").mkdir(parents=True, exist_ok=True)
    return folder


@pytest.fixture
def declare(home: Path) -> Declare:
    """`declare("crm", kind=…, connection=…, contacts={…})` writes a declaration and reads it; `contacts` is completed."""

    def write(name: str = "crm", *, contacts: Mapping[str, Any] | None = None, **document: Any) -> Source:
        tree: dict[str, Any] = {"name": name, **document}
        if contacts is not None:
            tree["contacts"] = {"map": MAP, "list": "News", "consent": {"subscribe": "always"}, **contacts}
        (home / "sources" / f"{name}.yaml").write_text(yaml.safe_dump(tree))
        return declaration.load(home, name)

    return write


@pytest.fixture
def sync(engine: sa.Engine, home: Path) -> Callable[..., running.Report]:
    def run(source: Source, **options: Any) -> running.Report:
        return running.run(engine, home, source, options.pop("section", "contacts"), **options)

    return run


def contacts(engine: sa.Engine) -> dict[str, dict[str, Any]]:
    with reading(engine) as connection:
        return {row.address: row.attributes for row in connection.execute(sa.select(Contact.address, Contact.attributes))}


def subscribed(engine: sa.Engine, list_key: str = "news") -> set[str]:
    """Addresses that are subscribed to the list."""
    query = sa.select(Contact.address).join(Subscription, Subscription.contact_id == Contact.id).join(ContactList, ContactList.id == Subscription.list_id)
    with reading(engine) as connection:
        return set(connection.execute(query.where(ContactList.key == list_key, Subscription.subscribed)).scalars())
