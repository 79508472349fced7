"""Where workers say that a run has begun or ended: one row for each run in MySQL/MariaDB, with its result as JSON.

In place of Celery's own backend for databases, which takes what it cannot read for a pickle: whoever may write a result there executes code in the
process that looks at it. That one also numbers its rows by a sequence, which every server's account would have to share with the centre.
"""

from __future__ import annotations

import datetime as dt
from typing import Any

import sqlalchemy as sa
from celery.backends.base import KeyValueStoreBackend
from kombu.utils.encoding import bytes_to_str, ensure_bytes
from sqlalchemy.dialects import mysql
from sqlalchemy.pool import NullPool

from mail_pipelines.database.types import UtcDateTime

TABLE = "run_results"
# What trying again does not change: no right to the table or a column, and rows that are not this server's.
_REFUSED = {1142, 1143, 1369}
_table = sa.Table(
    TABLE,
    sa.MetaData(),
    # The task's id, which is the run's. As wide as Dagster has it.
    sa.Column("run_id", sa.String(255), primary_key=True),
    sa.Column("document", sa.LargeBinary, nullable=False),
    sa.Column("changed_at", UtcDateTime, nullable=False),
)


class Results(KeyValueStoreBackend):
    """Celery's backend for `broker.results` in a database."""

    # The key of a result is the id of its run.
    task_keyprefix = ""
    _made = False

    def __init__(self, url: str, **options: Any) -> None:
        super().__init__(url=url, **options)
        # No connections are kept: a process has something to say here twice in a run, and may be a fork.
        self._engine = sa.create_engine(url, poolclass=NullPool, hide_parameters=True, isolation_level="READ COMMITTED")

    def make_table(self) -> None:
        """Make the table, unless it is there (on a server as a view)."""
        if not self._made:
            with self._engine.begin() as connection:
                if not sa.inspect(connection).has_table(TABLE):
                    connection.execute(sa.schema.CreateTable(_table, if_not_exists=True))
            self._made = True

    def get(self, key: bytes) -> bytes | None:
        self.make_table()
        with self._engine.connect() as connection:
            found = connection.execute(sa.select(_table.c.document).where(_table.c.run_id == bytes_to_str(key))).scalar_one_or_none()
        return None if found is None else bytes(found)

    def set(self, key: bytes, value: str | bytes) -> None:
        self.make_table()
        new = {"document": ensure_bytes(value), "changed_at": dt.datetime.now(dt.UTC)}
        with self._engine.begin() as connection:
            connection.execute(mysql.insert(_table).values(run_id=bytes_to_str(key), **new).on_duplicate_key_update(new))

    def delete(self, key: bytes) -> None:
        with self._engine.begin() as connection:
            connection.execute(sa.delete(_table).where(_table.c.run_id == bytes_to_str(key)))

    def cleanup(self) -> None:
        """Delete what is older than `result_expires`."""
        self.make_table()
        with self._engine.begin() as connection:
            connection.execute(sa.delete(_table).where(_table.c.changed_at < dt.datetime.now(dt.UTC) - dt.timedelta(seconds=self.expires)))

    def exception_safe_to_retry(self, error: BaseException) -> bool:
        """Whether another attempt may help: a database that restarts while a run begins or ends."""
        return isinstance(error, sa.exc.DBAPIError) and getattr(error.orig, "args", (None,))[0] not in _REFUSED
