"""Exim as a server process: an own instance that is watched, beside the beats that keep the server's name."""

from __future__ import annotations

import asyncio
import socket
import subprocess
from pathlib import Path

from mail_pipelines.config import Settings
from mail_pipelines.dispatch.exim import instance, runners
from mail_pipelines.dispatch.files import ServerFolders
from mail_pipelines.dispatch.presence import speaking_for, until_signal

_POLL_SECONDS = 0.2


def run(
    settings: Settings,
    key: str,
    *,
    hostname: str | None = None,
    destinations: tuple[tuple[str, int], ...] = (),
    routes: tuple[tuple[str, tuple[str, int]], ...] = (),
) -> None:
    """Serve as the server `key` until SIGTERM or SIGINT; `destinations` and, for some domains, `routes` take the place of mail exchangers.

    Raises `AlreadyRunning` or `NameTaken` if another process is this server, after withdrawing all permits in the second case, and
    `EximError` if Exim cannot be started or ends by itself.
    """
    binary = instance.find_binary()
    version = instance.version(binary)
    spool = instance.spool_of(ServerFolders.of(settings.server, key))
    with speaking_for(settings, key, lambda: {"version": version, "queue": instance.queue_length(spool)}) as server:
        own = instance.Instance(
            binary, instance.account_for(binary), server.folders, server.info.host, server.info.port, hostname or socket.getfqdn(), destinations, routes
        )
        instance.prepare(own)
        output = server.folders.log / "exim.out"
        daemon = instance.start(own, output)
        try:
            asyncio.run(until_signal(watch(daemon, output), runners.serve(own, daemon.pid), server.beat(), server.settle(), server.tell()))
        finally:
            instance.stop(daemon.pid)
            daemon.wait()


async def watch(daemon: subprocess.Popen[bytes], output: Path) -> None:
    """Wait for the end of a daemon that nobody asked for: raises `EximError`."""
    while (status := daemon.poll()) is None:
        await asyncio.sleep(_POLL_SECONDS)
    raise instance.EximError(f"Exim ended with status {status}; see {output} and main.log, panic.log beside it")
