"""Installations with which nothing is wrong: a home as `init` leaves it, a daemon that beats, a server that beats, and a campaign under way."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa

from mail_pipelines import config, home
from mail_pipelines.commands import context
from mail_pipelines.doctor import central
from mail_pipelines.runbook import Chapter
from tests.dispatch.world import Servers, World, make_world
from tests.parts.processes import wait_for
from tests.runbook.document import chapters
from tests.runbook.operator import Operator, Units


class Daemon:
    """Dagster's daemon, as its storage knows it: it has beaten so many seconds ago."""

    def __init__(self, dagster_home: Path) -> None:
        self._home = dagster_home

    def beat(self, seconds_ago: float = 0) -> None:
        import dagster as dg
        from dagster._daemon.types import DaemonHeartbeat

        with dg.DagsterInstance.from_config(str(self._home)) as instance:
            for kind in instance.get_required_daemon_types():
                instance.add_daemon_heartbeat(DaemonHeartbeat(time.time() - seconds_ago, kind, "a test's", []))

    def wait_for_beats(self, process: subprocess.Popen[bytes]) -> None:
        """Until the daemon that is this process has beaten in all its parts."""
        import dagster as dg

        began = time.time()
        with dg.DagsterInstance.from_config(str(self._home)) as instance:

            def beats() -> bool:
                assert process.poll() is None
                return all(
                    status.last_heartbeat and status.last_heartbeat.timestamp > began for status in instance.get_daemon_statuses().values() if status.required
                )

            wait_for(beats, seconds=180, what="a daemon that beats")


@pytest.fixture(scope="module")
def _template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("template") / "home"
    home.make({"MAIL_PIPELINES_HOME": str(folder)})
    return folder


@pytest.fixture
def daemon(_template: Path, tmp_path: Path) -> Daemon:
    """Of a home that is there, as all commands of this test find it."""
    folder = tmp_path / "home"
    shutil.copytree(_template, folder)
    os.environ |= home.environment(config.load({"MAIL_PIPELINES_HOME": str(folder)}))
    daemon = Daemon(folder / "dagster")
    daemon.beat()
    return daemon


@pytest.fixture
def world(request: pytest.FixtureRequest, engine: sa.Engine, daemon: Daemon, tmp_path: Path) -> Iterator[World]:
    """Recipients of google and microsoft, whom nobody has mailed yet. A test's parameter says how many."""
    os.environ["MAIL_PIPELINES_SERVER__HEARTBEAT_SECONDS"] = "3"
    context.settings.cache_clear()
    recipients = getattr(request, "param", 120)
    yield make_world(engine, tmp_path / "home", recipients=recipients, domains=("google.test", "microsoft.test"), linger_seconds=1)
    context.settings.cache_clear()


@pytest.fixture
def running() -> Iterator[Servers]:
    started = Servers()
    yield started
    started.stop()


@pytest.fixture
def opens(chapter: Chapter) -> Iterator[Callable[..., Operator]]:
    """Opens the runbook at the test's chapter. At the end no block of it may be left."""
    operators = []

    def opened(names: dict[str, str], units: Units | None = None) -> Operator:
        operators.append(Operator(chapters()[chapter], names, units))
        return operators[-1]

    yield opened
    (operator,) = operators
    operator.closes()


def wrong_with_servers() -> list[str]:
    """What `doctor` finds in the central database, of the servers above all. (The whole of it asks Dagster, too, which takes a while.)"""
    return [finding.problem for finding in central.check_central_database(config.load(), is_centre=True)]
