"""What runs that failed or were killed left of people, and sources that are declared no more: deleted at night. What is merged stays, and so do standings.

A run deletes what the one before it left of its source; this is for those after which none comes.
"""

from __future__ import annotations

import datetime as dt
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import get_args

import sqlalchemy as sa
from sqlalchemy.engine import Engine

from mail_pipelines.database.engine import is_mysql
from mail_pipelines.sources import declaration, running, staging
from mail_pipelines.sources.declaration import Section

# Longer than a service is away. What was extracted by then is read anew.
KEPT = dt.timedelta(days=7)


def remove(engine: Engine, home: Path, now: dt.datetime) -> list[str]:
    """Delete what is older than `KEPT`, or of a source that is not declared; returns what that was. A source that is being read is left alone."""
    folder = running.work_folder(home)
    if not folder.exists():
        return []
    declared = [path.stem for path in declaration.files(home)]
    sections: tuple[Section, ...] = get_args(Section)
    areas = {staging.area_name(name, section): name for name in declared for section in sections}

    def is_left(source: str | None, at: float) -> bool:
        return source is None or (now.timestamp() - at > KEPT.total_seconds() and not running.is_running(home, source))

    gone = [_delete(path) for path, source in _files(folder, declared, areas) if is_left(source, path.stat().st_mtime)]
    if is_mysql(engine):
        there = staging.engine_of(engine)
        try:
            left = [name for name, at in _landings(engine, there).items() if is_left(areas.get(name), at)]
            for name in left:
                staging.Staging(there, name).clear()
        finally:
            there.dispose()
        gone += left
    return sorted(gone)


def _files(folder: Path, declared: list[str], areas: Mapping[str, str]) -> Iterator[tuple[Path, str | None]]:
    """Staging files, packages and the ids of rejected rows, with their source if it is declared. (An SQLite file is as old as its last run.)"""
    for path in folder.iterdir():
        if staging.FILE_SUFFIX in path.name or path.name.endswith((".rejected.csv", ".lock")):
            name = path.name.partition(".")[0]
            # What was rejected last is what an operator looks at, however long ago that was; a lock says nothing of anybody.
            if name not in declared or staging.FILE_SUFFIX in path.name:
                yield path, name if name in declared else None
    packages = folder / running.PACKAGES
    for path in packages.iterdir() if packages.exists() else ():
        if path.name.endswith(tuple(f"_{section}" for section in get_args(Section))):
            yield path, areas.get(path.name)


def _delete(path: Path) -> str:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
    return path.name


def _landings(central: Engine, there: Engine) -> dict[str, float]:
    """When each landing was begun that stands in the staging schema, by the name of its table; nothing if there is no such schema yet."""
    query = sa.text("SELECT 1 FROM information_schema.tables WHERE table_schema = :schema AND table_name = 'landings'")
    with central.connect() as connection:
        if connection.execute(query, {"schema": staging.schema_of(central)}).first() is None:
            return {}
    return {name: dt.datetime.fromisoformat(landing.begun_at).timestamp() for name, landing in staging.landings(there).items()}
