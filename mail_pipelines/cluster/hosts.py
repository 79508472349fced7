"""The hosts: a centre and dispatch servers, each with a home, keys and folders of its own, and processes started by the commands of their units.

What belongs here: who has which environment, and what runs there. What does not: database and broker (`backing`), what is sent (`campaigns`).
"""

from __future__ import annotations

import datetime as dt
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy.engine import Engine

from mail_pipelines import config, home, up
from mail_pipelines.cluster.backing import CENTRE
from mail_pipelines.config import Settings
from mail_pipelines.database.engine import open_engine
from mail_pipelines.dispatch import accounts, servers
from mail_pipelines.dispatch.files import ServerFolders, replace_file
from mail_pipelines.free_ports import free_port
from mail_pipelines.messages.keyring import derive
from mail_pipelines.resources import server_storage
from mail_pipelines.supervision import Processes

SERVERS = ("mx1", "mx2", "mx3")
# Greylisted recipients are tried again after seconds, not after the quarter of an hour that real destinations want.
_SETTINGS = {
    "MAIL_PIPELINES_SENDING__FIRST_RETRY_SECONDS": "6",
    "MAIL_PIPELINES_SENDING__LAST_RETRY_SECONDS": "6",
    "MAIL_PIPELINES_OPERATION__SENSOR_SECONDS": "2",
    # Nothing of it is in the world's DNS.
    "MAIL_PIPELINES_DNS__BLOCK_LIST_HOURS": "0",
    "MAIL_PIPELINES_OPERATION__UI_PORT": "0",
}
# What a reader may set as well: none of it leads to a database, a folder or a server.
_TAKEN = ("MAIL_PIPELINES_OPERATION__UI_HOST", "MAIL_PIPELINES_OPERATION__UI_PORT")
_START_SECONDS = 120
_PREFIXES = (config.PREFIX, "DAGSTER_")


def neutral(given: Mapping[str, str]) -> dict[str, str]:
    """The reader's environment without an installation of theirs."""
    kept = {name: value for name, value in given.items() if not name.startswith(_PREFIXES) or name in _TAKEN}
    return {**_SETTINGS, **kept}


@dataclass
class Centre:
    """The centre. Its environment is this process's own."""

    settings: Settings
    engine: Engine
    processes: Processes

    @classmethod
    def make(cls, folder: Path, backing: Mapping[str, str], processes: Processes) -> Centre:
        """Its home, keys and all tables."""
        os.environ.update({**backing, "MAIL_PIPELINES_HOME": str(folder), "DAGSTER_HOME": str(folder / "dagster")})
        home.make(production=True)
        settings = config.load()
        return cls(settings, open_engine(settings.database), processes)

    def start_worker(self) -> None:
        self.processes.start("centre-worker", _command("worker", "run"), log=self.log("centre-worker"))

    def start_dagster(self) -> str:
        """Daemon and web server; returns the address of the UI."""
        return up.start_dagster(self.processes, self.settings)

    def log(self, name: str) -> Path:
        return self.settings.home / "log" / f"{name}.log"


@dataclass
class Server:
    """A dispatch server, and the destinations behind it, which nobody else reaches: what they count came from this server."""

    name: str
    port: int
    destination_port: int
    environ: Mapping[str, str]
    settings: Settings

    @classmethod
    def make(cls, name: str, folder: Path, run_folder: Path, backing: Mapping[str, str], centre: Centre) -> Server:
        """Register it at the centre, which gives it its account, and make its home as docs/production.md says."""
        port = free_port()
        servers.register(centre.engine, name, kind="exim", host=up.LOOPBACK, port=port, now=dt.datetime.now(dt.UTC))
        account = accounts.give(centre.engine, name)
        environ = {
            **neutral(os.environ),
            **backing,
            **server_storage.give(centre.engine, centre.settings, account),
            "MAIL_PIPELINES_DATABASE__URL": account.url,
            "MAIL_PIPELINES_DATABASE__PASSWORD": account.password,
            "MAIL_PIPELINES_SERVER": name,
            "MAIL_PIPELINES_HOME": str(folder / "home"),
            "DAGSTER_HOME": str(folder / "home" / "dagster"),
            "MAIL_PIPELINES_BROKER__VERIFY_KEY": centre.settings.broker.verify_key,
            # Exim's own user has to pass, which no home lets it.
            "MAIL_PIPELINES_SERVER__LOG_FOLDER": str(folder / "log"),
            "MAIL_PIPELINES_SERVER__RUN_FOLDER": str(run_folder),
        }
        folder.mkdir()
        keys = folder / "home" / "secrets"
        for private in (keys.parent, keys):
            private.mkdir(mode=0o700)
        # As `mail-pipelines server account` makes it: whoever has this host makes no tokens of another one's mail.
        replace_file(keys / "token_key", derive(centre.settings.token_key(), name).decode("ascii"))
        home.make(environ, production=True)
        return cls(name, port, free_port(), environ, config.load(environ))

    @property
    def destinations(self) -> ServerFolders:
        """Where its destinations keep what has arrived, and their log."""
        return ServerFolders.of(self.settings.server, self._destinations)

    @property
    def _destinations(self) -> str:
        return f"destinations-of-{self.name}"

    @property
    def _worker_log(self) -> Path:
        return self.settings.home / "log" / "worker.log"

    def start(self, processes: Processes) -> None:
        """Exim, the worker, and the destinations; `wait` says when they are up."""
        exim = ("exim", "run", self.name, "--hostname", f"{self.name}.cluster.test", "--destination", f"{up.LOOPBACK}:{self.destination_port}")
        parts = {
            self._destinations: ("catcher", "destinations", self._destinations, "--port", str(self.destination_port)),
            f"exim-of-{self.name}": exim,
        }
        for name, words in parts.items():
            processes.start(name, _command(*words), env=self.environ, log=self.settings.home / "log" / f"{name}.log")
        processes.start(f"worker-of-{self.name}", _command("worker", "run"), env=self.environ, log=self._worker_log)

    def is_up(self) -> bool:
        return up.listens(self.port) and up.listens(self.destination_port) and is_ready(self._worker_log)


def wait(processes: Processes, centre: Centre, fleet: list[Server]) -> None:
    """Until every server and the centre's worker are up. Raises `ProcessError`."""
    for server in fleet:
        processes.wait_until_ready(server.is_up, seconds=_START_SECONDS, what=server.name)
    processes.wait_until_ready(lambda: is_ready(centre.log("centre-worker")), seconds=_START_SECONDS, what=f"the worker of the {CENTRE}")


def is_ready(log: Path) -> bool:
    """Whether a worker says that it takes orders."""
    return " ready." in log.read_text(encoding="utf-8", errors="replace")


def _command(*words: str) -> list[str]:
    return [sys.executable, "-m", "mail_pipelines", *words]
