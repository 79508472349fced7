"""Maildirs whose messages are read once: each is taken from where it arrived to `done` or `bad` when its effect is in the database.

What belongs here: files. A message that was read and not yet moved when the process died is read again, which changes nothing
(`delivery.evidence`); so nothing is lost, and nothing counts twice. What does not: what a message says (`reports`).
"""

from __future__ import annotations

import contextlib
import datetime as dt
import heapq
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

# What nobody has looked at with a mail reader, and what somebody has.
_ARRIVED = ("new", "cur")
DONE = "done"
BAD = "bad"
_WHY = ".why"


@dataclass(frozen=True)
class Waiting:
    """A message to be read; `at` is when it came."""

    maildir: Path
    path: Path
    at: dt.datetime

    def read(self, octets: int) -> bytes:
        """The beginning of the message. Raises `OSError`, also for what is no file."""
        with os.fdopen(os.open(self.path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise OSError("it is no regular file")
            return file.read(octets)

    def finish(self) -> None:
        """Put it to those that were read."""
        self._move(DONE)

    def put_aside(self, reason: str) -> None:
        """Put it to those that could not be read, with the reason beside it."""
        folder = self._move(BAD)
        (folder / f"{self.path.name}{_WHY}").write_text(f"{reason}\n", encoding="utf-8")

    def _move(self, name: str) -> Path:
        folder = self.maildir / name
        folder.mkdir(exist_ok=True)
        # Days are kept by the time of reading.
        with contextlib.suppress(OSError):
            os.utime(self.path, follow_symlinks=False)
        with contextlib.suppress(FileNotFoundError):
            self.path.rename(folder / self.path.name)
        return folder


def waiting(maildir: Path, limit: int) -> list[Waiting]:
    """The messages that wait in a maildir, at most `limit`, the oldest first."""
    return heapq.nsmallest(limit, _arrived(maildir), key=lambda message: (message.at, message.path.name))


def any_waiting(maildir: Path) -> bool:
    return next(_arrived(maildir), None) is not None


def _arrived(maildir: Path) -> Iterator[Waiting]:
    for folder in _ARRIVED:
        with contextlib.suppress(FileNotFoundError), os.scandir(maildir / folder) as entries:
            for entry in entries:
                with contextlib.suppress(FileNotFoundError):
                    at = dt.datetime.fromtimestamp(entry.stat(follow_symlinks=False).st_mtime, dt.UTC)
                    yield Waiting(maildir, Path(entry.path), at)


def read_again(maildir: Path, since: dt.datetime) -> int:
    """Put messages that were read after `since` back to those that wait; how many."""
    count = 0
    with contextlib.suppress(FileNotFoundError), os.scandir(maildir / DONE) as entries:
        for entry in entries:
            if entry.stat(follow_symlinks=False).st_mtime >= since.timestamp():
                Path(entry.path).rename(maildir / _ARRIVED[0] / entry.name)
                count += 1
    return count


def put(maildir: Path, name: str, data: bytes) -> None:
    """Add a message under a name of one's choice, durably; one of this name that waits is replaced."""
    for folder in ("tmp", *_ARRIVED):
        (maildir / folder).mkdir(parents=True, exist_ok=True)
    temporary = maildir / "tmp" / name
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(maildir / "new" / name)
    descriptor = os.open(maildir / "new", os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def prune(maildir: Path, before: dt.datetime) -> int:
    """Delete what was read, or put aside, before a time; returns how many files."""
    deleted = 0
    for folder in (DONE, BAD):
        with contextlib.suppress(FileNotFoundError), os.scandir(maildir / folder) as entries:
            for entry in entries:
                if entry.is_file(follow_symlinks=False) and entry.stat(follow_symlinks=False).st_mtime < before.timestamp():
                    Path(entry.path).unlink(missing_ok=True)
                    deleted += 1
    return deleted
