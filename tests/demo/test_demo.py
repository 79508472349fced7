"""The main job, as `script/demo` runs it until Ctrl-C: everybody once, both servers at work, nobody named in Dagster."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from pathlib import Path

import pytest

from mail_pipelines.database.engine import create_engine
from mail_pipelines.home import checkout
from tests.e2e.privacy import dagster_files, people_named
from tests.parts.processes import stop, wait_for

pytestmark = [pytest.mark.server, pytest.mark.timeout(600), pytest.mark.xdist_group("platform")]


def test_the_demo_mails_everybody_once_and_names_nobody(tmp_path: Path) -> None:
    home = tmp_path / "home"
    environ = os.environ | {"MAIL_PIPELINES_HOME": str(home)}
    told = tmp_path / "told"
    with (
        told.open("w") as file,
        subprocess.Popen([checkout() / "script" / "demo", "--json"], env=environ, stdout=subprocess.PIPE, stderr=file, text=True) as demo,
    ):
        try:
            assert demo.stdout is not None
            line = demo.stdout.readline()
            assert line, told.read_text()[-4000:]
            wait_for(lambda: "Ctrl-C ends it" in told.read_text(), what="the last words")
            demo.send_signal(signal.SIGINT)
            assert demo.wait(60) == 0, told.read_text()[-4000:]
        finally:
            stop(demo, 30)
    result = json.loads(line)
    assert result["contacts"] == 100_000
    assert result["audience"] == pytest.approx(20_000, rel=0.1)
    assert result["matched"] == result["audience"] + result["excluded"]
    parts = ("delivered", "bounced", "deferred", "pending", "suppressed", "expired", "cancelled", "unknown")
    assert sum(result[part] for part in parts) == result["audience"]
    assert (result["duplicates"], result["lost"], result["pending"], result["deferred"]) == (0, 0, 0, 0)
    assert result["bounced"] > 100
    assert set(result["servers"]) == {"catcher-1", "catcher-2"}
    assert all(messages > 0 for messages in result["servers"].values())
    assert sum(result["servers"].values()) == result["delivered"]
    assert result["overlap"] >= 0.8
    assert result["send_seconds"] > 0
    files = dagster_files(home)
    assert len(files) > 10
    assert people_named(create_engine(f"sqlite:///{home / 'central.sqlite3'}"), files) == []
