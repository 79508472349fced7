"""A real daemon, no click: campaigns go out on time, backfills repeat nothing, kills lose nothing, nobody's data is in Dagster."""

from __future__ import annotations

import contextlib
import datetime as dt
import os
import sqlite3
import subprocess
from pathlib import Path

import pytest
import sqlalchemy as sa

from mail_pipelines.database.engine import reading
from mail_pipelines.database.models import Claim, Delivery, Server, State
from tests.e2e.conftest import HANGING
from tests.e2e.platform import Platform
from tests.e2e.privacy import dagster_files, people_named
from tests.parts.processes import wait_for

pytestmark = [pytest.mark.server, pytest.mark.timeout(1200), pytest.mark.xdist_group("platform")]

TERMINATE = "mutation($run: String!) { terminateRun(runId: $run) { __typename } }"
LAUNCH = """
mutation($source: String!) {
  launchRun(executionParams: {
    selector: {
      repositoryLocationName: "mail_pipelines", repositoryName: "__repository__", pipelineName: "sync_external", assetSelection: [{path: [$source, "contacts"]}]
    }
    mode: "default"
  }) { __typename ... on LaunchRunSuccess { run { runId } } ... on PythonError { message } }
}
"""
REEXECUTE = """
mutation($run: String!) {
  launchRunReexecution(reexecutionParams: {parentRunId: $run, strategy: ALL_STEPS}) { ... on LaunchRunSuccess { run { runId } } }
}
"""


def runs(platform: Platform) -> list[tuple[str, str, str | None]]:
    """(job, status, partition) of all runs, from Dagster's own storage."""
    with sqlite3.connect(platform.settings.dagster_home / "history" / "runs.db") as connection:
        return connection.execute("SELECT pipeline_name, status, partition FROM runs ORDER BY id").fetchall()


def materialized(platform: Platform, asset: str) -> set[str]:
    query = "query($key: AssetKeyInput!) { assetNodeOrError(assetKey: $key) { ... on AssetNode { assetMaterializations { partition } } } }"
    events = platform.graphql(query, {"key": {"path": [asset]}})["assetNodeOrError"]["assetMaterializations"]
    return {event["partition"] for event in events}


def test_a_campaign_due_in_a_while_goes_out_without_a_click(platform: Platform) -> None:
    begin = dt.datetime.now(dt.UTC)
    # Slow enough for the run of each server to find something left, whichever starts first.
    platform.limit(20.0)
    platform.schedule("first", seconds=20)
    totals = platform.wait_finished("first")
    platform.limit()
    started = platform.campaign("first").started_at
    assert started is not None
    assert started >= begin + dt.timedelta(seconds=20)
    assert totals.audience > 2_000
    assert totals.open == 0
    copies = platform.copies("first")
    assert set(copies.values()) == {1}
    assert len(copies) == totals.delivered
    with reading(platform.engine) as connection:
        used = connection.execute(sa.select(Server.key).join(Claim, Claim.server_id == Server.id).distinct()).scalars().all()
    assert set(used) == {"catcher-1", "catcher-2"}
    # Green: every shard, used or not, and the results, once.
    wait_for(lambda: sum(key.startswith("first|") for key in materialized(platform, "send_batches")) == 64, seconds=300, what="64 green shards")
    wait_for(lambda: platform.reported("first"), seconds=300, what="results")
    finished = [run for run in runs(platform) if run[0] == "report_campaign" and run[2] == "first"]
    assert len(finished) <= 2, "results are asked for once when finished, and hourly before"


def test_sources_that_hang_keep_no_campaign_from_going_out(platform: Platform) -> None:
    """They have two places between them, and the third waits for one of these."""
    reading_them = [platform.graphql(LAUNCH, {"source": name})["launchRun"]["run"]["runId"] for name in HANGING]
    wait_for(lambda: sorted(map(str, map(platform.status, reading_them))) == ["QUEUED", "STARTED", "STARTED"], seconds=300, what="sources that are being read")
    platform.schedule("beside")
    totals = platform.wait_finished("beside")
    assert totals.open == 0
    assert set(platform.copies("beside").values()) == {1}
    assert sorted(map(str, map(platform.status, reading_them))) == ["QUEUED", "STARTED", "STARTED"]
    for run in reading_them:
        platform.graphql(TERMINATE, {"run": run})
    wait_for(lambda: {platform.status(run) for run in reading_them} == {"CANCELED"}, seconds=300, what="the end of these runs")


def test_a_schedule_tick_launches_its_run(platform: Platform) -> None:
    wait_for(lambda: ("refresh_snapshots", "SUCCESS", None) in runs(platform), seconds=400, what="a scheduled run")


