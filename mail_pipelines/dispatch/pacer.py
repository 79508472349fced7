"""The pacer: one per server and provider, shared by all processes of the server through two kinds of files.

* Rate: GCRA (ITU-T I.371) with no burst. The file holds the earliest time of the next message; whoever finds it past
  takes the turn and moves it on by one interval. Spacing is kept between the very moments of offering, so a delayed
  sender does not catch up by a burst.
* Connections: one slot file per allowed connection, held by a lock, which the kernel frees when a process dies.
"""

from __future__ import annotations

import asyncio
import fcntl
import mmap
import os
import struct
import time
from pathlib import Path

_TIME = struct.Struct("<d")


class Pacer:
    """Turns and connection slots of one provider on one server. `per_second` messages, `connections` at once."""

    def __init__(self, folder: Path, provider: str, *, per_second: float, connections: int) -> None:
        self.interval = 1 / per_second
        self.connections = connections
        self._folder = folder / provider
        self._folder.mkdir(parents=True, exist_ok=True)
        self._clock = os.open(self._folder / "next", os.O_RDWR | os.O_CREAT, 0o600)
        if os.fstat(self._clock).st_size < _TIME.size:
            os.ftruncate(self._clock, _TIME.size)
        # Mapped: a turn then costs two system calls, and a look at the time none.
        self._next = mmap.mmap(self._clock, _TIME.size)
        self._queue = asyncio.Lock()

    def close(self) -> None:
        self._next.close()
        os.close(self._clock)

    def take(self) -> float:
        """Take a turn if one is free and return 0; otherwise the seconds until the next may be free.

        The time is the boot clock, which all processes of a host share and nobody sets.
        """
        fcntl.flock(self._clock, fcntl.LOCK_EX)
        try:
            now = time.clock_gettime(time.CLOCK_BOOTTIME)
            if wait := self._wait(now):
                return wait
            _TIME.pack_into(self._next, 0, now + self.interval)
            return 0.0
        finally:
            fcntl.flock(self._clock, fcntl.LOCK_UN)

    def wait(self) -> float:
        """Seconds until the next turn may be free, of which none is taken."""
        return self._wait(time.clock_gettime(time.CLOCK_BOOTTIME))

    def _wait(self, now: float) -> float:
        earliest: float = _TIME.unpack_from(self._next)[0]
        # A time further ahead than one interval is of an earlier boot or a slower rate: it must not block for ever.
        return earliest - now if now < earliest <= now + max(self.interval, 60) else 0.0

    def is_free(self) -> bool:
        """Whether a turn could be had now."""
        return bool(_TIME.unpack_from(self._next)[0] <= time.clock_gettime(time.CLOCK_BOOTTIME))

    async def turn(self, deadline: float) -> bool:
        """Wait for a turn; false if none came before `deadline` (monotonic seconds)."""
        # Most turns are free, and nobody waits for one.
        if not self._queue.locked() and not self.take():
            return time.monotonic() <= deadline
        async with self._queue:
            while wait := self.take():
                if time.monotonic() + wait > deadline:
                    return False
                await asyncio.sleep(wait)
        return time.monotonic() <= deadline

    def slot(self) -> Slot | None:
        """A connection slot, or None if all are taken. Holding it allows one open connection."""
        for number in range(self.connections):
            descriptor = os.open(self._folder / f"slot-{number}", os.O_RDWR | os.O_CREAT, 0o600)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(descriptor)
                continue
            return Slot(descriptor)
        return None


class Slot:
    """The right to one connection; `free` gives it back."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def free(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
