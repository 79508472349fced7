"""Destinations at a distance, with TLS: what a round trip to another continent makes of sending. Runs as a process of its own.

The distance is that of `distance`, in front of the sink.
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

from mail_pipelines.benchmarks import distance
from mail_pipelines.benchmarks.certificates import contexts
from mail_pipelines.benchmarks.postfix import wait_for_port
from mail_pipelines.free_ports import free_port

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
    async with sink:
        await distance.serve(port, behind, round_trip_seconds)


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


if __name__ == "__main__":
    asyncio.run(serve(int(sys.argv[1]), float(sys.argv[2]), *sys.argv[3:]))
