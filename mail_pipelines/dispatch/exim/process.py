"""Exim as a server process, or as that of several servers of one host: an own instance that is watched, beside the beats that keep their names."""

from __future__ import annotations

import asyncio
import functools
import itertools
import socket
import subprocess
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

from mail_pipelines.config import Settings
from mail_pipelines.dispatch import sources
from mail_pipelines.dispatch.exim import instance, runners
from mail_pipelines.dispatch.files import ServerFolders
from mail_pipelines.dispatch.presence import Presence, speaking_for
from mail_pipelines.dispatch.signals import until_signal

_POLL_SECONDS = 0.2


def run(
    members: Mapping[str, Settings],
    *,
    hostname: str | None = None,
    destinations: tuple[tuple[str, int], ...] = (),
    routes: tuple[tuple[str, tuple[str, int]], ...] = (),
) -> None:
    """Serve as each of the servers `members`, which are told by their names and own settings, until SIGTERM or SIGINT. The Exim is the first one's.

    `destinations` and, for some domains, `routes` take the place of mail exchangers; `hostname` that of the first one's setting.

    Raises `AlreadyRunning` or `NameTaken` if another process is one of these servers, after withdrawing that one's permits in the second case, and
    `EximError` if Exim cannot be started or ends by itself, or if the settings are not those of servers that share it.
    """
    check(members)
    binary = instance.find_binary()
    version = instance.version(binary)
    first = next(iter(members))
    spool = instance.spool_of(ServerFolders.of(members[first].server, first))
    several = len(members) > 1

    def facts(key: str) -> Mapping[str, object]:
        queue = instance.queue_length(spool, f"{key}." if several else "")
        own = members[key].server
        greets = {"hostname": _hostname(members[key], hostname if key == first else None), "addresses": [own.address] if own.address else sources.addresses()}
        return {"version": version, "queue": queue, **greets, **({"worker": first} if several else {})}

    with ExitStack() as stack:
        servers = [stack.enter_context(speaking_for(settings, key, functools.partial(facts, key))) for key, settings in members.items()]
        own, *others = speakers = [_speaker(server, members[server.info.key], hostname if server.info.key == first else None) for server in servers]
        if len({speaker.port for speaker in speakers}) < len(speakers):
            raise instance.EximError(f"{', '.join(members)} share an Exim, which tells them by their ports, and two have the same: see `server list`")
        exim = instance.Instance(
            binary,
            instance.account_for(binary),
            own.folders,
            own.address,
            own.port,
            own.hostname,
            destinations=destinations,
            routes=routes,
            key=own.key,
            interface=own.interface,
            others=tuple(others),
        )
        instance.prepare(exim)
        output = exim.log_folder / "exim.out"
        daemon = instance.start(exim, output)
        try:
            of_servers = [work for server in servers for work in (server.beat(), server.settle(), server.tell())]
            queues = [runners.serve(exim, daemon.pid, speaker) for speaker in exim.speakers]
            asyncio.run(until_signal(watch(daemon, output), *queues, *of_servers))
        finally:
            instance.stop(daemon.pid)
            daemon.wait()


def _speaker(server: Presence, settings: Settings, hostname: str | None) -> instance.Speaker:
    info = server.info
    return instance.Speaker(info.key, server.folders, info.host, info.port, _hostname(settings, hostname), settings.server.address)


def _hostname(settings: Settings, given: str | None) -> str:
    return given or settings.server.hostname or socket.getfqdn()


def check(members: Mapping[str, Settings]) -> None:
    """Whether servers can share an Exim by their settings. Raises `EximError` with what to set where."""
    first = next(iter(members))
    for key, settings in members.items():
        if (settings.server.exim or key) != first:
            place = f"{settings.home}/servers/{key}.toml"
            raise instance.EximError(f'server {key} does not share the Exim of {first}: set exim = "{first}" below [server] in {place}, and nothing at {first}')
        if len(members) > 1 and not settings.server.address:
            raise instance.EximError(
                f"server {key} shares an Exim, so it needs an address of its own: set server.address in {settings.home}/servers/{key}.toml"
            )
    for (one, left), (other, right) in itertools.combinations(members.items(), 2):
        if left.server.address == right.server.address:
            raise instance.EximError(f"servers {one} and {other} both send from {left.server.address}: one server is one sending address")


async def watch(daemon: subprocess.Popen[bytes], output: Path) -> None:
    """Wait for the end of a daemon that nobody asked for: raises `EximError`."""
    while (status := daemon.poll()) is None:
        await asyncio.sleep(_POLL_SECONDS)
    raise instance.EximError(f"Exim ended with status {status}; see {output} and main.log, panic.log beside it")
