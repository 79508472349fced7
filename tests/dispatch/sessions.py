"""Send sessions as processes of their own, so that they can be killed, stopped and continued like any run."""

from __future__ import annotations

import os
import signal
from multiprocessing.context import ForkServerProcess
from pathlib import Path

from tests.dispatch.world import World
from tests.parts import forks
from tests.parts.clock import HostClock
from tests.parts.processes import wait_for


def _run(environ: dict[str, str], server: str, campaign_id: int, key: str, shard: int, run_id: str, clock: HostClock | None) -> None:
    from mail_pipelines import config
    from mail_pipelines.database.engine import open_engine, reading
    from mail_pipelines.dispatch import servers
    from mail_pipelines.dispatch.files import ServerFolders
    from mail_pipelines.dispatch.session import Session, journal_of

    forks.as_started()
    os.environ.update(environ)
    if clock is not None:
        clock.goes_for_python()
    settings = config.load(environ)
    engine = open_engine(settings.database)
    with reading(engine) as connection:
        info = servers.find(connection, server)
    report = Session(engine, settings, info, campaign_id, key, shard, run_id, journal_of(ServerFolders.of(settings.server, server), info.kind)).run()
    (Path(environ["MAIL_PIPELINES_HOME"]) / f"{run_id}.done").write_text(report.reason)


class SessionProcess:
    """One session of a world's campaign, in its own process, on a host whose clock is `clock`."""

    def __init__(self, world: World, server: str, run_id: str, shard: int = 0, *, clock: HostClock | None = None, **environment: str) -> None:
        environ = {name: value for name, value in os.environ.items() if name.startswith("MAIL_PIPELINES_")} | environment
        self.world, self.run_id = world, run_id
        self.result = world.settings.home / f"{run_id}.done"
        self.process: ForkServerProcess = forks.processes.Process(
            target=_run, args=(environ, server, world.campaign_id, world.campaign_key, shard, run_id, clock), daemon=True
        )
        self.process.start()

    @property
    def pid(self) -> int:
        assert self.process.pid is not None
        return self.process.pid

    def signal(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        self.process.kill()
        self.process.join()

    def stop_at_work(self) -> int:
        """Have it stand still (SIGSTOP) at a moment in which it has claims; returns how many. From then on it neither notices nor ends anything."""

        def stopped() -> int:
            self.signal(signal.SIGSTOP)
            if not (claims := self.world.open_claims(self.run_id)):
                self.signal(signal.SIGCONT)
            return claims

        return wait_for(stopped, what=f"{self.run_id} with a claim")

    def wait(self, seconds: float = 300) -> str:
        """Wait for the end; returns the session's reason."""
        self.process.join(seconds)
        assert self.process.exitcode == 0, f"session ended with {self.process.exitcode}"
        return self.result.read_text()
