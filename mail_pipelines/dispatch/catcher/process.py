"""One catcher as a process: a dispatch server, or only the destinations behind real ones."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from pathlib import Path

from mail_pipelines.config import Settings
from mail_pipelines.dispatch.catcher.play import DEFAULT_RULES, Play, load_rules
from mail_pipelines.dispatch.catcher.server import Catcher
from mail_pipelines.dispatch.files import DispatchError, ServerFolders, only_one
from mail_pipelines.dispatch.signals import until_signal
from mail_pipelines.imports import uncollected


def run(settings: Settings, key: str, rules: Path | None = None) -> None:
    """Serve as the server `key` until SIGTERM or SIGINT; without `rules` the destinations are played by those of `server.play`.

    Raises `AlreadyRunning` or `NameTaken` if another process is this server, after withdrawing all permits in the second case.
    """
    # Only here: who plays destinations is nobody in the database, and would load all of it.
    with uncollected():
        from mail_pipelines.dispatch.presence import speaking_for

    with speaking_for(settings, key) as server:
        catcher = Catcher(server.folders, play_of(settings, rules), port=server.info.port, host=server.info.host)
        asyncio.run(_serve(catcher, server.beat(), server.settle(), server.tell()))


def run_destinations(settings: Settings, name: str, port: int, rules: Path | None = None) -> None:
    """Play the destinations of real mail servers on `port` of the loopback until SIGTERM or SIGINT; what arrives is kept under `name`."""
    folders = ServerFolders.of(settings.server, name)
    folders.make()
    with only_one(folders.log / "lock", f"catcher {name}"):
        asyncio.run(_serve(Catcher(folders, play_of(settings, rules), port=port, fenced=False)))


def play_of(settings: Settings, rules: Path | None = None) -> Play:
    """The destinations as `rules` say, else as `server.play` does. Raises `DispatchError` for a file that cannot be used."""
    return Play(load_rules(rules or Path(settings.server.play or DEFAULT_RULES)))


async def _serve(catcher: Catcher, *beside: Coroutine[None, None, None]) -> None:
    await catcher.start()
    try:
        await until_signal(_failure(catcher), *beside)
    finally:
        await catcher.stop()


async def _failure(catcher: Catcher) -> None:
    await catcher.failure.wait()
    raise DispatchError(f"the journal {catcher.folders.journal} cannot be written (is the disk full?): messages in flight are unknown")
