"""SQL databases: a table, read in Arrow batches by dlt's `sql_database`, or as lines of CSV where the server can write them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Engine

from mail_pipelines.database import lines
from mail_pipelines.database.engine import is_mysql
from mail_pipelines.sources import cursor
from mail_pipelines.sources.declaration import EnvironmentName, Form
from mail_pipelines.sources.errors import SourceError
from mail_pipelines.sources.kinds import Wanted

_ROWS = 20_000
# What MySQL writes as it is read elsewhere. Not binary strings, JSON, times of day.
_WRITTEN_ALIKE = (sa.Integer, sa.Numeric, sa.String, sa.DateTime, sa.Date)


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
        # What is no dialect and no module has no secret in it.
        what = str(error) if isinstance(error, (sa.exc.NoSuchModuleError, ImportError)) else type(error).__name__
        raise SourceError(f"the database's URL cannot be used: {what}; expected DIALECT+DRIVER://USER@HOST/NAME of an installed driver") from None


def rows(connection: Connection, read: Read, wanted: Wanted) -> Iterator[Any]:
    engine = open_engine(connection, wanted.secret)
    try:
        if is_mysql(engine):
            table = sa.Table(read.table, sa.MetaData(), schema=read.schema_name, autoload_with=engine, resolve_fks=False)
            query = _chosen(table, wanted)
            if all(isinstance(column.type, _WRITTEN_ALIKE) for column in query.selected_columns):
                yield from _written(engine, query)
                return
        yield from _arrow(engine, read, wanted)
    finally:
        engine.dispose()


def _chosen(table: sa.Table, wanted: Wanted) -> sa.Select[Any]:
    """The wanted columns and rows. Raises `SourceError` for a column that is not there."""
    if missing := [name for name in wanted.columns if name not in table.c]:
        raise SourceError(f"the source has no column {missing[0]!r} any more; its columns: {', '.join(column.name for column in table.c)}")
    query = sa.select(*(table.c[name] for name in wanted.columns))
    if wanted.cursor and wanted.since is not None:
        column = table.c[wanted.cursor]
        is_time = isinstance(column.type, (sa.DateTime, sa.Date))
        query = query.where(column >= (cursor.as_time(wanted.since) if is_time else wanted.since))
    return query


def _arrow(engine: Engine, read: Read, wanted: Wanted) -> Iterator[Any]:
    """Any database, by dlt."""
    from dlt.sources.sql_database import sql_table

    yield from sql_table(
        credentials=engine,
        table=read.table,
        schema=read.schema_name,
        backend="pyarrow",
        chunk_size=_ROWS,
        reflection_level="full",
        query_adapter_callback=lambda _query, table: _chosen(table, wanted),
    )


def _written(engine: Engine, query: sa.Select[Any]) -> Iterator[Any]:
    """MySQL and MariaDB, three times as fast as by dlt."""
    import pyarrow.compute as pc

    columns = list(query.selected_columns)
    names = [column.name for column in columns]
    times = [number for number, column in enumerate(columns) if isinstance(column.type, sa.DateTime)]
    with engine.connect() as connection:
        try:
            for page in lines.pages(connection, query.with_only_columns(lines.line(columns)), names, _ROWS):
                for number in times:
                    # As `contacts.files.as_text` writes a time.
                    text = pc.binary_join_element_wise(pc.replace_substring_regex(page[number], r"\.0+$", ""), "Z", "")
                    page = page.set_column(number, names[number], text)
                yield page
        except lines.RowTooLong as error:
            raise SourceError(f"the source's table: {error}") from error
