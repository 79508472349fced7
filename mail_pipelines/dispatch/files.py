"""Where a server keeps its files, and the lock by which its processes find each other.

One `ServerFolders` for each server: permits and pacers are volatile (on a real host below /run, so that a reboot
withdraws all permits), the journal and the server's memory are on a real disk.
"""

from __future__ import annotations

import fcntl
import os
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from mail_pipelines.config import ServerSettings
from mail_pipelines.errors import MailPipelinesError

# Whoever only looks whether a lock is held has it for less than this.
_LOOK_SECONDS = 0.05


class DispatchError(MailPipelinesError):
    """Sending cannot go on; nothing has been lost."""


class AlreadyRunning(DispatchError):
    """Another process holds the lock that only one may hold."""


@dataclass(frozen=True)
class ServerFolders:
    """The folders of one server on this host."""

    run: Path
    log: Path
    mail: Path
    # The log folder of the server whose Exim, and so whose journal, it shares.
    shares: Path | None = None

    @classmethod
    def of(cls, settings: ServerSettings, server: str) -> ServerFolders:
        logs = Path(settings.log_folder)
        shares = logs / settings.exim if settings.exim not in ("", server) else None
        return cls(Path(settings.run_folder) / server, logs / server, Path(settings.mail_folder) / server, shares)

    @property
    def permits(self) -> Path:
        return self.run / "permit"

    @property
    def gates(self) -> Path:
        return self.run / "gate"

    @property
    def runners(self) -> Path:
        """The socket at which queue runners are to be had."""
        return self.run / "runners"

    @property
    def pacers(self) -> Path:
        return self.run / "pacer"

    @property
    def sessions(self) -> Path:
        return self.run / "session"

    @property
    def journal(self) -> Path:
        return (self.shares or self.log) / "main.log"

    @property
    def heartbeat(self) -> Path:
        return self.log / "heartbeat"

    @property
    def memory(self) -> Path:
        return self.log / "memory.json"

    @property
    def last_error(self) -> Path:
        return self.log / "last-error.json"

    @property
    def last_checks(self) -> Path:
        return self.log / "last-checks.json"

    def make(self) -> None:
        for folder in (self.permits, self.gates, self.pacers, self.sessions, self.log, self.mail):
            folder.mkdir(parents=True, exist_ok=True)

    def incarnation(self) -> str:
        """The server's identity: made once, kept beside the journal, so that a replaced log disk is another incarnation."""
        path = self.journal.with_name("incarnation")
        try:
            return path.read_text(encoding="ascii").strip()
        except FileNotFoundError:
            path.parent.mkdir(parents=True, exist_ok=True)
            replace_file(path, str(uuid.uuid4()))
            return path.read_text(encoding="ascii").strip()


def boot_id() -> str:
    """The kernel's id of this boot: lines written before a power loss may be missing, so evidence never spans two boots."""
    return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()


def replace_file(path: Path, text: str, *, durable: bool = True) -> None:
    """Write a small file so that a reader sees either the old or the new content; `durable`: after a power loss, too."""
    temporary = ""
    try:
        descriptor, temporary = tempfile.mkstemp(prefix=f"{path.name}.", dir=path.parent)
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            if durable:
                os.fsync(file.fileno())
        Path(temporary).replace(path)
    except OSError as error:
        if temporary:
            Path(temporary).unlink()
        raise DispatchError(f"{path} cannot be written: {error.strerror}") from error


@contextmanager
def only_one(path: Path, what: str) -> Iterator[None]:
    """Hold an exclusive lock on `path` for as long as the block runs; `AlreadyRunning` if another process holds it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        if not _lock(file):
            time.sleep(_LOOK_SECONDS)
            if not _lock(file):
                raise AlreadyRunning(f"{what} is already running (lock {path})")
        yield


def is_locked(path: Path) -> bool:
    """Whether a living process holds the lock on `path`."""
    try:
        with path.open() as file:
            return not _lock(file)
    except FileNotFoundError:
        return False


def _lock(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
