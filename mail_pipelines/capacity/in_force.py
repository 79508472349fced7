"""The plan in force: one row, whose version is the plan's number, and the way by which another takes its place.

What belongs here: keeping a plan and finding it. What does not: making one (`planning`), and the grants that it means (`grants`).
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from mail_pipelines.database.models import SyncState

_SOURCE, _KEY = "capacity", "plan"
_MINE = (SyncState.source == _SOURCE, SyncState.key == _KEY)


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
        return None if kept is None else frozenset((int(campaign), provider) for campaign, providers in kept.items() for provider in providers)


def read(connection: Connection) -> Kept | None:
    """The plan in force; None before the first."""
    row = connection.execute(sa.select(SyncState.version, SyncState.value, SyncState.changed_at).where(*_MINE)).one_or_none()
    return None if row is None else Kept(row.version, row.value, row.changed_at)


def is_still(connection: Connection, epoch: int) -> bool:
    """Whether this is still the plan in force (0: none is); until the transaction ends no other takes its place."""
    found = connection.execute(sa.select(SyncState.version).where(*_MINE).with_for_update(read=True)).scalar_one_or_none()
    return (found or 0) == epoch


def follow(connection: Connection, epoch: int, document: Mapping[str, Any], now: dt.datetime) -> bool:
    """Put a plan into force that saw plan `epoch` (0: none) in force; false if that is not in force any more."""
    values = {"value": document, "version": epoch + 1, "changed_at": now}
    if epoch:
        return connection.execute(sa.update(SyncState).where(*_MINE, SyncState.version == epoch).values(**values)).rowcount == 1
    if connection.execute(sa.select(SyncState.version).where(*_MINE).with_for_update()).first() is not None:
        return False
    connection.execute(sa.insert(SyncState).values(source=_SOURCE, key=_KEY, **values))
    return True
