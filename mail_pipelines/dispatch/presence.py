"""A process that speaks for a server: it holds the name, beats, settles, and ends when told to or when its name is taken.

What belongs here: what every kind of server process does. What does not: the mail server itself (`catcher.process`, `exim.process`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from mail_pipelines.config import MetricsSettings, Settings
from mail_pipelines.database.engine import DatabaseUnreachable, open_engine, reading
from mail_pipelines.dispatch import permit, servers, token_keys
from mail_pipelines.dispatch.archive import Shipper
from mail_pipelines.dispatch.files import ServerFolders, only_one
from mail_pipelines.dispatch.session import journal_of
from mail_pipelines.dispatch.settler import Settler
from mail_pipelines.messages.tokens import fingerprint


@dataclass(frozen=True)
class Presence:
    """What a process that speaks for a server has to know of it."""

    info: servers.ServerInfo
    folders: ServerFolders
    heartbeat: servers.Heartbeat
    interval_seconds: float
    settler: Settler
    shipper: Shipper | None
    metrics: MetricsSettings
    facts: Callable[[], Mapping[str, object]]

    async def settle(self) -> None:
        """Settle for ever what sessions leave behind, and ship the log. Each by itself: an archive that hangs holds up no settlement."""
        await asyncio.gather(self.settler.for_ever(), *([self.shipper.for_ever()] if self.shipper is not None else []))

    async def tell(self) -> None:
        """Tell Prometheus for ever, if there is a port for it."""
        from mail_pipelines.metrics.endpoint import tell_for_ever
        from mail_pipelines.metrics.server import ServerMetrics

        await tell_for_ever(ServerMetrics(self), self.metrics)

    async def beat(self) -> None:
        """Beat for ever; raises `NameTaken` when another process has taken the name, after withdrawing all permits."""
        while True:
            await asyncio.sleep(self.interval_seconds)
            try:
                await asyncio.to_thread(self.heartbeat.beat)
            except servers.NameTaken:
                # Now, and not when the mail server has ended: it waits for what is at its destinations.
                permit.revoke_all(self.folders.permits)
                raise
            except DatabaseUnreachable:
                # The name is kept: without a beat the others see a silent server, and the next beat tells whether it was taken.
                continue


@contextmanager
def speaking_for(settings: Settings, key: str, facts: Callable[[], Mapping[str, object]] = dict) -> Iterator[Presence]:
    """Take the name of the registered server `key` for as long as the block runs; each beat tells `facts` too.

    Raises `AlreadyRunning` or `NameTaken` if another process is this server, and `WentBack` if the database is older than the server knows it.
    """
    folders = ServerFolders.of(settings.server, key)
    folders.make()
    engine = open_engine(settings.database)
    with reading(engine) as connection:
        info = servers.find(connection, key)
    interval = settings.server.heartbeat_seconds
    with only_one(folders.log / "lock", f"server {key}"):
        url = settings.server.log_archive
        settler = Settler(engine, settings, info)
        shipper = Shipper(url, key, folders, journal_of(folders, info.kind)) if url else None

        def all_facts() -> Mapping[str, object]:
            return {
                **facts(),
                token_keys.FACT: fingerprint(settings.token_key()),
                "settled": settler.tally.finished_at,
                **(shipper.standing() if shipper is not None else {}),
            }

        heartbeat = servers.Heartbeat(engine, key, folders, interval, all_facts)
        heartbeat.start()
        yield Presence(info, folders, heartbeat, interval, settler, shipper, settings.metrics, facts)
