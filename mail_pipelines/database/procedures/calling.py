"""Calling a stored procedure and reading all its result sets, inside the transaction of a connection."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection


def call(connection: Connection, name: str, arguments: Sequence[Any]) -> list[list[tuple[Any, ...]]]:
    """The rows of every result set, in order.

    SQLAlchemy reads one result set of a statement, so this takes the driver's cursor. The driver's errors become SQLAlchemy's, as those of any
    other statement, for `database.engine.transact` to know which to try again.
    """
    statement = f"CALL {name}({', '.join(['%s'] * len(arguments))})"
    dialect, raw = connection.dialect, connection.connection
    driver_error = dialect.loaded_dbapi.Error
    cursor = raw.cursor()
    try:
        cursor.execute(statement, tuple(arguments))
        results = [list(cursor.fetchall())]
        while cursor.nextset():
            # The last answer of a call is its end, which has no columns.
            if cursor.description:
                results.append(list(cursor.fetchall()))
        cursor.close()
    except driver_error as error:
        lost = dialect.is_disconnect(error, raw, cursor)
        if lost:
            connection.invalidate(error)
        raise sa.exc.DBAPIError.instance(
            statement, None, error, driver_error, hide_parameters=True, connection_invalidated=lost, dialect=dialect
        ) from error  # fmt: skip
    return results
