"""A PostgreSQL server of a test's own: a fresh data folder, a free port, ended by its process id."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import subprocess
import tempfile
from pathlib import Path

import sqlalchemy as sa

from tests.parts.processes import free_port, wait_for

_SECONDS = 120


class PostgreSQL:
    """A running server; `url` is that of its only database."""

    def __init__(self) -> None:
        self.programs = max(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: int(path.parts[-3])).parent
        # In a folder of its own account, for it refuses to be root, and no other account enters the folders of tests.
        self.folder = Path(tempfile.mkdtemp(prefix="mail-pipelines-postgresql-"))
        self.user = "postgres" if os.geteuid() == 0 else None
        if self.user:
            os.chown(self.folder, pwd.getpwnam(self.user).pw_uid, -1)
        data = self.folder / "data"
        made = [self.programs / "initdb", "--pgdata", data, "--username", "tester", "--auth", "trust", "--encoding", "UTF8", "--no-sync"]
        subprocess.run(made, check=True, stdout=subprocess.DEVNULL, user=self.user, cwd=self.folder)
        self.port = free_port()
        self.url = f"postgresql://tester@127.0.0.1:{self.port}/postgres"
        options = ["-p", str(self.port), "-k", self.folder, "-h", "127.0.0.1", "-c", "fsync=off"]
        with (self.folder / "log").open("ab") as log:
            command = [self.programs / "postgres", "-D", data, *options]
            self.process = subprocess.Popen(command, stdout=log, stderr=log, user=self.user, cwd=self.folder, start_new_session=True)
        engine = self.engine()
        wait_for(lambda: self._answers(engine), seconds=_SECONDS, what=lambda: (self.folder / "log").read_text())
        engine.dispose()

    def _answers(self, engine: sa.Engine) -> bool:
        assert self.process.poll() is None, (self.folder / "log").read_text()
        try:
            engine.connect().close()
        except sa.exc.DBAPIError:
            return False
        return True

    def engine(self) -> sa.Engine:
        return sa.create_engine(self.url.replace("postgresql:", "postgresql+pg8000:"))

    def stop(self) -> None:
        # Not by SIGTERM, with which it waits until everybody has left.
        self.process.send_signal(signal.SIGINT)
        try:
            self.process.wait(_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        shutil.rmtree(self.folder)
