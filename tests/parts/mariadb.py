"""A MariaDB server of our own: a fresh data folder, a free port, no system service touched."""

from __future__ import annotations

import getpass
import itertools
import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

import pymysql

from tests.parts.processes import free_port, stop, wait_for

_numbers = itertools.count(1)


@dataclass
class MariaDB:
    """A running server; `database()` makes an empty schema and returns its SQLAlchemy URL."""

    folder: Path
    port: int = field(default_factory=free_port)
    process: subprocess.Popen[bytes] | None = None
    options: tuple[str, ...] = ()

    def start(self) -> MariaDB:
        data = self.folder / "data"
        user = getpass.getuser()
        if not data.exists():
            subprocess.run(
                ["mariadb-install-db", f"--datadir={data}", "--auth-root-authentication-method=normal", "--skip-test-db", f"--user={user}", "--skip-log-bin"],
                check=True,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
            )
        server = shutil.which("mariadbd") or "/usr/sbin/mariadbd"
        self.process = subprocess.Popen(
            [
                server,
                "--no-defaults",
                f"--datadir={data}",
                f"--port={self.port}",
                f"--socket={self.folder / 's'}",
                f"--pid-file={self.folder / 'pid'}",
                f"--user={user}",
                "--bind-address=127.0.0.1",
                "--character-set-server=utf8mb4",
                "--innodb-buffer-pool-size=512M",
                "--innodb-log-file-size=256M",
                # What production must have (`mail-pipelines doctor`).
                "--innodb-flush-log-at-trx-commit=1",
                "--local-infile=1",
                "--skip-name-resolve",
                "--performance-schema=OFF",
                *self.options,
            ],
            stdout=(self.folder / "log").open("ab"),
            stderr=subprocess.STDOUT,
        )
        wait_for(self._answers, seconds=60, what=f"MariaDB on port {self.port}")
        return self

    def _answers(self) -> bool:
        assert self.process is not None
        assert self.process.poll() is None, (self.folder / "log").read_text(errors="replace")[-2000:]
        try:
            self.connect().close()
        except pymysql.err.OperationalError:
            return False
        return True

    def connect(self, database: str | None = None) -> pymysql.Connection:  # type: ignore[type-arg]
        return pymysql.connect(host="127.0.0.1", port=self.port, user="root", database=database, autocommit=True)

    def database(self) -> str:
        name = f"test_{next(_numbers)}"
        with self.connect() as connection, connection.cursor() as cursor:
            cursor.execute(f"CREATE DATABASE {name}")
        return f"mysql+pymysql://root@127.0.0.1:{self.port}/{name}"

    def drop(self, url: str) -> None:
        with self.connect() as connection, connection.cursor() as cursor:
            cursor.execute(f"DROP DATABASE {url.rsplit('/', 1)[1]}")

    def kill(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def stop(self) -> None:
        if self.process is not None:
            stop(self.process, 30)
