"""SQL databases: a table, read in Arrow batches by dlt's `sql_database`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Engine

from mail_pipelines.sources import cursor
from mail_pipelines.sources.declaration import EnvironmentName, Form
from mail_pipelines.sources.errors import SourceError
from mail_pipelines.sources.kinds import Wanted

_ROWS = 20_000


class Connection(Form):
    """A SQLAlchemy URL without password (`mysql+pymysql://USER@HOST/NAME`), or the variable that has the whole."""

    url: str | None = None
    url_env: EnvironmentName | None = None
    password_env: EnvironmentName | None = None


class Read(Form):
    """A table or view, `schema_name` only if it is not the connection's own."""

    table: str
    schema_name: str | None = None


def open_engine(connection: Connection, secret: Callable[[str], str]) -> Engine:
    """An engine for the source's database; the caller disposes of it. Raises `SourceError` if its URL cannot be used."""
    url = connection.url or (secret(connection.url_env) if connection.url_env else None)
    if not url:
        raise SourceError("connection.url or connection.url_env: one of them is needed")
    try:
        address = sa.make_url(url)
        if connection.password_env:
            address = address.set(password=secret(connection.password_env))
        return sa.create_engine(address, hide_parameters=True)
    except (sa.exc.ArgumentError, ImportError) as error:
        raise SourceError(
            f"the database's URL cannot be used: {type(error).__name__}; expected DIALECT+DRIVER://USER@HOST/NAME of an installed driver"
        ) from None


def rows(connection: Connection, read: Read, wanted: Wanted) -> Iterator[Any]:
    from dlt.sources.sql_database import sql_table

    engine = open_engine(connection, wanted.secret)

    def chosen(_query: Any, table: Any) -> Any:
        if missing := [name for name in wanted.columns if name not in table.c]:
            raise SourceError(f"the source has no column {missing[0]!r} any more; its columns: {', '.join(column.name for column in table.c)}")
        query = sa.select(*(table.c[name] for name in wanted.columns))
        if wanted.cursor and wanted.since is not None:
            column = table.c[wanted.cursor]
            is_time = isinstance(column.type, (sa.DateTime, sa.Date))
            query = query.where(column >= (cursor.as_time(wanted.since) if is_time else wanted.since))
        return query

    try:
        given = sql_table(
            credentials=engine,
            table=read.table,
            schema=read.schema_name,
            backend="pyarrow",
            chunk_size=_ROWS,
            reflection_level="full",
            query_adapter_callback=chosen,
        )
        yield from given
    finally:
        engine.dispose()
