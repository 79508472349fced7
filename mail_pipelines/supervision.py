"""Child processes that live and end together: started by us, watched, never restarted, stopped by process id.

What belongs here: starting, watching and stopping. What does not: which processes there are (`up`, the demo).
"""

from __future__ import annotations

import fcntl
import math
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType, TracebackType
from typing import TypeVar

from mail_pipelines.errors import MailPipelinesError

T = TypeVar("T")
POLL_SECONDS, _LONGEST_POLL_SECONDS = 0.1, 1.0
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class ProcessError(MailPipelinesError):
    """The child processes cannot be started or do not work."""


class ChildEnded(ProcessError):
    """A child ended by itself."""


class Stopped(MailPipelinesError):
    """Ctrl-C or SIGTERM asked this process to stop."""


@dataclass(frozen=True)
class Child:
    name: str
    process: subprocess.Popen[bytes]
    log: Path


@dataclass
class Processes:
    """A context manager that stops all its children at its end, last started first.

    While it is open, SIGINT, SIGTERM and SIGHUP do not interrupt the program: the next `check` raises `Stopped`. So call
    `check` (or a method that waits) regularly. Enter it in the main thread.

    `lock` is a file held by this process and by each child: as long as one of them lives, also after a SIGKILL of this
    process, nobody else can enter a `Processes` with the same file.
    """

    lock: Path | None = None
    stop_seconds: float = 20
    _children: list[Child] = field(default_factory=list)
    _asked_to_stop: bool = False
    _handlers: dict[signal.Signals, Callable[[int, FrameType | None], object] | int | None] = field(default_factory=dict)
    _lock_file: int | None = None

    def __enter__(self) -> Processes:
        if self.lock is not None:
            self._lock_file = _acquire(self.lock)
        self._handlers = {number: signal.signal(number, self._heard) for number in SIGNALS}
        return self

    def _heard(self, _number: int, _frame: FrameType | None) -> None:
        # A plain attribute: setting an Event here could wait for ever for the lock that the interrupted code holds.
        self._asked_to_stop = True

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            self.stop_all()
        finally:
            for number, handler in self._handlers.items():
                signal.signal(number, handler)
            if self._lock_file is not None:
                os.close(self._lock_file)

    def start(self, name: str, argv: Sequence[str | Path], *, log: Path, env: Mapping[str, str] | None = None) -> subprocess.Popen[bytes]:
        """Start a child in a session of its own, so that a terminal's Ctrl-C reaches only this process. Output is appended to `log`."""
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as output:
            process = subprocess.Popen(
                [str(word) for word in argv],
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                pass_fds=() if self._lock_file is None else (self._lock_file,),
            )
        self._children.append(Child(name, process, log))
        if self._lock_file is not None:
            os.write(self._lock_file, f"{name} {process.pid}\n".encode())
        return process

    def check(self) -> None:
        """Raise `Stopped` if a signal came, `ChildEnded` (with its name and last words) if a child is gone."""
        if self._asked_to_stop:
            raise Stopped("stopped")
        for child in self._children:
            status = child.process.poll()
            if status is not None:
                how = f"was ended by signal {-status}" if status < 0 else f"ended with status {status}"
                raise ChildEnded(f"{child.name} {how}; the end of {child.log}:\n{_last_lines(child.log)}")

    def wait_until_ready(self, ready: Callable[[], T], *, seconds: float, what: str) -> T:
        """Poll `ready` until it returns something true and return that. Raises `ProcessError` after `seconds`, and what `check` raises."""
        end = time.monotonic() + seconds
        while True:
            self.check()
            asked = time.thread_time()
            if value := ready():
                return value
            if time.monotonic() > end:
                logs = ", ".join(str(child.log) for child in self._children)
                raise ProcessError(f"{what} is not ready after {seconds:.0f} s; see {logs}")
            # What is waited for needs the processor, too: of which looking at it takes a hundredth at most.
            time.sleep(min(max(POLL_SECONDS, (time.thread_time() - asked) * 100), _LONGEST_POLL_SECONDS))

    def wait(self, seconds: float = math.inf) -> None:
        """Wait so long, by default for ever: ends earlier by what `check` raises."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            self.check()
            time.sleep(POLL_SECONDS)

    def terminate(self) -> None:
        """SIGTERM to all children at once. Those that need time for their end take it together, and `stop_all` waits for them."""
        for child in self._children:
            child.process.terminate()

    def stop_all(self) -> None:
        """SIGTERM to each child and then to what it left in its session; SIGKILL to what is not gone after `stop_seconds` in all."""
        end = time.monotonic() + self.stop_seconds
        while self._children:
            process = self._children.pop().process
            if process.poll() is None:
                process.terminate()
                _wait(lambda process=process: process.poll() is not None, end)  # type: ignore[misc]
            # The group keeps its number as long as one member lives, so this can hit no stranger.
            if _signal_group(process.pid, signal.SIGTERM) and not _wait(lambda process=process: not _signal_group(process.pid, 0), end):  # type: ignore[misc]
                _signal_group(process.pid, signal.SIGKILL)
            process.wait()


def _wait(condition: Callable[[], bool], end: float) -> bool:
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(POLL_SECONDS / 4)
    return True


def _signal_group(group: int, number: int) -> bool:
    """Whether the process group still had a member to send the signal to."""
    try:
        os.killpg(group, number)
    except ProcessLookupError:
        return False
    return True


def _acquire(path: Path) -> int:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        held = ", ".join(path.read_text(encoding="utf-8").splitlines())
        raise ProcessError(f"{path} is held by processes of an earlier start (name and process id): {held}; stop that one first") from None
    os.ftruncate(handle, 0)
    os.write(handle, f"parent {os.getpid()}\n".encode())
    return handle


def _last_lines(path: Path, count: int = 12) -> str:
    return "\n".join(path.read_text(encoding="utf-8", errors="replace").splitlines()[-count:])
