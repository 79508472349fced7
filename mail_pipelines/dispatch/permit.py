"""Permits: the fence every message of a claim passes at its last gate, on the dispatch server itself.

A permit is a file `c<claim>.<expiry>` (expiry in epoch seconds) that its sender keeps locked. The sender greets the
mail server with that name; the mail server refuses each recipient and each body whose permit is not there. Unlinking
the file therefore stops a claim at once, even one whose sender is stopped, swapped out or cut off from the database.

The mail server writes its INTENT line *before* it looks at the permit. Whoever withdraws a permit and then reads the
journal sees either the INTENT of a message that may have gone out, or knows that none will: a message whose INTENT
comes later finds no permit. Looking first would leave a gap between the look and the line.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from mail_pipelines.dispatch.files import DispatchError


@dataclass
class Permit:
    """A permit held by this process. `name` is what the sender says in EHLO.

    It ends in two steps: `withdraw` closes the gate but keeps the lock under another name, so that nobody takes the claim
    for abandoned while its sender reads the journal and records; `release` gives up the lock.
    """

    path: Path
    file: IO[str]

    @property
    def name(self) -> str:
        return self.path.name

    def withdraw(self) -> None:
        with contextlib.suppress(FileNotFoundError):
            self.path.rename(self._withdrawn)

    def release(self) -> None:
        self.path.unlink(missing_ok=True)
        self._withdrawn.unlink(missing_ok=True)
        self.file.close()

    @property
    def _withdrawn(self) -> Path:
        return self.path.with_name(f"w{self.path.name.partition('.')[0][1:]}")


def grant(folder: Path, claim_id: int, *, seconds: float) -> Permit:
    """Create and lock the permit of a claim for so many seconds from now."""
    path = folder / f"c{claim_id}.{int(time.time() + seconds) + 1}"
    file = path.open("x")
    fcntl.flock(file, fcntl.LOCK_EX)
    file.write(str(os.getpid()))
    file.flush()
    return Permit(path, file)


def is_valid(folder: Path, name: str) -> bool:
    """What the mail server asks: does this permit stand, and has it not run out?"""
    prefix, _, expiry = name.partition(".")
    if not (prefix.startswith("c") and prefix[1:].isdigit() and expiry.isdigit()):
        return False
    return int(expiry) > time.time() and (folder / name).exists()


def revoke(folder: Path, claim_id: int, *, seconds: float = 10) -> None:
    """Withdraw a claim's permit from whoever holds it, and end the holder.

    Raises `DispatchError` if the holder has not let go of the lock in time; the permit is withdrawn all the same.
    """
    for path in _files(folder, claim_id):
        try:
            file = path.open()
        except FileNotFoundError:
            continue
        with file:
            path.unlink(missing_ok=True)
            if not _lock(file, 0):
                _kill(file.read(), seconds)
                if not _lock(file, seconds):
                    raise DispatchError(f"the sender of claim {claim_id} did not end within {seconds} s")


def revoke_all(folder: Path) -> int:
    """Withdraw every permit of this server; their holders are left to end by themselves. Returns how many there were."""
    count = 0
    for path in folder.glob("c*"):
        path.unlink(missing_ok=True)
        count += 1
    return count


def is_held(folder: Path, claim_id: int) -> bool:
    """Whether a living process holds the permit of this claim, or has withdrawn it and is recording."""
    for path in _files(folder, claim_id):
        try:
            with path.open() as file:
                if not _lock(file, 0):
                    return True
        except FileNotFoundError:
            continue
    return False


def _files(folder: Path, claim_id: int) -> list[Path]:
    """The permit of a claim under either of its names."""
    return [*folder.glob(f"c{claim_id}.*"), folder / f"w{claim_id}"]


def _lock(file: IO[str], seconds: float) -> bool:
    end = time.monotonic() + seconds
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() >= end:
                return False
            time.sleep(0.01)


def _kill(pid_text: str, seconds: float) -> None:
    """SIGKILL the process named in the permit and wait until it is gone. A stopped process dies too."""
    if not pid_text.isdigit() or int(pid_text) == os.getpid():
        return
    try:
        descriptor = os.pidfd_open(int(pid_text))
    except ProcessLookupError:
        return
    try:
        signal.pidfd_send_signal(descriptor, signal.SIGKILL)
        select.select([descriptor], [], [], seconds)
    finally:
        os.close(descriptor)
