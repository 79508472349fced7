"""The change feed: one row for each contact that changed, written in the transaction of the change.

Snapshots follow it, and external sources find in it who may have left; whatever a contact snapshot holds (attributes, address, subscriptions) must be
recorded here when it changes. Changes go after `KEPT`. Whoever reads the feed reads on from its last number, unless something went that it has not read:
then it begins anew, with the contacts themselves.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Collection
from typing import Any, Literal, NamedTuple

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine

from mail_pipelines.database import pruning, upsert
from mail_pipelines.database.engine import reading, transact
from mail_pipelines.database.models import ContactChange, SyncState

Operation = Literal["upsert", "delete"]
# The snapshot reads every hour. A source that was not told for a day looks at everybody in any case (`sources.feeds`).
KEPT = dt.timedelta(days=14)
_MARK = {"source": ContactChange.__tablename__, "key": "gone"}


def record(connection: Connection, contact_ids: Collection[int] | sa.Select[Any], op: Operation, *, now: dt.datetime) -> None:
    """Append one change for each contact id, given as a collection or as a query of one column that the database evaluates itself."""
    if isinstance(contact_ids, sa.Select):
        contact_id = contact_ids.subquery().c[0]
        chosen = sa.select(contact_id, sa.literal(op), sa.literal(now, ContactChange.created_at.type))
        connection.execute(sa.insert(ContactChange).from_select(["contact_id", "op", "created_at"], chosen))
    elif contact_ids:
        connection.execute(sa.insert(ContactChange), [{"contact_id": contact_id, "op": op, "created_at": now} for contact_id in contact_ids])


class Gone(NamedTuple):
    """Of changes with a number of at most `seq` those from before `created_before` are gone, or are just going."""

    seq: int
    created_before: dt.datetime


def prune(engine: Engine, now: dt.datetime) -> int:
    """Delete changes older than `KEPT`, in bounded transactions; returns how many. May be killed at any moment, and be done twice at once.

    What goes is noted first (`gone`), so a reader that asks after its reading knows whether it has missed any.
    """
    before, change = now - KEPT, ContactChange
    with reading(engine) as connection:
        # The newest stays: SQLite numbers the next one by it.
        newest = sa.select(sa.func.max(change.seq)).scalar_subquery()
        seq = connection.execute(sa.select(sa.func.max(change.seq)).where(change.created_at < before, change.seq < newest)).scalar_one()
    if seq is None:
        return 0
    values = (*_MARK.values(), {}, seq, before)
    columns = SyncState.__table__.columns
    mark = sa.select(*(sa.literal(value, column.type) for value, column in zip(values, columns, strict=True))).where(change.seq == newest)
    transact(engine, lambda connection: upsert.fold_in(connection, SyncState, mark, added=(), greatest=("version", "changed_at")))
    return pruning.delete(engine, change, (change.created_at, change.seq), sa.and_(change.created_at < before, change.seq <= seq))


def gone(connection: Connection) -> Gone | None:
    """What `prune` has deleted, or is deleting; None if nothing yet."""
    row = connection.execute(sa.select(SyncState.version, SyncState.changed_at).filter_by(**_MARK)).one_or_none()
    return None if row is None else Gone(row.version, row.changed_at)
