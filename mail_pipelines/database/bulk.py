"""Loading many rows at once: `LOAD DATA LOCAL` where the server allows it, multi-row inserts elsewhere.

Callers keep a transaction to at most `CHUNK_ROWS` rows, so that nobody waits long for a lock.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from mail_pipelines.database.engine import is_mysql

if TYPE_CHECKING:
    import pyarrow as pa

CHUNK_ROWS = 10_000
# Servers answer so when LOAD DATA LOCAL is switched off on their side or the client's.
_LOCAL_LOAD_REFUSED = {1148, 3948, 4166}
_INSERT_ROWS = 5_000
# A statement of many rows lets go of the interpreter lock once; `executemany` does it for every row, and waits to get it back.
_SQLITE_PARAMETERS = 10_000


def load(connection: Connection, table: sa.Table, rows: pa.Table, *, ignore_duplicates: bool = False) -> int:
    """Insert all rows of an Arrow table into the columns of the same name; returns how many were inserted.

    Binary columns hold fixed-length digests, nested values are already JSON text, times are timestamps in UTC.
    With `ignore_duplicates` a row whose key exists is left out; without, it raises the driver's integrity error
    (the local load cannot tell, so it is not used then).
    """
    if rows.num_rows == 0:
        return 0
    loaded = _load_local(connection, table, rows) if is_mysql(connection) and ignore_duplicates else None
    return _insert(connection, table, rows, ignore_duplicates) if loaded is None else loaded


def _load_local(connection: Connection, table: sa.Table, rows: pa.Table) -> int | None:
    """Send the rows as a CSV stream; None if the server does not take one."""
    import pyarrow as pa
    import pyarrow.csv

    quote = connection.dialect.identifier_preparer.quote
    # Empty text stands for NULL, for no nullable column means anything by an empty string; digests travel as hexadecimal. What needs neither goes straight
    # into its column: a variable costs the server as much as the value.
    assignments, targets, arrays = [], [], []
    for number, name in enumerate(rows.column_names):
        values = rows.column(name).combine_chunks()
        target, given = f"@v{number}", f"NULLIF(@v{number}, '')"
        if pa.types.is_binary(values.type) or pa.types.is_fixed_size_binary(values.type):
            values = pa.array([None if value is None else value.hex() for value in values.to_pylist()], pa.string())
            assignments.append(f"{quote(name)} = UNHEX({given})")
        elif table.c[name].nullable and _says_nothing(values):
            assignments.append(f"{quote(name)} = {given}")
        else:
            target = quote(name)
        if pa.types.is_boolean(values.type):
            values = values.cast(pa.int8())
        elif pa.types.is_timestamp(values.type):
            values = values.cast(pa.timestamp("us"))
        targets.append(target)
        arrays.append(values)
    with tempfile.TemporaryDirectory(prefix="mail-pipelines-load-") as folder:
        path = Path(folder) / "rows.csv"
        pyarrow.csv.write_csv(pa.table(arrays, names=rows.column_names), path, pyarrow.csv.WriteOptions(include_header=False))
        statement = (
            "LOAD DATA LOCAL INFILE %s IGNORE INTO TABLE " + quote(table.name) + " CHARACTER SET utf8mb4 FIELDS TERMINATED BY ',' "
            f"OPTIONALLY ENCLOSED BY '\"' ESCAPED BY '' LINES TERMINATED BY '\\n' ({', '.join(targets)})"
        )
        if assignments:
            statement += f" SET {', '.join(assignments)}"
        try:
            return connection.exec_driver_sql(statement, (str(path),)).rowcount
        except sa.exc.DBAPIError as error:
            if error.orig is not None and error.orig.args and error.orig.args[0] in _LOCAL_LOAD_REFUSED:
                return None
            raise


def _says_nothing(values: pa.Array) -> bool:
    """Whether one of the values is null or empty."""
    import pyarrow as pa
    import pyarrow.compute as pc

    return values.null_count > 0 or (pa.types.is_string(values.type) and pc.any(pc.equal(values, "")).as_py() is True)


def _insert(connection: Connection, table: sa.Table, rows: pa.Table, ignore_duplicates: bool) -> int:
    quote = connection.dialect.identifier_preparer.quote
    names = ", ".join(quote(name) for name in rows.column_names)
    if not is_mysql(connection):
        verb = "INSERT OR IGNORE" if ignore_duplicates else "INSERT"
        marks = f"({', '.join('?' * rows.num_columns)})"
        step = _SQLITE_PARAMETERS // rows.num_columns
        inserted = 0
        for start in range(0, rows.num_rows, step):
            chunk = list(_tuples(rows.slice(start, step), for_sqlite=True))
            values = ", ".join([marks] * len(chunk))
            statement = f"{verb} INTO {quote(table.name)} ({names}) VALUES {values}"
            inserted += connection.exec_driver_sql(statement, tuple(itertools.chain.from_iterable(chunk))).rowcount
        return inserted
    verb = "INSERT IGNORE" if ignore_duplicates else "INSERT"
    # PyMySQL turns an executemany of this shape into multi-row statements.
    marks = ", ".join(["%s"] * rows.num_columns)
    inserted = 0
    for start in range(0, rows.num_rows, _INSERT_ROWS):
        chunk = list(_tuples(rows.slice(start, _INSERT_ROWS), for_sqlite=False))
        inserted += connection.exec_driver_sql(f"{verb} INTO {quote(table.name)} ({names}) VALUES ({marks})", chunk).rowcount
    return inserted


def _tuples(rows: pa.Table, *, for_sqlite: bool) -> Iterator[tuple[Any, ...]]:
    import pyarrow as pa

    columns = []
    for field, column in zip(rows.schema, rows.columns, strict=True):
        if for_sqlite and pa.types.is_timestamp(field.type):
            # The text form in which SQLAlchemy keeps times in SQLite.
            columns.append(column.cast(pa.timestamp("us")).cast(pa.string()).to_pylist())
        else:
            columns.append(column.to_pylist())
    return zip(*columns, strict=True)
