"""One fleet for all tests of this folder, for each broker: on RabbitMQ a whole one, on a broker of files its workers."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack

import dagster as dg
import pytest

from mail_pipelines.config import OperationSettings
from mail_pipelines.resources import tasks
from mail_pipelines.supervision import Processes
from tests.e2e.platform import make
from tests.production.backing import BACKINGS
from tests.production.fleet import CONTACTS, SERVERS, Fleet
from tests.production.workers import Workers


@pytest.fixture(scope="package", params=BACKINGS)
def fleet(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    before = dict(os.environ)
    for name in list(os.environ):
        if name.startswith(("MAIL_PIPELINES_", "DAGSTER_")):
            del os.environ[name]
    folder = tmp_path_factory.mktemp(request.param)
    with ExitStack() as stack:
        backing = BACKINGS[request.param](folder, stack)
        processes = stack.enter_context(Processes())
        os.environ.update(backing.environ)
        os.environ["MAIL_PIPELINES_SENDING__ALLOW_UNVERIFIED"] = "true"
        platform = make(folder / "home", processes, production=True, contacts=CONTACTS)
        different = {
            # As often as in production: the freeze of a campaign brings them up to date, and nothing else here reads them.
            "MAIL_PIPELINES_OPERATION__SNAPSHOT_CRON": OperationSettings().snapshot_cron,
            # Runs of a silent server are given up: a busy machine makes none silent.
            "MAIL_PIPELINES_SERVER__HEARTBEAT_SECONDS": "20",
        }
        platform.environ = {**platform.environ, **different}
        os.environ.update({name: value for name, value in platform.environ.items() if name.startswith(("MAIL_PIPELINES_", "DAGSTER_"))})
        instance = stack.enter_context(dg.DagsterInstance.from_config(str(platform.settings.dagster_home)))
        whole = backing.database is not None
        running = (Fleet if whole else Workers)(platform, instance, tasks.make_app(platform.settings), backing)
        running.start_worker("worker of the centre", None)
        backing.give_accounts(platform.engine)
        for name in SERVERS:
            if whole:
                running.restart_catcher(name)
            running.start_worker(f"worker of {name}", name)
        if whole:
            platform.start_dagster()
        for name in ("the centre", *SERVERS):
            running.wait_for_worker(f"worker of {name}")
        # Tests that want no fleet are of this process, too; those that do get its environment back.
        os.environ.clear()
        os.environ.update(before)
        yield running
        processes.terminate()


@pytest.fixture(autouse=True)
def _fleet_environment(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fleet's home instead of each test's own, where there is a fleet."""
    if "fleet" not in request.fixturenames:
        return
    for name, value in request.getfixturevalue("fleet").platform.environ.items():
        if name.startswith(("MAIL_PIPELINES_", "DAGSTER_")):
            monkeypatch.setenv(name, value)
