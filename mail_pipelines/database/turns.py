"""Those who write to an SQLite file, one after the other in the order in which they came, whichever processes of this host they are in.

SQLite has whoever waits look again after a while, up to a tenth of a second, and whoever looks at the right moment is next. Who writes often is so again and
again, and on a busy host another one waits longer than any time-out behind transactions of milliseconds.

What belongs here: whose turn it is. What does not: the lock on the database, which stays SQLite's. A turn is a courtesy: who has waited for it too long goes on
without it.
"""

from __future__ import annotations

import fcntl
import os
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager

SUFFIX = "-turn"
# The lock of whoever takes a number: far behind all numbers, each of which is the place of a lock, too.
_DESK = 1 << 62
_COUNTER_BYTES = 8
# Only one looks at each lock, the next in turn, so that looking often costs little.
_FIRST_LOOK_SECONDS, _LOOK_SECONDS = 0.001, 0.02


@contextmanager
def turn(database: str, seconds: float) -> Iterator[None]:
    """Wait until all who came before have had their turn, or so many seconds; the turn is over at the end of the block, or with the process.

    Everybody takes a number and holds a lock on the byte of the file `<database>-turn` at that place; who has the next number waits for that lock.
    """
    try:
        file = os.open(database + SUFFIX, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError:
        # Where no file can be made, SQLite cannot write either, and says so.
        yield
        return
    try:
        end = time.monotonic() + seconds
        if _wait(file, fcntl.F_WRLCK, _DESK, end):
            number = int.from_bytes(os.pread(file, _COUNTER_BYTES, 0), "little") + 1
            os.pwrite(file, number.to_bytes(_COUNTER_BYTES, "little"), 0)
            _lock(file, fcntl.F_WRLCK, number)
            _lock(file, fcntl.F_UNLCK, _DESK)
            _wait(file, fcntl.F_RDLCK, number - 1, end)
        yield
    finally:
        # A process forked meanwhile has the file open as well, and closing it would leave the locks.
        _lock(file, fcntl.F_UNLCK, 0, size=0)
        os.close(file)


def _wait(file: int, kind: int, place: int, end: float) -> bool:
    """Whether the lock was to be had until `end`, in seconds of the monotonic clock."""
    pause = _FIRST_LOOK_SECONDS
    while not _lock(file, kind, place):
        if time.monotonic() >= end:
            return False
        time.sleep(pause)
        pause = min(pause * 1.5, _LOOK_SECONDS)
    return True


def _lock(file: int, kind: int, place: int, *, size: int = 1) -> bool:
    """Whether a lock of the open file (not of the process, which has several threads) is had at once; size 0 is to the end."""
    try:
        fcntl.fcntl(file, fcntl.F_OFD_SETLK, struct.pack("hhqqi4x", kind, os.SEEK_SET, place, size, 0))
    except BlockingIOError:
        return False
    return True
