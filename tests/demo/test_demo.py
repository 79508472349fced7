"""The main job, as `script/demo --exit --json` runs it: everybody once, both servers at work, nobody named in Dagster."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from mail_pipelines.database.engine import create_engine
from mail_pipelines.home import checkout
from tests.e2e.privacy import dagster_files, people_named

pytestmark = [pytest.mark.server, pytest.mark.timeout(600), pytest.mark.xdist_group("platform")]


def test_the_demo_mails_everybody_once_and_names_nobody(tmp_path: Path) -> None:
    home = tmp_path / "home"
    environ = os.environ | {"MAIL_PIPELINES_HOME": str(home)}
    done = subprocess.run([checkout() / "script" / "demo", "--exit", "--json"], env=environ, capture_output=True, text=True, timeout=560)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    result = json.loads(done.stdout.splitlines()[-1])
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
