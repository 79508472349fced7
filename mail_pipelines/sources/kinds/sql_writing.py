"""Telling a SQL database: events as rows of one table. A key that is there already is left alone, so an event stands there once however often it is told."""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Any

import pydantic
import sqlalchemy as sa

from mail_pipelines.sources.declaration import Form
from mail_pipelines.sources.errors import SourceError
from mail_pipelines.sources.kinds import TAKEN, Event, EventField, Refused, Unavailable, Verdict, Writer
from mail_pipelines.sources.kinds.sql import Connection, open_engine


class Send(Form):
    """`columns` maps columns of the table to fields of an event; one of them takes the key."""

    table: str
    schema_name: str | None = None
    batch: int = pydantic.Field(default=500, ge=1, le=10_000)
    columns: Annotated[dict[str, EventField], pydantic.Field(min_length=1)]

    @pydantic.model_validator(mode="after")
    def _has_key(self) -> Send:
        if "key" not in self.columns.values():
            raise ValueError("columns: none takes `key`, by which an event that comes again is known")
        return self


@contextmanager
def writer(connection: Connection, send: Send, secret: Callable[[str], str]) -> Iterator[Writer]:
    engine = open_engine(connection, secret)
    key = next(column for column, field in send.columns.items() if field == "key")

    table: sa.Table | None = None

    def tell(events: Sequence[Event]) -> list[Verdict]:
        nonlocal table
        try:
            with engine.begin() as there:
                if table is None:
                    table = _table(there, send)
                rows = {event["key"]: {column: _fitting(event[field], table.c[column]) for column, field in send.columns.items()} for event in events}
                known = set(there.execute(sa.select(table.c[key]).where(table.c[key].in_(list(rows)))).scalars())
                if new := [row for name, row in rows.items() if name not in known]:
                    there.execute(sa.insert(table), new)
        except (sa.exc.DataError, sa.exc.IntegrityError) as error:
            raise Refused(f"the database refuses it: {type(error.orig).__name__}{_number(error)}") from None
        except sa.exc.DBAPIError as error:
            raise Unavailable(f"the database cannot take it now: {type(error.orig).__name__}{_number(error)}") from None
        return [TAKEN] * len(events)

    try:
        yield tell
    finally:
        engine.dispose()


def _table(there: sa.Connection, send: Send) -> sa.Table:
    try:
        table = sa.Table(send.table, sa.MetaData(), schema=send.schema_name, autoload_with=there)
    except sa.exc.NoSuchTableError:
        raise SourceError(f"write_back.send.table: there is no table {send.table!r}") from None
    if missing := [column for column in send.columns if column not in table.c]:
        raise SourceError(f"write_back.send.columns: the table has no column {missing[0]!r}; its columns: {', '.join(column.name for column in table.c)}")
    return table


def _fitting(value: Any, column: sa.Column[Any]) -> Any:
    """A time as a time (in UTC) if the column has such, else in ISO 8601."""
    if not isinstance(value, dt.datetime):
        return value
    if isinstance(column.type, sa.DateTime):
        return value if column.type.timezone else value.replace(tzinfo=None)
    return value.isoformat()


def _number(error: sa.exc.DBAPIError) -> str:
    """The driver's number; its words may have the value."""
    first = error.orig.args[0] if error.orig and error.orig.args else None
    return f" {first}" if isinstance(first, int) else ""
