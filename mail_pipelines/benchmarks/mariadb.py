"""A MariaDB server of our own for measurements, trials and tests: a fresh data folder, a free port, no system service touched."""

from __future__ import annotations

import getpass
import itertools
import os
import shutil
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path

import pymysql

from mail_pipelines.errors import MailPipelinesError
from mail_pipelines.free_ports import free_port

_START_SECONDS = 180
_STOP_SECONDS = 30
_numbers = itertools.count(1)


@dataclass
class MariaDB:
    """A running server; `database()` makes an empty schema and returns its SQLAlchemy URL."""

    folder: Path
    port: int = field(default_factory=free_port)
    process: subprocess.Popen[bytes] | None = None
    options: tuple[str, ...] = ()

    def start(self) -> MariaDB:
        server = shutil.which("mariadbd", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
        if server is None:
            raise MailPipelinesError("MariaDB is not installed: run script/test once, or install the package mariadb-server-core")
        data, temporary = self.folder / "data", self.folder / "tmp"
        # Not /tmp: whoever starts there deletes the temporary tables of all that run.
        temporary.mkdir(parents=True, exist_ok=True)
        user = getpass.getuser()
        if not data.exists():
            options = ["--auth-root-authentication-method=normal", "--skip-test-db", "--skip-log-bin", f"--user={user}", f"--tmpdir={temporary}"]
            made = subprocess.run(["mariadb-install-db", f"--datadir={data}", *options], check=False, capture_output=True, text=True)
            if made.returncode:
                raise MailPipelinesError(f"no database could be made in {data}: {(made.stdout + made.stderr)[-2000:]}")
        self.process = subprocess.Popen(
            [
                server,
                "--no-defaults",
                f"--datadir={data}",
                f"--tmpdir={temporary}",
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
            # A terminal's Ctrl-C is for whoever started it.
            start_new_session=True,
        )
        end = time.monotonic() + _START_SECONDS
        while not self._answers():
            if time.monotonic() > end:
                raise MailPipelinesError(f"MariaDB does not answer on port {self.port}; see {self.folder / 'log'}")
            time.sleep(0.05)
        return self

    def _answers(self) -> bool:
        assert self.process is not None
        if self.process.poll() is not None:
            raise MailPipelinesError(f"MariaDB did not start: {(self.folder / 'log').read_text(errors='replace')[-2000:]}")
        try:
            self.connect().close()
        except pymysql.err.OperationalError:
            return False
        return True

    def connect(self, database: str | None = None) -> pymysql.Connection:
        # Getting ready for TLS would take most of its time.
        return pymysql.connect(host="127.0.0.1", port=self.port, user="root", database=database, autocommit=True, ssl_disabled=True)

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
        """End the server by its process id, and wait for it."""
        if self.process is None or self.process.poll() is not None:
            return
        self.process.terminate()
        try:
            self.process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.kill()