def test_a_backfill_from_the_command_line_sends_a_campaign_and_repeats_nothing(platform: Platform) -> None:
    """The sensor that starts send runs is off: the backfill does the whole job. Filling again sends nobody a second copy."""
    platform.sensor("stop", "open_shards")
    platform.schedule("backfilled")
    wait_for(lambda: platform.campaign("backfilled").state == "sending", seconds=300, what="the freeze")
    backfill(platform, "backfilled|00", "backfilled|07", runs=8)
    totals = platform.totals("backfilled")
    copies = platform.copies("backfilled")
    assert totals.open == 0
    assert len(copies) == totals.delivered > 2_000
    assert set(copies.values()) == {1}
    # Again by the code server that runs: with the checkout's workspace, which a user has, the command starts one of its own.
    backfill(platform, "backfilled|00", "backfilled|03", runs=4, workspace=str(platform.settings.dagster_home / "workspace.yaml"))
    # An old run, executed again as the UI's button does it.
    run = platform.newest_run("backfilled|00")
    again = platform.graphql(REEXECUTE, {"run": run})["launchRunReexecution"]["run"]["runId"]
    wait_for(lambda: platform.status(again) == "SUCCESS", seconds=400, what="the run executed again")
    assert platform.copies("backfilled") == copies
    platform.sensor("start", "open_shards")


def backfill(platform: Platform, first: str, last: str, *, runs: int, workspace: str = "workspace.yaml") -> None:
    known = len(send_runs(platform))
    platform.command("dagster", "job", "backfill", "-w", workspace, "-j", "send_campaign", "--from", first, "--to", last, "--noprompt")
    wait_for(lambda: len(send_runs(platform)) >= known + runs, seconds=300, what="the runs of the backfill")
    wait_for(lambda: set(send_runs(platform)) == {"SUCCESS"}, seconds=400, what="the end of all runs")


def send_runs(platform: Platform) -> list[str]:
    return [status for job, status, _ in runs(platform) if job == "send_campaign"]


def commands_of(group: int) -> list[bytes]:
    """The command lines of the processes of a group."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        # It may have ended meanwhile.
        with contextlib.suppress(OSError):
            if os.getpgid(int(process.name)) == group:
                found.append((process / "cmdline").read_bytes())
    return found


def test_a_run_that_is_terminated_is_canceled_and_leaves_nothing_in_doubt(platform: Platform) -> None:
    # So slow that every session has a minute's work left when one is terminated.
    platform.limit(5.0)
    platform.schedule("terminated")
    run = wait_for(lambda: next(iter(platform.working_runs("terminated")), None), seconds=400, what="a session")
    wait_for(lambda: len(platform.copies("terminated")) > 50, what="messages under way")
    # Runs are forks of the one process that has imported everything.
    commands = commands_of(next(child.process.pid for child in platform.processes._children if child.name == "code"))
    assert sum(b"forkserver" in command for command in commands) >= 2
    assert not any(b"spawn_main" in command for command in commands)
    platform.graphql(TERMINATE, {"run": run})
    wait_for(lambda: platform.status(run) == "CANCELED", seconds=300, what="the end of the run")
    with reading(platform.engine) as connection:
        left = (
            sa.select(Delivery.state).join(Claim, Claim.id == Delivery.claim_id).where(Claim.run_id == run, Delivery.state.in_((State.CLAIMED, State.UNKNOWN)))
        )
        assert connection.execute(left).all() == []
        assert connection.execute(sa.select(Claim.id).where(Claim.run_id == run, Claim.state != "closed")).all() == []
    platform.limit()
    # Sessions that began before keep the pace they began with.
    for other in platform.working_runs("terminated"):
        platform.graphql(TERMINATE, {"run": other})
    totals = platform.wait_finished("terminated")
    copies = platform.copies("terminated")
    assert set(copies.values()) == {1}
    assert len(copies) == totals.delivered


def test_a_killed_daemon_neither_loses_nor_repeats(platform: Platform) -> None:
    platform.schedule("killed")
    wait_for(lambda: len(platform.copies("killed")) > 100, seconds=300, what="sending")
    daemon = next(child for child in platform.processes._children if child.name == "daemon")
    daemon.process.kill()
    daemon.process.wait()
    platform.processes._children.remove(daemon)
    from mail_pipelines import up

    up.start_daemon(platform.processes, platform.settings)
    totals = platform.wait_finished("killed")
    copies = platform.copies("killed")
    assert set(copies.values()) == {1}
    assert totals.delivered <= len(copies) <= totals.delivered + totals.unknown
    assert totals.audience == totals.delivered + totals.bounced + totals.suppressed + totals.unknown


def test_doctor_is_content_and_names_a_stopped_sensor(platform: Platform) -> None:
    content = platform.command("mail-pipelines", "doctor", check=False)
    assert (content.returncode, content.stdout.strip()) == (0, "nothing is wrong"), content.stdout + content.stderr

    # A tick of that moment can write the state back that it has read before: Dagster's daemon reads, and then writes, all of it.
    def stopped() -> subprocess.CompletedProcess[str] | None:
        platform.sensor("stop", "open_shards")
        said = platform.command("mail-pipelines", "doctor", check=False)
        return said if said.returncode else None

    named = wait_for(stopped, seconds=300, what="the stopped sensor named")
    platform.sensor("start", "open_shards")
    assert named.returncode == 1
    assert "open_shards" in named.stdout + named.stderr


def test_no_contact_is_named_in_dagsters_storage_or_logs(platform: Platform) -> None:
    """After all of the above, the killed daemon included."""
    files = dagster_files(platform.settings.home)
    assert len(files) > 50
    assert people_named(platform.engine, files) == []
