"""A MariaDB and its replica, which takes over the address when the first is gone."""

from __future__ import annotations

from pathlib import Path

from mail_pipelines.benchmarks.mariadb import MariaDB
from tests.parts.processes import wait_for

_OPTIONS = ("--log-bin=binlog", "--binlog-format=ROW", "--innodb-flush-method=nosync")


class Replicated:
    """`primary` has a replica, which follows it asynchronously until `cut`."""

    def __init__(self, folder: Path) -> None:
        self.primary = MariaDB(folder / "primary", options=("--server-id=1", *_OPTIONS)).start()
        self.replica = MariaDB(folder / "replica", options=("--server-id=2", "--skip-slave-start", *_OPTIONS)).start()
        source = f"MASTER_HOST='127.0.0.1', MASTER_PORT={self.primary.port}, MASTER_USER='root', MASTER_USE_GTID=slave_pos"
        self._at_replica(f"CHANGE MASTER TO {source}")
        self._at_replica("START SLAVE")

    def _at_replica(self, statement: str) -> tuple[object, ...] | None:
        with self.replica.connect() as connection, connection.cursor() as cursor:
            cursor.execute(statement)
            return cursor.fetchone()

    def catch_up(self) -> None:
        """Wait until the replica has all that the primary has now."""
        with self.primary.connect() as connection, connection.cursor() as cursor:
            cursor.execute("SELECT @@gtid_binlog_pos")
            (position,) = cursor.fetchone() or ("",)
        wait_for(lambda: self._at_replica(f"SELECT MASTER_GTID_WAIT('{position}', 1)") == (0,), seconds=60, what="the replica")

    def cut(self) -> None:
        """From now on the replica lags behind."""
        self._at_replica("STOP SLAVE")

    def fail_over(self) -> None:
        """The primary is gone at once, and the replica answers at its address."""
        self.primary.kill()
        self.replica.stop()
        self.replica.port = self.primary.port
        self.replica.start()

    def stop(self) -> None:
        self.primary.stop()
        self.replica.stop()
