"""An embedded installation moves to MySQL or MariaDB: everything is held, copied, compared and counted, and then goes on there.

May be killed at any moment and begun again. Never do both databases let anything be sent: all of it is held in the first before the first row is
copied; the last comparison is made while nobody can write there, and in the same transaction that database is given up; then mail is released in the other.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine

from mail_pipelines import up
from mail_pipelines.config import Settings
from mail_pipelines.database import copying, migrate, partitions
from mail_pipelines.database.engine import database_now, is_mysql, reading, transact
from mail_pipelines.database.models import Campaign, Contact, LedgerGeneration, Server, SyncState
from mail_pipelines.dispatch import holds, servers
from mail_pipelines.errors import MailPipelinesError
from mail_pipelines.supervision import Processes

_BY = "database copy"
# A row of the target, until its hold is released: of which ledger it is a copy.
_MARK = {"source": "database_copy", "key": "from"}


class MoveError(MailPipelinesError):
    """The database cannot be copied now, or not there."""


@dataclass(frozen=True)
class Moved:
    """One table that is the same in both databases: its rows, and the digest of all of them."""

    table: str
    rows: int
    sha256: str


Progress = Callable[[str, int], None]


def move(settings: Settings, source: Engine, target: Engine, now: dt.datetime, progress: Progress) -> list[Moved]:
    """Copy the central database of an embedded installation to `target`; returns its tables, or nothing if all that was left was to release the mail there.

    `progress` is told the table and how many more of its rows were looked at. Raises `MoveError`, and `DatabaseError` if the target does not take a row.
    """
    if is_mysql(source) or not is_mysql(target):
        raise MoveError("an embedded installation (SQLite) is copied to MySQL or MariaDB: give --to mysql+pymysql://USER@HOST/NAME")
    # Nothing may begin meanwhile, and what runs has to be stopped by those who started it.
    with Processes(lock=up.lock(settings.home)):
        if migrate.is_moved(source):
            if _marked(target) != _generation(source):
                raise MoveError("this database was moved before, and that is finished: database.url has to name the other one")
            _release(target, now)
            return []
        migrate.require_schema(source)
        _hold(source, now)
        _require_silence(source, settings.server.heartbeat_seconds)
        migrate.upgrade(target)
        _mark(source, target, now)
        with reading(source) as connection:
            for table in copying.tables():
                _copy(connection, target, table, now, progress)
        # Most of it is there. Whatever was written meanwhile follows while nobody writes.
        moved = transact(source, lambda connection: _give_up(connection, target, now, progress))
        _release(target, now)
    return moved


def _hold(source: Engine, now: dt.datetime) -> None:
    transact(source, lambda connection: holds.place(connection, holds.Scope(), "the central database is being moved", _BY, now))


def _require_silence(source: Engine, heartbeat_seconds: float) -> None:
    with reading(source) as connection:
        now = database_now(connection)
        speaking = [server.key for server in servers.all_servers(connection) if not server.is_silent(now, heartbeat_seconds)]
    if speaking:
        raise MoveError(
            f"everything is held now, but the processes of {', '.join(speaking)} still work: stop them, and inbound mail, "
            f"wait {servers.SILENT_BEATS * heartbeat_seconds:.0f} s and give the command again"
        )


def _mark(source: Engine, target: Engine, now: dt.datetime) -> None:
    """Say in the target whose copy it is. Raises `MoveError` for one that is somebody's already."""
    own = _generation(source)

    def work(connection: Connection) -> None:
        found = connection.execute(sa.select(SyncState.value).filter_by(**_MARK)).scalar_one_or_none()
        if found == own:
            return
        if found is not None or any(connection.execute(sa.select(sa.exists().select_from(table))).scalar_one() for table in (Contact, Campaign, Server)):
            raise MoveError("the target has an installation already; give an empty database")
        connection.execute(sa.insert(SyncState).values(**_MARK, value=own, version=1, changed_at=now))

    transact(target, work)


def _marked(target: Engine) -> str | None:
    """Of which ledger the target is an unfinished copy."""
    with reading(target) as connection:
        return connection.execute(sa.select(SyncState.value).filter_by(**_MARK)).scalar_one_or_none()


def _generation(source: Engine) -> str:
    with reading(source) as connection:
        return connection.execute(sa.select(LedgerGeneration.generation)).scalar_one()


def _copy(source: Connection, target: Engine, table: sa.Table, now: dt.datetime, progress: Progress) -> None:
    if table.name == SyncState.__tablename__:
        # It has the mark, which the source does not: at the very end.
        return
    if table.name in (partitions.LEDGER, *partitions.EVENTS):
        partitions.extend(target, now.date())
    copying.copy(source, target, table, lambda rows: progress(table.name, rows))


def _give_up(source: Connection, target: Engine, now: dt.datetime, progress: Progress) -> list[Moved]:
    """Bring the target up to date, prove it, and give up the source, in the transaction in which nobody else writes there."""
    mark: dict[str, Any] = {"value": source.execute(sa.select(LedgerGeneration.generation)).scalar_one(), "version": 1, "changed_at": now}
    moved = []
    # As a row of both it is the same in both.
    if source.execute(sa.select(SyncState.value).filter_by(**_MARK)).first() is None:
        source.execute(sa.insert(SyncState).values(**_MARK, **mark))
    for table in copying.tables():

        def advance(rows: int, name: str = table.name) -> None:
            progress(name, rows)

        here, there = copying.compare(source, target, table, advance)
        if here != there:
            copying.copy(source, target, table, advance)
            here, there = copying.compare(source, target, table, advance)
        if here != there:
            raise MoveError(f"table {table.name} has {here.rows:,} rows ({here.sha256[:12]}) here and {there.rows:,} ({there.sha256[:12]}) in the copy")
        moved.append(Moved(table.name, here.rows, here.sha256))
    migrate.mark_moved(source)
    return moved


def _release(target: Engine, now: dt.datetime) -> None:
    """Let the mail go that was held for the copy; a hold that somebody had placed before stays."""

    def work(connection: Connection) -> None:
        if any(hold.by_whom == _BY for hold in holds.in_force(connection).holds):
            holds.release(connection, holds.Scope(), _BY, now)
        connection.execute(sa.delete(SyncState).filter_by(**_MARK))
        migrate.remember_server(connection)

    transact(target, work)
