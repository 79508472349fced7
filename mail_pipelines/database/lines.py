"""Rows of MySQL/MariaDB as Arrow columns of texts: the server writes each as a line of CSV, and Arrow reads many at once.

PyMySQL takes every value out of its packet in Python; a line of CSV is one value, and takes a quarter of the time of seven columns.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from mail_pipelines.database.engine import DatabaseError

if TYPE_CHECKING:
    import pyarrow as pa


# Of a value that `group_concat` makes; what the server's max_allowed_packet permits may be less.
_MOST_BYTES = 2**30


class RowTooLong(DatabaseError):
    """A row that the server cannot send in one piece."""


def line(columns: Sequence[sa.ColumnElement[Any]]) -> sa.ColumnElement[str]:
    """A row as a line of CSV: nothing for NULL, texts in quotes, and whatever is no text as the server writes it."""
    return sa.func.concat_ws(",", *(sa.func.ifnull(_quoted(column) if isinstance(column.type, sa.String) else column, "") for column in columns))


def _quoted(column: sa.ColumnElement[Any]) -> sa.ColumnElement[str]:
    # Columns of several character sets could not be joined.
    text = sa.func.convert(column.op("USING")(sa.literal_column("utf8mb4")))
    return sa.func.concat('"', sa.func.replace(text, '"', '""'), '"')


def parse(lines: str, names: Sequence[str]) -> pa.Table:
    """Lines of CSV as `line` writes them, as text columns of these names; what is empty is null."""
    import pyarrow as pa
    import pyarrow.csv

    data = lines.encode()
    return pyarrow.csv.read_csv(
        pa.BufferReader(data),
        pyarrow.csv.ReadOptions(column_names=list(names), use_threads=False, block_size=len(data) + 1),
        pyarrow.csv.ParseOptions(newlines_in_values=True, ignore_empty_lines=False),
        pyarrow.csv.ConvertOptions(column_types=dict.fromkeys(names, pa.string()), strings_can_be_null=True, null_values=[""], check_utf8=False),
    )


def pages(connection: Connection, query: sa.Select[Any], names: Sequence[str], size: int) -> Iterator[pa.Table]:
    """The rows of a query of one `line`, at most `size` at once, while the server still sends them.

    Raises `RowTooLong`.
    """
    for lines in connection.execution_options(yield_per=size).execute(query).scalars().partitions():
        if None in lines:
            raise RowTooLong("a row is longer than max_allowed_packet permits: raise it in the configuration of the database")
        # A line that ends: a last one without anything would be none.
        yield parse("\n".join(lines) + "\n", names)


def at_once(connection: Connection, query: sa.Select[Any], columns: Sequence[sa.ColumnElement[Any]], key: sa.ColumnElement[int]) -> pa.Table | None:
    """The rows that `query` chooses (it selects nothing) as a single value: `key`, a number, in its order, and `columns`; None if they are none or too long."""
    import pyarrow as pa

    connection.exec_driver_sql(f"SET SESSION group_concat_max_len = {_MOST_BYTES}")
    # The key stands last, so that of what was cut off it is missing or wrong.
    packed = sa.func.group_concat(line([*columns, key]).op("SEPARATOR")(sa.literal_column("'\\n'")))
    count, last, lines = connection.execute(query.add_columns(sa.func.count(), sa.func.max(key), packed)).one()
    if lines is None:
        return None
    try:
        rows = parse(lines, [*(column.name for column in columns), key.name])
        keys = rows[key.name].cast(pa.int64())
    except pa.ArrowInvalid:
        return None
    rows = rows.drop_columns([key.name]).add_column(0, key.name, keys).sort_by(key.name)
    return rows if (rows.num_rows, rows[key.name][-1].as_py()) == (count, last) else None
