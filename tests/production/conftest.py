"""One fleet for all tests of this folder, for each broker."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import dagster as dg
import pytest

from mail_pipelines.supervision import Processes
from tests.e2e.platform import make
from tests.parts.processes import wait_for
from tests.production.fleet import CONTACTS, SERVERS, Fleet, dagster_yaml


def _filesystem(folder: Path) -> dict[str, str]:
    """A broker of files, and both databases embedded."""
    dagster_yaml(folder / "home", embedded=True)
    results = folder / "results"
    results.mkdir()
    return {"MAIL_PIPELINES_BROKER__URL": f"filesystem://{folder}/broker", "MAIL_PIPELINES_BROKER__RESULTS": f"file://{results}"}


BROKERS = {"filesystem": _filesystem}


@pytest.fixture(scope="package", params=BROKERS)
def fleet(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    before = dict(os.environ)
    for name in list(os.environ):
        if name.startswith(("MAIL_PIPELINES_", "DAGSTER_")):
            del os.environ[name]
    folder = tmp_path_factory.mktemp(request.param)
    with ExitStack() as stack:
        processes = stack.enter_context(Processes())
        os.environ.update(BROKERS[request.param](folder))
        os.environ["MAIL_PIPELINES_SENDING__ALLOW_UNVERIFIED"] = "true"
        platform = make(folder / "home", processes, production=True, contacts=CONTACTS)
        os.environ.update({name: value for name, value in platform.environ.items() if name.startswith(("MAIL_PIPELINES_", "DAGSTER_"))})
        instance = stack.enter_context(dg.DagsterInstance.from_config(str(platform.settings.dagster_home)))
        from mail_pipelines.resources import tasks

        running = Fleet(platform, instance, tasks.make_app(platform.settings))
        for name in SERVERS:
            running.start_worker(f"worker of {name}", name)
        running.start_worker("worker of the centre", None)
        for name in (*SERVERS, "the centre"):
            wait_for(lambda name=name: " ready." in running.log(f"worker of {name}").read_text(), seconds=60, what=f"the worker of {name}")  # type: ignore[misc]
        platform.start_dagster()
        yield running
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(autouse=True)
def _fleet_environment(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fleet's home instead of each test's own."""
    for name, value in fleet.platform.environ.items():
        if name.startswith(("MAIL_PIPELINES_", "DAGSTER_")):
            monkeypatch.setenv(name, value)
