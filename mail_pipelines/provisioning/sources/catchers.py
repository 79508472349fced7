"""Catchers of this machine as servers: for the demo, and to try the rest out. Each host is a process, which goes on when its maker has ended."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from mail_pipelines.config import Settings
from mail_pipelines.dispatch.files import ServerFolders, is_locked
from mail_pipelines.provisioning.interfaces import Host, Order, ProvisioningError, Say, Target

_LOOPBACK = "127.0.0.1"
_START_SECONDS = 60
_STOP_SECONDS = 30


@dataclass(frozen=True)
class Catchers:
    """The host of a name is a port of the loopback, which its file remembers; the process is started by `Starter`, when the server is registered."""

    name: str
    folder: Path
    run_folder: Path
    cost_per_hour: float = 0.0
    most: int | None = None
    curve: str = ""
    kind: str = "catcher"
    reused: bool = False

    def reserve(self, taken: Collection[str]) -> str:
        return ""

    def create(self, order: Order) -> Host:
        with socket.create_server((_LOOPBACK, 0)) as probe:
            port = int(probe.getsockname()[1])
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / order.name).write_text(f"{port}\n", encoding="ascii")
        return self._host(order.name, port)

    def find(self, order: Order) -> Host | None:
        try:
            return self._host(order.name, int((self.folder / order.name).read_text(encoding="ascii")))
        except (FileNotFoundError, ValueError):
            return None

    def delete(self, order: Order, host_id: str) -> None:
        stop(self.run_folder, order.name)
        (self.folder / order.name).unlink(missing_ok=True)

    def _host(self, name: str, port: int) -> Host:
        return Host(name, _LOOPBACK, port=port)


@dataclass(frozen=True)
class Starter:
    """Starts the catcher of a server, which takes the place of a play."""

    settings: Settings

    def play(self, target: Target, say: Say) -> None:
        run_folder = Path(self.settings.server.run_folder)
        lock = ServerFolders.of(self.settings.server, target.name).log / "lock"
        if not is_locked(lock):
            log = self.settings.home / "log" / f"{target.name}.log"
            log.parent.mkdir(parents=True, exist_ok=True)
            with log.open("ab") as output:
                process = subprocess.Popen(
                    [sys.executable, "-m", "mail_pipelines", "catcher", "run", target.name],
                    env={**os.environ, "MAIL_PIPELINES_HOME": str(self.settings.home)},
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            place = _process_file(run_folder, target.name)
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_text(f"{process.pid}\n", encoding="ascii")
            say(f"catcher {target.name} started, process {process.pid}; its log is {log}")
        end = time.monotonic() + _START_SECONDS
        while not _listens(target.host):
            if time.monotonic() > end:
                raise ProvisioningError(f"the catcher {target.name} does not listen after {_START_SECONDS} s: see its log in {self.settings.home / 'log'}")
            time.sleep(0.1)

    def remove(self, target: Target, say: Say) -> None:
        """Nothing is left of a process."""


def stop(run_folder: Path, name: str) -> None:
    """End the catcher of this name that a `Starter` has started; one that is gone is ended."""
    place = _process_file(run_folder, name)
    try:
        pid = int(place.read_text(encoding="ascii"))
    except (FileNotFoundError, ValueError):
        return
    end = time.monotonic() + _STOP_SECONDS
    _signal(pid, name, signal.SIGTERM)
    while _is_catcher(pid, name):
        if time.monotonic() > end:
            _signal(pid, name, signal.SIGKILL)
        time.sleep(0.1)
    place.unlink(missing_ok=True)


def stop_all(run_folder: Path) -> None:
    """End all catchers that a `Starter` has started with this folder."""
    for place in list((run_folder / "catchers").glob("*")):
        stop(run_folder, place.name)


def _process_file(run_folder: Path, name: str) -> Path:
    return run_folder / "catchers" / name


def _signal(pid: int, name: str, number: signal.Signals) -> None:
    """It may end by itself meanwhile."""
    if _is_catcher(pid, name):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def _is_catcher(pid: int, name: str) -> bool:
    """Whether this process is still that catcher, and no other that got its number: a zombie has no command line any more."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except (FileNotFoundError, ProcessLookupError):
        return False
    return words[-4:-1] == [b"catcher", b"run", name.encode()]


def _listens(host: Host) -> bool:
    with socket.socket() as probe:
        probe.settimeout(0.5)
        return probe.connect_ex((host.address, host.port)) == 0
