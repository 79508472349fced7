"""The rows of one database brought into another one with the same schema, table by table, in ranges of primary keys.

Each range is read on both sides. What differs is deleted and written anew, so a copy that was interrupted goes on where it was, and a comparison that
finds nothing is the proof. What belongs here: rows. What does not: when nobody may write, and which of the two is then used (`moving`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine

from mail_pipelines.database.engine import DatabaseError, reading, transact
from mail_pipelines.database.models import Base
from mail_pipelines.database.partitions import EVENTS, LEDGER

# Of one transaction.
ROWS = 5_000
Key = Sequence[Any]


def tables() -> list[sa.Table]:
    """All tables, partitioned ones last: their partitions are made for the campaigns there are."""
    return sorted(Base.metadata.sorted_tables, key=lambda table: table.name in (LEDGER, *EVENTS))


def sizes(source: Engine) -> dict[str, int]:
    """How often rows of each table will be looked at, to show how far it is: once to copy and once to compare them."""
    with reading(source) as connection:
        return {table.name: 2 * connection.execute(sa.select(sa.func.count()).select_from(table)).scalar_one() for table in tables()}


@dataclass(frozen=True)
class Compared:
    """A table on one side: how many rows, and a digest of all of them in the order of their keys."""

    rows: int
    sha256: str


def copy(source: Connection, target: Engine, table: sa.Table, progress: Callable[[int], None]) -> int:
    """Make the rows of `table` in the target those of the source; returns how many were written. `progress` is told how many were read.

    May be interrupted and called again. Raises `DatabaseError` if the target does not take a row.
    """
    # First everywhere: a unique value may have moved from one row to another.
    for rows, there, (low, high) in _ranges(source, target, table):
        if not there.items() <= rows.items():
            gone = [key for key, row in there.items() if rows.get(key) != row]
            deletion = _of_keys(table, gone) if len(gone) < len(there) else _of_range(table, low, high)
            _change(target, table, *deletion)
    written = 0
    for rows, there, _ in _ranges(source, target, table):
        if missing := [dict(row) for key, row in rows.items() if key not in there]:
            _change(target, table, sa.insert(table), missing)
            written += len(missing)
        progress(len(rows))
    return written


def compare(source: Connection, target: Engine, table: sa.Table, progress: Callable[[int], None]) -> tuple[Compared, Compared]:
    """The table in the source and in the target."""
    counts, digests = [0, 0], [hashlib.sha256(), hashlib.sha256()]
    for *sides, _ in _ranges(source, target, table):
        for side, rows in enumerate(sides):
            counts[side] += len(rows)
            for row in rows.values():
                digests[side].update(_text(row))
        progress(len(sides[0]))
    return Compared(counts[0], digests[0].hexdigest()), Compared(counts[1], digests[1].hexdigest())


Row = tuple[tuple[str, Any], ...]


def _ranges(source: Connection, target: Engine, table: sa.Table) -> Iterator[tuple[dict[Any, Row], dict[Any, Row], tuple[Key | None, Key | None]]]:
    """All rows of both sides by key, range after range; the first range begins at no key and the last ends at none."""
    low: Key | None = None
    while True:
        rows = _rows(source, table, low, None, ROWS)
        high = list(rows)[-1] if len(rows) == ROWS else None
        with target.connect() as connection:
            yield rows, _rows(connection, table, low, high), (low, high)
        if high is None:
            return
        low = high


def _rows(connection: Connection, table: sa.Table, low: Key | None, high: Key | None, most: int | None = None) -> dict[Any, Row]:
    keys = list(table.primary_key.columns)
    query = sa.select(table).where(*_within(table, low, high)).order_by(*keys).limit(most)
    found: dict[Any, Row] = {}
    for row in connection.execute(query).mappings():
        found[tuple(row[key.name] for key in keys)] = tuple((column.name, row[column.name]) for column in table.columns)
    return found


def _within(table: sa.Table, low: Key | None, high: Key | None) -> list[sa.ColumnElement[bool]]:
    keys = list(table.primary_key.columns)
    conditions = [] if low is None else [_after(keys, low)]
    return conditions if high is None else [*conditions, sa.not_(_after(keys, high))]


def _after(columns: Sequence[sa.Column[Any]], values: Key) -> sa.ColumnElement[bool]:
    """That the key comes after this one. Written out, since MariaDB finds no range in a comparison of tuples."""
    # Bound, since a truth value as such cannot be compared by order.
    column, value = columns[0], sa.literal(values[0], columns[0].type)
    later: sa.ColumnElement[bool] = column > value
    if len(columns) == 1:
        return later
    return sa.or_(later, sa.and_(column == value, _after(columns[1:], values[1:])))


def _of_range(table: sa.Table, low: Key | None, high: Key | None) -> tuple[sa.Delete, None]:
    return sa.delete(table).where(*_within(table, low, high)), None


def _of_keys(table: sa.Table, found: Sequence[Key]) -> tuple[sa.Delete, list[dict[str, Any]]]:
    keys = list(table.primary_key.columns)
    where = (key == sa.bindparam(f"key_{key.name}") for key in keys)
    return sa.delete(table).where(*where), [{f"key_{key.name}": value for key, value in zip(keys, one, strict=True)} for one in found]


def _change(target: Engine, table: sa.Table, statement: sa.Insert | sa.Delete, rows: list[dict[str, Any]] | None) -> None:
    def work(connection: Connection) -> None:
        # Tables come one after the other, so a row may refer to one that is still to come.
        connection.exec_driver_sql("SET SESSION foreign_key_checks = 0")
        try:
            connection.execute(statement, rows)
        finally:
            connection.exec_driver_sql("SET SESSION foreign_key_checks = 1")

    try:
        transact(target, work)
    except (sa.exc.DataError, sa.exc.IntegrityError) as error:
        raise DatabaseError(f"table {table.name}: the target does not take a row: {error.orig}") from error


def _text(row: Row) -> bytes:
    return json.dumps([value.hex() if isinstance(value, bytes) else value for _, value in row], sort_keys=True, default=str).encode()
