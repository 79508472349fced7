"""Range partitions of the big tables on MySQL/MariaDB, made ahead of time: the ledger by blocks of campaign ids, events by month.

`ADD PARTITION` waits for an exclusive lock on the table and every claim queues behind it, so it asks for one second only
and leaves the rest to the next maintenance.
"""

from __future__ import annotations

import datetime as dt

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine

from mail_pipelines.database.engine import is_mysql
from mail_pipelines.database.models import Campaign

LEDGER = "deliveries"
EVENTS = {"delivery_events": "month", "engagement_events": "month"}
CAMPAIGNS_PER_BLOCK = 32
BLOCKS_AHEAD = 4
MONTHS_AHEAD = 3


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
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.exec_driver_sql("SET SESSION lock_wait_timeout = 1")
        try:
            for table, bound, prefix in _missing(connection, today):
                connection.exec_driver_sql(f"ALTER TABLE {table} ADD PARTITION (PARTITION {prefix}{bound} VALUES LESS THAN ({bound}))")
                added.append(f"{table}.{prefix}{bound}")
        finally:
            # The connection goes back to the pool.
            connection.exec_driver_sql("SET SESSION lock_wait_timeout = DEFAULT")
    return added


def _missing(connection: Connection, today: dt.date) -> list[tuple[str, int, str]]:
    """(table, upper bound, prefix of the name) of the partitions to add, each table's in order."""
    newest = connection.execute(sa.select(sa.func.coalesce(sa.func.max(Campaign.id), 0))).scalar_one()
    wanted = [(LEDGER, _blocks(0, newest // CAMPAIGNS_PER_BLOCK + BLOCKS_AHEAD), "c")]
    wanted += [(table, months_from(today, MONTHS_AHEAD + 1), "m") for table in EVENTS]
    missing = []
    for table, bounds, prefix in wanted:
        last = connection.execute(
            sa.text(
                "SELECT MAX(CAST(partition_description AS UNSIGNED)) FROM information_schema.partitions WHERE table_schema = DATABASE() AND table_name = :table"
            ),
            {"table": table},
        ).scalar_one()
        missing += [(table, bound, prefix) for bound in bounds if bound > (last or 0)]
    return missing
