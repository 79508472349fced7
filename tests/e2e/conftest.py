"""One running installation for all tests of this folder, with external sources that never answer."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator

import pytest

from mail_pipelines.supervision import Processes
from tests.e2e.platform import Platform, make
from tests.parts import web

HANGING = ("crm", "shop", "billing")
_SOURCE = """
name: {name}
kind: rest
connection: {{url: {address}}}
contacts: {{read: {{path: people, records: people}}, map: {{id: external_id, mail: email}}, consent: {{subscribe: never}}}}
"""


@pytest.fixture(scope="package")
def platform(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Platform]:
    before = dict(os.environ)
    for name in list(os.environ):
        if name.startswith(("MAIL_PIPELINES_", "DAGSTER_")):
            del os.environ[name]
    over = threading.Event()

    def hang(asked: web.Asked) -> web.Answer:
        over.wait()
        return web.says(503, None)

    with web.serving(hang) as address, Processes() as processes:
        running = make(tmp_path_factory.mktemp("platform"), processes)
        folder = running.settings.home / "sources"
        folder.mkdir(exist_ok=True)
        for name in HANGING:
            (folder / f"{name}.yaml").write_text(_SOURCE.format(name=name, address=address), encoding="utf-8")
        running.start_dagster()
        yield running
        over.set()
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
