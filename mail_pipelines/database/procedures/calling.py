"""Calling a stored procedure and reading all its result sets, inside the transaction of a connection."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection


def call(connection: Connection, name: str, arguments: Sequence[Any]) -> list[list[tuple[Any, ...]]]:
    """The rows of every result set, in order.

    SQLAlchemy reads one result set of a statement, so this takes the driver's cursor; the driver's errors become SQLAlchemy's, as those of any
    other statement, so that `database.engine.transact` knows which to try again.
    """
    statement = f"CALL {name}({', '.join(['%s'] * len(arguments))})"
    driver_error = connection.dialect.loaded_dbapi.Error
    try:
        cursor = connection.connection.cursor()
        try:
            cursor.execute(statement, tuple(arguments))
            results = [list(cursor.fetchall())]
            while cursor.nextset():
                # The last answer of a call is its end, which has no columns.
                if cursor.description:
                    results.append(list(cursor.fetchall()))
        finally:
            cursor.close()
    except driver_error as error:
        raise sa.exc.DBAPIError.instance(
            statement, None, error, driver_error, hide_parameters=True, dialect=connection.dialect
        ) from error  # fmt: skip
    return results
