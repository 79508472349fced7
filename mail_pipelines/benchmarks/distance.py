"""A path to somewhere far away: a proxy on this host. Runs as a process of its own, or within one that plays what is there.

Whatever passes is held for half a round trip, and what a server says first for two whole ones, since a connection at that distance takes one to be made before
the server can speak. A lost segment holds up what follows it in its connection until it has been sent again. It needs no root and no kernel module, and counts
every round trip that a real path would cost; what it leaves out is the slow start of TCP, and that a loss narrows its window.
"""

from __future__ import annotations

import asyncio
import random
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from mail_pipelines.benchmarks.postfix import wait_for_port
from mail_pipelines.free_ports import free_port

_SEGMENT_BYTES = 1448
# Linux waits no less for an acknowledgement, beside the round trip.
_RETRANSMIT_SECONDS = 0.2


@contextmanager
def path(behind: int, round_trip_seconds: float, loss: float) -> Iterator[int]:
    """A port of 127.0.0.1 from which the port `behind` is so far away; `loss` is the share of segments that have to be sent again."""
    port = free_port()
    process = subprocess.Popen([sys.executable, "-m", __name__, str(port), str(behind), str(round_trip_seconds), str(loss)])
    try:
        wait_for_port(port, process)
        yield port
    finally:
        process.kill()
        process.wait()


async def serve(port: int, behind: int, round_trip_seconds: float, loss: float = 0.0) -> None:
    """Listen until cancelled."""
    losses = _Losses(loss, _RETRANSMIT_SECONDS + round_trip_seconds)
    loop = asyncio.get_running_loop()
    async with await loop.create_server(lambda: _Near(behind, round_trip_seconds, losses), "127.0.0.1", port, backlog=1024) as proxy:
        await proxy.serve_forever()


class _Losses:
    """Which segments are lost, the same ones in each run; each costs `seconds`."""

    def __init__(self, share: float, seconds: float) -> None:
        self.seconds = seconds
        self._share = share
        self._draw = random.Random(1)

    def hit(self, octets: int) -> bool:
        return self._share > 0 and any(self._draw.random() < self._share for _ in range(0, octets, _SEGMENT_BYTES))


class _End(asyncio.Protocol):
    """One end of the path: what comes in goes out at the other end, later and in order."""

    def __init__(self, seconds: float, losses: _Losses) -> None:
        self._seconds = seconds
        self._losses = losses
        self._loop = asyncio.get_running_loop()
        self._last = 0.0
        self.transport: asyncio.Transport | None = None
        self.other: _End | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        if self._losses.hit(len(data)):
            # What follows waits for it, since TCP delivers in order.
            self._last = max(self._last, self._loop.time()) + self._losses.seconds
        self._later(self._put, data)

    def connection_lost(self, error: Exception | None) -> None:
        self._later(self._end)

    def _later(self, call: object, *arguments: object) -> None:
        # Never before what came earlier.
        self._last = max(self._last + 1e-6, self._loop.time() + self._seconds)
        self._loop.call_at(self._last, call, *arguments)  # type: ignore[arg-type]

    def _put(self, data: bytes) -> None:
        if self.other is not None and self.other.transport is not None and not self.other.transport.is_closing():
            self.other.transport.write(data)

    def _end(self) -> None:
        if self.other is not None and self.other.transport is not None:
            self.other.transport.close()


class _Near(_End):
    """The end towards the client."""

    def __init__(self, behind: int, round_trip_seconds: float, losses: _Losses) -> None:
        super().__init__(round_trip_seconds / 2, losses)
        self._behind = behind
        self._round_trip = round_trip_seconds

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._connecting = self._loop.create_task(self._connect())

    async def _connect(self) -> None:
        far = _End(self._round_trip / 2, self._losses)
        far.other, self.other = self, far
        # The greeting: a round trip for the connection, and half of one each for the client's last packet of it and the greeting itself.
        far._last = self._loop.time() + 2 * self._round_trip
        await self._loop.create_connection(lambda: far, "127.0.0.1", self._behind)


if __name__ == "__main__":
    asyncio.run(serve(int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]), float(sys.argv[4])))
