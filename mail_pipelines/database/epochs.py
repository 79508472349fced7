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
    second = sa.func.floor(sa.func.unix_timestamp(moment)) if is_mysql(connection) else sa.func.strftime("%s", moment)
    return sa.cast(second, sa.BigInteger)
