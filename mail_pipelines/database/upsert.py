"""Insert, or else change the row that is there, with one statement for many rows on either database."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import mysql, sqlite
from sqlalchemy.engine import Connection

from mail_pipelines.database.engine import is_mysql
from mail_pipelines.database.models import Base


def add_to(connection: Connection, model: type[Base], rows: Sequence[dict[str, Any]], *, column: str) -> None:
    """Insert `rows`; where a primary key exists, add the row's `column` to the stored number instead.

    One `executemany` of one cached statement: the MySQL driver turns it into multi-row inserts, SQLite runs it prepared.
    Give the rows in key order, so that two writers wait for each other and do not deadlock.
    """
    if rows:
        connection.execute(_statement(model, column, is_mysql(connection)), list(rows))


def put(connection: Connection, model: type[Base], rows: Sequence[dict[str, Any]]) -> None:
    """Insert `rows`, each with all columns; where a primary key exists, the new row takes the place of the old. Give the rows in key order."""
    if rows:
        connection.execute(_put_statement(model, is_mysql(connection)), list(rows))


def put_selected(connection: Connection, model: type[Base], selected: sa.Select[*tuple[Any, ...]]) -> None:
    """As `put`, of what a query selects: all columns in their order. `selected` needs a WHERE: SQLite takes the clause for a join otherwise."""
    connection.execute(_put_statement(model, is_mysql(connection)).from_select(list(model.__table__.columns), selected))


def fold_in(
    connection: Connection,
    model: type[Base],
    selected: sa.Select[*tuple[Any, ...]],
    *,
    added: Sequence[str],
    least: Sequence[str] = (),
    greatest: Sequence[str] = (),
) -> None:
    """Insert what a query selects, all columns in their order; where a primary key exists, add, or keep the less or the greater of the two values.

    `selected` needs a WHERE: SQLite takes the clause for a join otherwise.
    """
    table = model.__table__
    assert isinstance(table, sa.Table)
    if is_mysql(connection):
        insert = mysql.insert(table).from_select(list(table.columns), selected)
        changes = _folded(table, lambda name: sa.func.values(sa.column(name)), (added, least, greatest), (sa.func.least, sa.func.greatest))
        connection.execute(insert.on_duplicate_key_update(changes))
    else:
        upsert = sqlite.insert(table)
        changes = _folded(table, lambda name: upsert.excluded[name], (added, least, greatest), (sa.func.min, sa.func.max))
        connection.execute(upsert.from_select(list(table.columns), selected).on_conflict_do_update(index_elements=list(table.primary_key), set_=changes))


def _folded(
    table: sa.Table, new: Callable[[str], sa.ColumnElement[Any]], names: tuple[Sequence[str], ...], ends: tuple[Callable[..., Any], Callable[..., Any]]
) -> dict[str, Any]:
    added, least, greatest = names
    changes: dict[str, Any] = {name: table.c[name] + new(name) for name in added}
    return changes | {name: end(table.c[name], new(name)) for chosen, end in zip((least, greatest), ends, strict=True) for name in chosen}


@functools.cache
def _put_statement(model: type[Base], mysql_family: bool) -> sa.Insert:
    table = model.__table__
    assert isinstance(table, sa.Table)
    columns = [column.name for column in table.columns if not column.primary_key]
    if mysql_family:
        return mysql.insert(table).on_duplicate_key_update({name: sa.func.values(sa.column(name)) for name in columns})
    upsert = sqlite.insert(table)
    return upsert.on_conflict_do_update(index_elements=list(table.primary_key), set_={name: upsert.excluded[name] for name in columns})


@functools.cache
def _statement(model: type[Base], column: str, mysql_family: bool) -> sa.Insert:
    table = model.__table__
    assert isinstance(table, sa.Table)
    if mysql_family:
        # `VALUES(c)` and not the row alias of newer MySQL, which MariaDB does not know and which would end the multi-row form.
        insert = mysql.insert(table)
        return insert.on_duplicate_key_update({column: table.c[column] + sa.func.values(sa.column(column))})
    upsert = sqlite.insert(table)
    return upsert.on_conflict_do_update(index_elements=list(table.primary_key), set_={column: table.c[column] + upsert.excluded[column]})
