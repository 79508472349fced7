"""The main job, as `script/demo` runs it until Ctrl-C: everybody once, both servers at work, a CRM in step, nobody named in Dagster."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from mail_pipelines.database.engine import create_engine, reading
from mail_pipelines.database.models import EngagementEvent, SourceContact, SyncOutbox
from mail_pipelines.home import checkout
from mail_pipelines.sources import links, outbox
from tests.e2e.privacy import dagster_files, people_named
from tests.parts.processes import stop, wait_for

pytestmark = [pytest.mark.server, pytest.mark.timeout(1800), pytest.mark.xdist_group("platform")]


def test_the_demo_mails_everybody_once_is_in_step_with_its_crm_and_names_nobody(tmp_path: Path) -> None:
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
            with urllib.request.urlopen(json.loads(line)["crm"]["address"], timeout=60) as page:
                assert "changes twice a second" in page.read().decode()
            pids = dict(words.split() for words in (home / "up.lock").read_text().splitlines())
            assert {"code", "daemon", "web", "catcher-1", "catcher-2", "crm"} < set(pids)
            demo.send_signal(signal.SIGINT)
            assert demo.wait(180) == 0, told.read_text()[-4000:]
            assert [name for name, pid in pids.items() if Path(f"/proc/{pid}").exists()] == []
        finally:
            stop(demo, 120)
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
    engine = create_engine(f"sqlite:///{home / 'central.sqlite3'}")
    the_crm_is_in_step(result["crm"], engine, home)
    files = dagster_files(home)
    assert len(files) > 10
    assert people_named(engine, files) == []


def the_crm_is_in_step(crm: dict[str, Any], engine: sa.Engine, home: Path) -> None:
    """Its people came by the schedule before the audience was made, and it has counted what happened here when the schedule came again."""
    assert crm["ours"] == crm["theirs"]
    changes, ours = crm["changes"], crm["ours"]
    assert all(changes.values())
    assert ours["people"] == 5_000 + changes["new"] - changes["deleted"]
    assert ours["subscribed"] > 4_000
    assert set(ours["events"]) == {"open", "click", "bounce", "unsubscribe", "suppression"}
    assert ours["events"]["open"] > 50
    with sqlite3.connect(home / "dagster/history/runs.db") as connection:
        scheduled = "SELECT run_id FROM run_tags WHERE key = 'dagster/schedule_name' AND value = 'sync_crm'"
        query = f"SELECT pipeline_name, status, run_id IN ({scheduled}) FROM runs WHERE pipeline_name IN ('sync_external', 'build_audience') ORDER BY id"
        runs = connection.execute(query).fetchall()
    assert runs[0] == ("sync_external", "SUCCESS", 1)
    # One may be under way when Ctrl-C comes.
    assert all(status == "SUCCESS" for job, status, _ in runs[:-1])
    # Nobody asks: it is read and told by its schedule, at the beginning and at the end.
    synced = [by_schedule for job, _, by_schedule in runs if job == "sync_external"]
    assert len(synced) >= 2
    assert all(synced)
    # Those it knew from the start: each open by a person here was told, whoever counts them.
    theirs = sa.select(SourceContact.contact_id).where(
        SourceContact.source == "crm", SourceContact.state == links.PRESENT, sa.cast(SourceContact.external_id, sa.Integer) <= 5_000
    )
    events = sa.select(EngagementEvent.id).where(EngagementEvent.kind == "open", ~EngagementEvent.machine, EngagementEvent.contact_id.in_(theirs))
    told = sa.select(SyncOutbox.event_id).where(SyncOutbox.kind == "open", SyncOutbox.state == outbox.TOLD, SyncOutbox.contact_id.in_(theirs))
    with reading(engine) as connection:
        happened = set(connection.execute(events).scalars())
        assert happened == set(connection.execute(told).scalars())
    assert len(happened) > 50
