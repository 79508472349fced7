"""Times as epoch seconds inside a query, on either database: for grouping by hour and for comparing with `deliveries.sort_key`."""

from __future__ import annotations

import datetime as dt

import sqlalchemy as sa
from sqlalchemy.engine import Connection
from sqlalchemy.orm import InstrumentedAttribute

from mail_pipelines.database.engine import is_mysql


def epoch_second(connection: Connection, moment: InstrumentedAttribute[dt.datetime]) -> sa.ColumnElement[int]:
    """The whole second (rounded down) of a `UtcDateTime` column."""
    # The connection's time zone is UTC (`database.engine`), so UNIX_TIMESTAMP does not shift anything.
    # SQLite rounds to milliseconds, and so the last half of one to the next second: its fraction is cut off.
    second = sa.func.floor(sa.func.unix_timestamp(moment)) if is_mysql(connection) else sa.func.strftime("%s", sa.func.substr(moment, 1, 19))
    return sa.cast(second, sa.BigInteger)
