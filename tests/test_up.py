"""`mail-pipelines up` with the real web server, daemon and catchers."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from mail_pipelines import config, home
from mail_pipelines.database.engine import open_engine, reading
from mail_pipelines.dispatch import servers
from mail_pipelines.doctor import examination
from tests.parts.processes import stop, wait_for

pytestmark = [pytest.mark.server, pytest.mark.xdist_group("platform")]
COMMAND = [sys.executable, "-m", "mail_pipelines", "up"]


@pytest.fixture
def settings(monkeypatch: pytest.MonkeyPatch) -> config.Settings:
    monkeypatch.setenv("MAIL_PIPELINES_OPERATION__UI_PORT", "0")
    home.make()
    settings = config.load()
    monkeypatch.setenv("DAGSTER_HOME", str(settings.dagster_home))
    return settings


@pytest.fixture
def running(settings: config.Settings) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The process of `up`, once it has printed the UI's address, and that address."""
    with subprocess.Popen(COMMAND, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stderr is not None
            line = process.stdout.readline()
            assert line.startswith("Dagster UI: "), process.stderr.read()
            yield process, line.split()[2]
        finally:
            stop(process, 120)


def _started(settings: config.Settings) -> dict[str, int]:
    lines = (settings.home / "up.lock").read_text().splitlines()
    return {name: int(pid) for name, pid in (line.split() for line in lines)}


def _has_open(pid: int, file: Path) -> bool:
    return file in [opened.resolve() for opened in Path(f"/proc/{pid}/fd").iterdir()]


def test_everything_runs_once_answers_and_ends_with_a_child_that_dies(running: tuple[subprocess.Popen[str], str], settings: config.Settings) -> None:
    process, address = running
    with urllib.request.urlopen(f"{address}/server_info") as reply:
        assert b"dagster_webserver" in reply.read()
    pids = _started(settings)
    assert set(pids) == {"parent", "code", "daemon", "web", *settings.server.catchers}
    ticks = settings.dagster_home / "schedules/schedules.db"
    wait_for(lambda: all(_has_open(pids[name], ticks) for name in ("daemon", "web")), seconds=180, what="connections that are kept")
    wait_for(lambda: not [finding for finding in examination.examine() if finding.check in ("daemon", "servers")], seconds=180, what="a clean doctor")
    with reading(open_engine(settings.database)) as connection:
        assert {server.key for server in servers.all_servers(connection)} == set(settings.server.catchers)

    second = subprocess.run(COMMAND, capture_output=True, text=True)
    assert second.returncode == 1
    assert "is held by processes of an earlier start" in second.stderr

    os.kill(pids["daemon"], signal.SIGKILL)
    assert process.stderr is not None
    assert "daemon was ended by signal 9" in process.stderr.read()
    assert process.wait(180) == 1
    assert [name for name, pid in pids.items() if Path(f"/proc/{pid}").exists()] == []


def test_ctrl_c_ends_it_while_it_starts_too(settings: config.Settings) -> None:
    """When all runs it does so to the demo, which is the same processes (`tests/demo/test_demo.py`)."""
    with subprocess.Popen(COMMAND, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            wait_for(lambda: (settings.home / "up.lock").exists() and "code" in _started(settings), seconds=180, what="the code server's start")
            pids = _started(settings)
            process.send_signal(signal.SIGINT)
            told = process.communicate(timeout=180)
        finally:
            stop(process, 120)
    assert (process.returncode, told) == (0, ("stopped\n", ""))
    assert [name for name, pid in pids.items() if Path(f"/proc/{pid}").exists()] == []


def test_a_taken_port_is_named(settings: config.Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        monkeypatch.setenv("MAIL_PIPELINES_OPERATION__UI_PORT", str(port))
        result = subprocess.run(COMMAND, capture_output=True, text=True)
    assert result.returncode == 1
    assert f"the UI cannot listen on 127.0.0.1 port {port}: Address already in use; set operation.ui_host and operation.ui_port" in result.stderr
