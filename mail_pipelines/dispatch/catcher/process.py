"""One catcher as a process: it holds its name, beats, serves SMTP, and ends when told to or when its name is taken."""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path

from mail_pipelines.config import Settings
from mail_pipelines.database.engine import DatabaseUnreachable, open_engine, reading
from mail_pipelines.dispatch import permit, servers
from mail_pipelines.dispatch.catcher.play import DEFAULT_RULES, Play, load_rules
from mail_pipelines.dispatch.catcher.server import Catcher
from mail_pipelines.dispatch.files import DispatchError, ServerFolders, only_one


def run(settings: Settings, key: str, rules: Path = DEFAULT_RULES) -> None:
    """Serve as the server `key` until SIGTERM or SIGINT.

    Raises `AlreadyRunning` or `NameTaken` if another process is this server, after withdrawing all permits in the second case.
    """
    folders = ServerFolders.of(settings.server, key)
    folders.make()
    engine = open_engine(settings.database)
    with reading(engine) as connection:
        info = servers.find(connection, key)
    with only_one(folders.log / "lock", f"server {key}"):
        heartbeat = servers.Heartbeat(engine, key, folders, settings.server.heartbeat_seconds)
        heartbeat.start()
        catcher = Catcher(folders, Play(load_rules(rules)), port=info.port, host=info.host)
        try:
            asyncio.run(_serve(catcher, heartbeat, settings.server.heartbeat_seconds))
        except servers.NameTaken:
            permit.revoke_all(folders.permits)
            raise


async def _serve(catcher: Catcher, heartbeat: servers.Heartbeat, interval_seconds: float) -> None:
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    await catcher.start()
    beating = asyncio.create_task(_beat(heartbeat, interval_seconds))
    stopping, failing = asyncio.create_task(stop.wait()), asyncio.create_task(catcher.failure.wait())
    try:
        await asyncio.wait({beating, stopping, failing}, return_when=asyncio.FIRST_COMPLETED)
        if beating.done():
            beating.result()
        if failing.done():
            raise DispatchError(f"the journal {catcher.folders.journal} cannot be written (is the disk full?): messages in flight are unknown")
    finally:
        for task in (beating, stopping, failing):
            task.cancel()
        await catcher.stop()


async def _beat(heartbeat: servers.Heartbeat, interval_seconds: float) -> None:
    while True:
        await asyncio.sleep(interval_seconds)
        try:
            await asyncio.to_thread(heartbeat.beat)
        except DatabaseUnreachable:
            # The name is kept: without a beat the others see a silent server, and the next beat tells whether it was taken.
            continue
