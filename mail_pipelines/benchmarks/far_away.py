"""Destinations at a distance, with TLS: what a round trip to another continent makes of sending. Runs as a process of its own.

The distance is a proxy in front of the sink: whatever passes is held for half a round trip, and a greeting for two whole ones, since a
connection at that distance takes one to be made before the server can speak. It needs no root and no kernel module, and counts every
round trip that a real path would cost; what it leaves out is loss and the slow start of TCP.
"""

from __future__ import annotations

import asyncio
import ssl
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mail_pipelines.benchmarks.certificates import contexts
from mail_pipelines.benchmarks.postfix import free_port, wait_for_port

_ACCEPTED = b"250 2.0.0 Ok\r\n"


@contextmanager
def destinations(round_trip_seconds: float, *, pipelining: bool = False) -> Iterator[tuple[int, int]]:
    """Destinations that take everything, so far away: (port on 127.0.0.1, process id). With `pipelining` they say that they take commands together."""
    port = free_port()
    process = subprocess.Popen([sys.executable, "-m", __name__, str(port), str(round_trip_seconds), *(["PIPELINING"] if pipelining else [])])
    try:
        wait_for_port(port, process)
        yield port, process.pid
    finally:
        # Not SIGTERM: where this program was started with SIGINT ignored, Dagster has made SIGTERM the same, and children inherit that.
        process.kill()
        process.wait()


async def serve(port: int, round_trip_seconds: float, *extensions: str) -> None:
    """Listen until cancelled. `extensions` of SMTP are named in the reply to EHLO."""
    named = "".join(f"250-{extension}\r\n" for extension in extensions).encode("ascii")
    with tempfile.TemporaryDirectory(prefix="mail-pipelines-") as folder:
        context, _ = contexts(Path(folder))
    sink = await asyncio.start_server(lambda reader, writer: _talk(reader, writer, context, named), "127.0.0.1", 0, backlog=1024)
    behind = sink.sockets[0].getsockname()[1]
    loop = asyncio.get_running_loop()
    proxy = await loop.create_server(lambda: _Near(behind, round_trip_seconds), "127.0.0.1", port, backlog=1024)
    async with sink, proxy:
        await proxy.serve_forever()


async def _talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, context: ssl.SSLContext, extensions: bytes) -> None:
    """A conversation with STARTTLS; without PIPELINING among the extensions one command is one round trip."""
    try:
        writer.write(b"220 far.example.test ESMTP\r\n")
        greeting = b"250-far.example.test\r\n250-STARTTLS\r\n250 8BITMIME\r\n"
        while line := await reader.readline():
            match line[:4].upper():
                case b"EHLO":
                    writer.write(greeting)
                case b"STAR":
                    writer.write(b"220 2.0.0 Go on\r\n")
                    await writer.start_tls(context)
                    greeting = b"250-far.example.test\r\n" + extensions + b"250 8BITMIME\r\n"
                case b"DATA":
                    writer.write(b"354 Go on\r\n")
                    await reader.readuntil(b"\r\n.\r\n")
                    writer.write(_ACCEPTED)
                case b"QUIT":
                    writer.write(b"221 2.0.0 Bye\r\n")
                    return
                case _:
                    writer.write(_ACCEPTED)
    except (ConnectionError, asyncio.IncompleteReadError, ssl.SSLError):
        return
    finally:
        writer.close()


class _Held(asyncio.Protocol):
    """One end of the proxy: what comes in goes out at the other end, later and in order."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._loop = asyncio.get_running_loop()
        self._last = 0.0
        self.transport: asyncio.Transport | None = None
        self.other: _Held | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def data_received(self, data: bytes) -> None:
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


class _Near(_Held):
    """The end towards the sender."""

    def __init__(self, behind: int, round_trip_seconds: float) -> None:
        super().__init__(round_trip_seconds / 2)
        self._behind = behind
        self._round_trip = round_trip_seconds

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._connecting = self._loop.create_task(self._connect())

    async def _connect(self) -> None:
        far = _Held(self._round_trip / 2)
        far.other, self.other = self, far
        # The greeting: a round trip for the connection, and half of one each for the client's last packet of it and the greeting itself.
        far._last = self._loop.time() + 2 * self._round_trip
        await self._loop.create_connection(lambda: far, "127.0.0.1", self._behind)


if __name__ == "__main__":
    asyncio.run(serve(int(sys.argv[1]), float(sys.argv[2]), *sys.argv[3:]))
