"""Where a recovery stands: the life of the ledger it made, and what each server has contributed.

What belongs here: the rows of `recoveries` and `recovery_servers`. What does not: reading logs (`reading`) and changing the ledger
(`applying`).
"""

from __future__ import annotations

import datetime as dt
import enum
import uuid
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from mail_pipelines.database.engine import database_id
from mail_pipelines.database.models import LedgerGeneration, Recovery, RecoveryServer, Server
from mail_pipelines.dispatch import audit

_NO_PART = ("retired", "lost")


class Part(enum.StrEnum):
    """What a server has contributed."""

    AWAITED = "awaited"
    # Its log was read, and has everything since the backup.
    READ = "read"
    # Its log was read, but something may be missing in it.
    INCOMPLETE = "incomplete"
    # It will not come back, and nobody reads its log.
    LOST = "lost"


@dataclass(frozen=True)
class ServerPart:
    """One server's part. `heartbeat_at`, `incarnation`, `boot_id` and `journal_inode` are the last that the restored database knew of it."""

    server_id: int
    server: str
    part: Part
    heartbeat_at: dt.datetime | None
    incarnation: str | None
    boot_id: str | None
    journal_inode: int | None
    offers: int
    note: str | None


@dataclass(frozen=True)
class Standing:
    """The recovery that made the ledger's present generation. It is open until `finished_at`."""

    generation: str
    began_at: dt.datetime
    finished_at: dt.datetime | None
    servers: tuple[ServerPart, ...]

    @property
    def is_open(self) -> bool:
        return self.finished_at is None

    def awaited(self) -> list[str]:
        return [part.server for part in self.servers if part.part is Part.AWAITED]

    def uncovered(self) -> list[str]:
        """Servers that may have mailed what nobody has read."""
        return [part.server for part in self.servers if part.part in (Part.INCOMPLETE, Part.LOST)]

    def of_server(self, server_id: int) -> ServerPart | None:
        return next((part for part in self.servers if part.server_id == server_id), None)


def newest(connection: Connection) -> Standing | None:
    """The recovery that made the present generation; None if none did."""
    columns = (Recovery.generation, Recovery.began_at, Recovery.finished_at)
    row = connection.execute(sa.select(*columns).join(LedgerGeneration, LedgerGeneration.generation == Recovery.generation)).one_or_none()
    return Standing(row.generation, row.began_at, row.finished_at, tuple(_parts(connection, row.generation))) if row else None


def _parts(connection: Connection, generation: str) -> list[ServerPart]:
    columns = [column for column in RecoveryServer.__table__.columns if column.name != "generation"]
    query = sa.select(*columns, Server.key.label("server")).join(Server, Server.id == RecoveryServer.server_id)
    rows = connection.execute(query.where(RecoveryServer.generation == generation).order_by(Server.key))
    return [ServerPart(**{**row._mapping, "part": Part(row.part)}) for row in rows]


def begin(connection: Connection, now: dt.datetime) -> Standing:
    """Give the ledger a new generation, and await every server that may have mailed anything. An open recovery goes on."""
    connection.execute(sa.select(LedgerGeneration.generation).with_for_update()).one()
    found = newest(connection)
    if found is not None and found.is_open:
        return found
    generation = str(uuid.uuid4())
    connection.execute(sa.update(LedgerGeneration).values(generation=generation, database_id=database_id(connection), created_at=now))
    connection.execute(sa.insert(Recovery).values(generation=generation, began_at=now, finished_at=None))
    audits = audit.standings(connection)
    columns = (Server.id, Server.key, Server.heartbeat_at, Server.incarnation, Server.boot_id)
    for row in connection.execute(sa.select(*columns).where(Server.state.not_in(_NO_PART))).all():
        audited = audits.get(row.key)
        inode = audited.position.inode if audited is not None and audited.position is not None else None
        known = {"heartbeat_at": row.heartbeat_at, "incarnation": row.incarnation, "boot_id": row.boot_id, "journal_inode": inode}
        await_server(connection, generation, row.id, **known)
    return Standing(generation, now, None, tuple(_parts(connection, generation)))


def await_server(connection: Connection, generation: str, server_id: int, **known: Any) -> None:
    """Make a server part of a recovery; `known` is what the restored database knew of it."""
    values = {"generation": generation, "server_id": server_id, "part": Part.AWAITED.value, "offers": 0}
    connection.execute(sa.insert(RecoveryServer).values(values | known))


def set_part(connection: Connection, generation: str, server_id: int, part: Part, *, offers: int = 0, note: str = "") -> None:
    """Write down what a server has contributed."""
    ours = (RecoveryServer.generation == generation, RecoveryServer.server_id == server_id)
    connection.execute(sa.update(RecoveryServer).where(*ours).values(part=part.value, offers=offers, note=note[:200] or None))


def finish(connection: Connection, generation: str, now: dt.datetime) -> None:
    """From here on the servers send again."""
    connection.execute(sa.update(Recovery).where(Recovery.generation == generation, Recovery.finished_at.is_(None)).values(finished_at=now))
