"""The shortage, as `script/demo --shortage` shows it: two servers would be late, a third one is made while they send, and goes when all is out."""

from __future__ import annotations

import datetime as dt
import json
import os
import sqlite3
import subprocess
from pathlib import Path

import pytest
import sqlalchemy as sa

from mail_pipelines import config
from mail_pipelines.database.engine import create_engine, reading
from mail_pipelines.database.models import Provision
from mail_pipelines.demo import shortage
from mail_pipelines.dispatch.catcher.play import load_rules
from mail_pipelines.dispatch.files import ServerFolders, is_locked
from mail_pipelines.home import checkout


def test_no_destination_says_later() -> None:
    """In the plan a deferred recipient has its turn in the next quarter of an hour: after this demo's deadline."""
    rules = load_rules(Path(shortage.SETTINGS["MAIL_PIPELINES_SERVER__PLAY"]))
    assert rules
    assert all(rule.greylist_percent == 0 and rule.per_second is None and not any(words.startswith("4") for words in rule.refusals) for rule in rules)


@pytest.mark.server
@pytest.mark.timeout(1800)
@pytest.mark.xdist_group("platform")
def test_a_third_server_is_made_while_two_send_and_keeps_the_deadline(tmp_path: Path) -> None:
    home = tmp_path / "home"
    environ = os.environ | {"MAIL_PIPELINES_HOME": str(home)}
    command = [checkout() / "script" / "demo", "--shortage", "--exit", "--json"]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=1700)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert (result["duplicates"], result["lost"], result["pending"], result["deferred"], result["unknown"]) == (0, 0, 0, 0, 0)
    assert result["delivered"] + result["bounced"] + result["suppressed"] == result["audience"]
    assert sum(result["servers"].values()) == result["delivered"]
    assert set(result["servers"]) == {"catcher-1", "catcher-2", "catcher-3"}

    story = result["shortage"]
    assert (story["server"], story["messages"]) == ("catcher-3", result["servers"]["catcher-3"])
    assert "google: the rate of 2 servers" in story["why"]
    finish_by, without, with_it, finished = (dt.datetime.fromisoformat(story[name]) for name in ("finish_by", "expected_without", "expected_with", "finished"))
    assert with_it < without
    assert finished <= finish_by < without
    assert story["in_time"]

    # It is all Dagster's work, and nothing of the third server is left.
    with sqlite3.connect(home / "dagster/history/runs.db") as connection:
        runs = set(connection.execute("SELECT pipeline_name, status FROM runs").fetchall())
    assert {(job, "SUCCESS") for job in ("plan_capacity", "provision_server", "audit_delivery_logs", "retire_server")} <= runs
    with reading(create_engine(f"sqlite:///{home / 'central.sqlite3'}")) as connection:
        (made,) = connection.execute(sa.select(Provision.key, Provision.state, Provision.proposal_id)).all()
    assert (made.key, made.state) == ("catcher-3", "retired")
    # The sensor's order, and nobody's by hand.
    assert made.proposal_id is not None
    settings = config.load({"MAIL_PIPELINES_HOME": str(home)})
    assert not is_locked(ServerFolders.of(settings.server, "catcher-3").log / "lock")
