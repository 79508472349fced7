"""Range partitions of the big tables on MySQL/MariaDB, made ahead of time: the ledger by blocks of campaign ids, events by month.

`ADD PARTITION` and `DROP PARTITION` wait for an exclusive lock on the table and every claim queues behind them, so they ask for one second only
and leave the rest to the next maintenance.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterator
from contextlib import contextmanager

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine

from mail_pipelines.database.engine import is_mysql
from mail_pipelines.database.models import Campaign, Delivery

LEDGER = "deliveries"
EVENTS = {"delivery_events": "month", "engagement_events": "month"}
CAMPAIGNS_PER_BLOCK = 32
BLOCKS_AHEAD = 4
MONTHS_AHEAD = 3
# Somebody uses the table, or has just dropped the partition.
_IN_USE = (1205, 1735)


def months_from(day: dt.date, count: int) -> list[int]:
    """`count` months as YYYYMM, beginning with that of `day`."""
    months = [(day.year * 12 + day.month - 1 + offset) for offset in range(count)]
    return [month // 12 * 100 + month % 12 + 1 for month in months]


def create(connection: Connection, today: dt.date) -> None:
    """Partition the empty tables; used once, by the first migration."""
    if not is_mysql(connection):
        return
    blocks = ", ".join(f"PARTITION c{number} VALUES LESS THAN ({number})" for number in _blocks(0, BLOCKS_AHEAD))
    connection.exec_driver_sql(f"ALTER TABLE {LEDGER} PARTITION BY RANGE (campaign_id) ({blocks})")
    # Everything older than this month shares the first partition.
    months = ", ".join(f"PARTITION m{month} VALUES LESS THAN ({month})" for month in months_from(today, MONTHS_AHEAD + 1))
    for table, column in EVENTS.items():
        connection.exec_driver_sql(f"ALTER TABLE {table} PARTITION BY RANGE ({column}) ({months})")


def _blocks(last: int, count: int) -> list[int]:
    return [last + CAMPAIGNS_PER_BLOCK * number for number in range(1, count + 1)]


def extend(engine: Engine, today: dt.date) -> list[str]:
    """Add the partitions that the next weeks need; returns their names. Safe to run at any time and again."""
    if not is_mysql(engine):
        return []
    added = []
    with _altering(engine) as connection:
        for table, bound, prefix in _missing(connection, today):
            connection.exec_driver_sql(f"ALTER TABLE {table} ADD PARTITION (PARTITION {prefix}{bound} VALUES LESS THAN ({bound}))")
            added.append(f"{table}.{prefix}{bound}")
    return added


def drop_archived(engine: Engine, today: dt.date) -> list[str]:
    """Drop partitions that the archive has emptied, which gives their disk space back; returns their names. Safe to run at any time and again.

    Of the ledger, those whose campaigns are all archived: no campaign can be given a number in them, and none that has one can get rows. Of the
    events, those of past months: what comes late lands in the partition after them. A table that is in use for longer than a second is left
    to the next maintenance.
    """
    if not is_mysql(engine):
        return []
    with _altering(engine) as connection:
        dropped = _drop(connection, LEDGER, _archived_blocks(connection), "c")
    return dropped + drop_empty_months(engine, today)


def drop_empty_months(engine: Engine, today: dt.date) -> list[str]:
    """The same for the events alone, whose months `delivery.retention` empties as well."""
    if not is_mysql(engine):
        return []
    dropped: list[str] = []
    for table in EVENTS:
        with _altering(engine) as connection:
            dropped += _drop_empty(connection, table, months_from(today, 1)[0])
    return dropped


def _archived_blocks(connection: Connection) -> list[int]:
    newest = _newest_campaign(connection)
    bounds = _bounds(connection, LEDGER)
    return [bound for first, bound in zip([0, *bounds], bounds, strict=False) if bound <= newest and not _may_get_rows(connection, first, bound)]


def _drop_empty(connection: Connection, table: str, this_month: int) -> list[str]:
    """Drop the empty partitions of past months. The table is locked, since a row may come for any month; most nights there is none, and nobody waits."""

    def empty() -> list[int]:
        # All but the last, which is ahead of time: a table needs one.
        bounds = _bounds(connection, table)[:-1]
        return [bound for bound in bounds if bound <= this_month and not _has_rows(connection, table, f"m{bound}")]

    try:
        if not empty():
            return []
        connection.exec_driver_sql(f"LOCK TABLES {table} WRITE")
        return _drop(connection, table, empty(), "m")
    except sa.exc.OperationalError as error:
        if not _is_in_use(error):
            raise
        return []
    finally:
        connection.exec_driver_sql("UNLOCK TABLES")


def _has_rows(connection: Connection, table: str, partition: str) -> bool:
    return connection.execute(sa.select(sa.literal(1)).select_from(sa.text(f"{table} PARTITION ({partition})")).limit(1)).first() is not None


def _drop(connection: Connection, table: str, bounds: list[int], prefix: str) -> list[str]:
    dropped = []
    for bound in bounds:
        try:
            connection.exec_driver_sql(f"ALTER TABLE {table} DROP PARTITION {prefix}{bound}")
        except sa.exc.OperationalError as error:
            if not _is_in_use(error):
                raise
            break
        dropped.append(f"{table}.{prefix}{bound}")
    return dropped


def _is_in_use(error: sa.exc.OperationalError) -> bool:
    return error.orig is not None and error.orig.args[0] in _IN_USE


def _may_get_rows(connection: Connection, first: int, bound: int) -> bool:
    """Whether a campaign numbered from `first` to below `bound` has rows in the ledger, or may still get some."""
    over = sa.and_(Campaign.state.in_(("finished", "cancelled")), Campaign.audience_counts.is_(None))
    gone = sa.and_(Campaign.state == "archived", Campaign.archived_at.is_not(None))
    numbered = sa.and_(Campaign.id >= first, Campaign.id < bound)
    has_rows = sa.exists().where(Delivery.campaign_id >= first, Delivery.campaign_id < bound)
    return bool(connection.execute(sa.select(sa.or_(sa.exists().where(numbered, ~sa.or_(over, gone)), has_rows))).scalar_one())


@contextmanager
def _altering(engine: Engine) -> Iterator[Connection]:
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.exec_driver_sql("SET SESSION lock_wait_timeout = 1")
        try:
            yield connection
        finally:
            # The connection goes back to the pool.
            connection.exec_driver_sql("SET SESSION lock_wait_timeout = DEFAULT")


def _newest_campaign(connection: Connection) -> int:
    newest: int = connection.execute(sa.select(sa.func.coalesce(sa.func.max(Campaign.id), 0))).scalar_one()
    return newest


def _bounds(connection: Connection, table: str) -> list[int]:
    """What the numbers in each partition are less than, in order."""
    query = sa.text(
        "SELECT CAST(partition_description AS UNSIGNED) AS bound FROM information_schema.partitions "
        "WHERE table_schema = DATABASE() AND table_name = :table ORDER BY bound"
    )
    return list(connection.execute(query, {"table": table}).scalars())


def _missing(connection: Connection, today: dt.date) -> list[tuple[str, int, str]]:
    """(table, upper bound, prefix of the name) of the partitions to add, each table's in order."""
    wanted = [(LEDGER, _blocks(0, _newest_campaign(connection) // CAMPAIGNS_PER_BLOCK + BLOCKS_AHEAD), "c")]
    wanted += [(table, months_from(today, MONTHS_AHEAD + 1), "m") for table in EVENTS]
    missing = []
    for table, bounds, prefix in wanted:
        last = max(_bounds(connection, table), default=0)
        missing += [(table, bound, prefix) for bound in bounds if bound > last]
    return missing
