"""The change feed: one row for each contact that changed, written in the transaction of the change.

Snapshots follow it; whatever a contact snapshot holds (attributes, address, subscriptions) must be recorded here when it changes.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Collection
from typing import Any, Literal

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from mail_pipelines.database.models import ContactChange

Operation = Literal["upsert", "delete"]


def record(connection: Connection, contact_ids: Collection[int] | sa.Select[Any], op: Operation, *, now: dt.datetime) -> None:
    """Append one change for each contact id, given as a collection or as a query of one column that the database evaluates itself."""
    if isinstance(contact_ids, sa.Select):
        contact_id = contact_ids.subquery().c[0]
        chosen = sa.select(contact_id, sa.literal(op), sa.literal(now, ContactChange.created_at.type))
        connection.execute(sa.insert(ContactChange).from_select(["contact_id", "op", "created_at"], chosen))
    elif contact_ids:
        connection.execute(sa.insert(ContactChange), [{"contact_id": contact_id, "op": op, "created_at": now} for contact_id in contact_ids])
