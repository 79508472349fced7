"""One running installation for all tests of this folder."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from mail_pipelines.supervision import Processes
from tests.e2e.platform import Platform, make


@pytest.fixture(scope="package")
def platform(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Platform]:
    before = dict(os.environ)
    for name in list(os.environ):
        if name.startswith(("MAIL_PIPELINES_", "DAGSTER_")):
            del os.environ[name]
    with Processes() as processes:
        running = make(tmp_path_factory.mktemp("platform"), processes)
        running.start_dagster()
        yield running
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(autouse=True)
def _platform_environment(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The shared home instead of each test's own, where the installation is used."""
    if "platform" not in request.fixturenames:
        return
    running: Platform = request.getfixturevalue("platform")
    for name, value in running.environ.items():
        if name.startswith(("MAIL_PIPELINES_", "DAGSTER_")):
            monkeypatch.setenv(name, value)
