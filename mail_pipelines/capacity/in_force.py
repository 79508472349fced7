"""The plan in force: one row, whose version is the plan's number, and the way by which another takes its place.

What belongs here: keeping a plan and finding it. What does not: making one (`planning`), and the grants that it means (`grants`).
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from mail_pipelines.database.engine import database_now
from mail_pipelines.database.models import SyncState
from mail_pipelines.database.upsert import put

_SOURCE, _KEY = "capacity", "plan"
_MINE = (SyncState.source == _SOURCE, SyncState.key == _KEY)
_PORTIONS = (SyncState.source == _SOURCE, SyncState.key == "portions")


@dataclass(frozen=True)
class Kept:
    """The plan in force as it was kept: its number, `forecast.document` with what `planning.make` adds, and the moment that it is of."""

    epoch: int
    document: Mapping[str, Any]
    made_at: dt.datetime

    @property
    def planned_for(self) -> frozenset[tuple[int, str]] | None:
        """The campaigns that it has looked at, by provider, also where it gave them nothing. None: it was made by a version that did not keep them."""
        kept = self.document.get("planned_for")
        return None if kept is None else _pairs(kept)

    @property
    def nearly_out(self) -> frozenset[tuple[int, str]]:
        """Those of them of which it sends all that waits in the slots for which it gives grants."""
        return _pairs(self.document.get("nearly_out", {}))


def pairs_document(pairs: Collection[tuple[int, str]]) -> Mapping[str, list[str]]:
    """Campaigns and providers as a plan's document has them."""
    return {str(campaign): sorted(provider for number, provider in pairs if number == campaign) for campaign in sorted({number for number, _ in pairs})}


def _pairs(kept: Mapping[str, Sequence[str]]) -> frozenset[tuple[int, str]]:
    return frozenset((int(campaign), provider) for campaign, providers in kept.items() for provider in providers)


def read(connection: Connection) -> Kept | None:
    """The plan in force; None before the first."""
    row = connection.execute(sa.select(SyncState.version, SyncState.value, SyncState.changed_at).where(*_MINE)).one_or_none()
    return None if row is None else Kept(row.version, row.value, row.changed_at)


def is_still(connection: Connection, epoch: int, *, alone: bool = False) -> bool:
    """Whether this is still the plan in force (0: none is); until the transaction ends no other takes its place, and if `alone` nobody else asks this."""
    found = connection.execute(sa.select(SyncState.version).where(*_MINE).with_for_update(read=not alone)).scalar_one_or_none()
    return (found or 0) == epoch


def portions(connection: Connection) -> int:
    """How many portions of grants plans have written so far."""
    return connection.execute(sa.select(SyncState.version).where(*_PORTIONS)).scalar_one_or_none() or 0


def count_portion(connection: Connection, epoch: int) -> None:
    """The plan in force writes another one. Nobody but it does, so nobody else counts meanwhile."""
    now = database_now(connection)
    put(connection, SyncState, [{"source": _SOURCE, "key": "portions", "value": {"epoch": epoch}, "version": portions(connection) + 1, "changed_at": now}])


def follow(connection: Connection, epoch: int, document: Mapping[str, Any], now: dt.datetime) -> bool:
    """Put a plan into force that saw plan `epoch` (0: none) in force; false if that is not in force any more."""
    values = {"value": document, "version": epoch + 1, "changed_at": now}
    if epoch:
        return connection.execute(sa.update(SyncState).where(*_MINE, SyncState.version == epoch).values(**values)).rowcount == 1
    if connection.execute(sa.select(SyncState.version).where(*_MINE).with_for_update()).first() is not None:
        return False
    connection.execute(sa.insert(SyncState).values(source=_SOURCE, key=_KEY, **values))
    return True
