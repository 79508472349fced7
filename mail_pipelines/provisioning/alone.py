"""One process at a time works on a server, and its children count: as long as one of them lives, nobody else begins.

A process that is killed leaves a command that creates a host, or a play, at its work. Both hold the lock, too, so that the next one does not create
a second host because the first cannot be found yet, and does not play on a host that is still being played on.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from mail_pipelines.provisioning.interfaces import ProvisioningError

_POLL_SECONDS = 0.1
# Locks held by this process, which its children inherit.
_held: list[int] = []


class Busy(ProvisioningError):
    """Another process works on this server."""


@contextmanager
def alone(path: Path, what: str, *, wait_seconds: float) -> Iterator[None]:
    """Hold the lock `path` for as long as the block runs. Raises `Busy` if another process has it for longer than is waited."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        end = time.monotonic() + wait_seconds
        while not _taken(handle):
            if time.monotonic() > end:
                raise Busy(f"{what} is being worked on by another process (lock {path})")
            time.sleep(_POLL_SECONDS)
        _held.append(handle)
        try:
            yield
        finally:
            _held.remove(handle)
    finally:
        os.close(handle)


def _taken(handle: int) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def locks() -> tuple[int, ...]:
    """The descriptors to pass to a child."""
    return tuple(_held)


def run(argv: Sequence[str], text: str, *, seconds: float) -> subprocess.CompletedProcess[str]:
    """Run a command to its end, with `text` on its standard input. It and what it has started are killed after `seconds` (`subprocess.TimeoutExpired`)."""
    with subprocess.Popen(
        argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, pass_fds=locks(), start_new_session=True
    ) as process:
        try:
            out, error = process.communicate(text, timeout=seconds)
        except BaseException:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            raise
    return subprocess.CompletedProcess(argv, process.returncode, out, error)
