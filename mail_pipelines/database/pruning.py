"""Deleting many rows in bounded transactions. Killed at any moment it has deleted some of them, and the next time deletes the others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine
from sqlalchemy.orm import InstrumentedAttribute

from mail_pipelines.database.bulk import CHUNK_ROWS
from mail_pipelines.database.engine import reading, transact
from mail_pipelines.database.models import Base


def delete(engine: Engine, table: type[Base], order: Sequence[InstrumentedAttribute[Any]], condition: sa.ColumnElement[bool]) -> int:
    """Delete the rows that meet the condition, at most `CHUNK_ROWS` a transaction; returns how many.

    One stretch of the unique `order` after the other: give the columns of an index that finds the rows.
    """
    deleted = 0
    begin: Sequence[Any] | None = None
    while True:
        where = [condition] if begin is None else [condition, order[0] >= begin[0], ~_before(order, begin)]
        with reading(engine) as connection:
            end = connection.execute(sa.select(*order).where(*where).order_by(*order).offset(CHUNK_ROWS).limit(1)).one_or_none()
        if end is not None:
            where += [order[0] <= end[0], _before(order, end)]
        statement = sa.delete(table).where(*where)

        def work(connection: Connection, statement: sa.Delete = statement) -> int:
            return connection.execute(statement).rowcount

        deleted += transact(engine, work)
        if end is None:
            return deleted
        begin = end


def _before(order: Sequence[InstrumentedAttribute[Any]], place: Sequence[Any]) -> sa.ColumnElement[bool]:
    """Rows that come before `place`, a value for each column of the order."""
    return sa.or_(
        *(
            sa.and_(*(earlier == value for earlier, value in zip(order[:number], place[:number], strict=True)), column < place[number])
            for number, column in enumerate(order)
        )
    )
