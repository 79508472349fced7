"""Runs carried to workers by a broker: each where it belongs, none that the centre did not order, and none lost or done twice."""

from __future__ import annotations

import os
import signal
import time
import uuid
from collections.abc import Iterator

import dagster as dg
import pytest
import sqlalchemy as sa

from mail_pipelines.database.engine import reading
from mail_pipelines.database.models import Claim, Server
from mail_pipelines.resources import orders, tasks
from mail_pipelines.resources.queues import QUEUE_TAG
from tests.parts.processes import wait_for
from tests.production.fleet import SERVERS, Fleet

pytestmark = [pytest.mark.server, pytest.mark.timeout(300), pytest.mark.xdist_group("fleet")]

Status = dg.DagsterRunStatus


@pytest.fixture
def slowly(fleet: Fleet) -> Iterator[None]:
    """Slow enough for something to be under way when the test strikes."""
    fleet.platform.limit(40.0)
    yield
    fleet.platform.limit()


def order_for(fleet: Fleet, run_id: str, queue: str, *, signing_key: str | None = None, seconds: float = 60) -> tuple[str, str]:
    key = signing_key or fleet.platform.settings.broker.signing_key
    assert key
    return orders.sign(orders.Order(run_id, queue, time.time() + seconds), key)


def test_a_campaign_is_sent_by_the_workers_of_both_servers(fleet: Fleet, slowly: None) -> None:
    fleet.platform.schedule("first")
    fleet.holds_promise("first")
    with reading(fleet.platform.engine) as connection:
        used = connection.execute(sa.select(Server.key).join(Claim, Claim.server_id == Server.id).distinct()).scalars().all()
    assert set(used) == set(SERVERS)
    assert {record.dagster_run.tags[QUEUE_TAG] for record in fleet.send_runs("first")} == set(SERVERS)
    assert {record.dagster_run.tags[QUEUE_TAG] for record in fleet.runs("build_audience")} == {"centre"}
    for name in SERVERS:
        wait_for(lambda name=name: "succeeded" in fleet.log(f"worker of {name}").read_text(), what=f"the end of a task of {name}")  # type: ignore[misc]


def test_a_backfill_without_a_queue_goes_to_servers_and_sends(fleet: Fleet) -> None:
    fleet.platform.command("dagster", "sensor", "stop", "-w", "workspace.yaml", "open_shards")
    try:
        fleet.platform.schedule("filled")
        wait_for(lambda: fleet.platform.campaign("filled").state == "sending", seconds=60, what="the freeze")
        shards = fleet.platform.campaign("filled").shards or 1
        last = f"filled|{min(shards, 64) - 1:02d}"
        fleet.platform.command("dagster", "job", "backfill", "-w", "workspace.yaml", "-j", "send_campaign", "--from", "filled|00", "--to", last, "--noprompt")
        fleet.holds_promise("filled")
    finally:
        fleet.platform.command("dagster", "sensor", "start", "-w", "workspace.yaml", "open_shards")
    wait_for(lambda: all(record.dagster_run.is_finished for record in fleet.send_runs("filled")), seconds=60, what="the end of all runs")
    assert {record.dagster_run.tags[QUEUE_TAG] for record in fleet.send_runs("filled")} <= set(SERVERS)


def test_a_terminated_run_is_canceled_and_leaves_nothing_in_doubt(fleet: Fleet, slowly: None) -> None:
    fleet.platform.schedule("terminated")
    run = fleet.sending("terminated")
    wait_for(lambda: len(fleet.platform.copies("terminated")) > 50, what="messages under way")
    fleet.terminate(run.run_id)
    fleet.wait_for_status(run.run_id, Status.CANCELED, 30)
    assert fleet.open_claims(run.run_id) == 0
    assert fleet.rows_of_run(run.run_id) == {}
    assert "cancelled by the operator" in fleet.messages(run.run_id)
    fleet.platform.limit()
    fleet.holds_promise("terminated")


def test_a_killed_process_fails_its_run_and_the_next_one_sends_what_was_left(fleet: Fleet, slowly: None) -> None:
    fleet.platform.schedule("killed")
    run = fleet.sending("killed")
    wait_for(lambda: len(fleet.platform.copies("killed")) > 50, what="messages under way")
    os.kill(fleet.process_of(run.run_id), signal.SIGKILL)
    fleet.wait_for_status(run.run_id, Status.FAILURE, 30)
    wait_for(lambda: fleet.open_claims(run.run_id) == 0, what="settlement")
    fleet.platform.limit()
    # A message whose final reply nobody recorded.
    fleet.holds_promise("killed", unknown=48)


def test_a_worker_that_is_stopped_ends_its_sessions_early_and_in_order(fleet: Fleet, slowly: None) -> None:
    fleet.platform.schedule("stopped")
    run = fleet.sending("stopped")
    name = f"worker of {run.tags[QUEUE_TAG]}"
    wait_for(lambda: len(fleet.platform.copies("stopped")) > 50, what="messages under way")
    fleet.end(name)
    # Its worker would have waited for the end of the session for 45 minutes.
    assert fleet.status(run.run_id) is Status.SUCCESS
    assert fleet.rows_of_run(run.run_id) == {}
    assert "asked to end" in fleet.messages(run.run_id)
    fleet.start_worker(name, run.tags[QUEUE_TAG])
    fleet.platform.limit()
    fleet.holds_promise("stopped")


def test_a_run_of_the_centre_is_refused_by_a_server(fleet: Fleet) -> None:
    run_id = fleet.launch("refresh_snapshots", **{QUEUE_TAG: SERVERS[0]})
    fleet.wait_for_status(run_id, Status.FAILURE)
    assert "executes only at the centre" in fleet.messages(run_id)
    assert "Started process" not in fleet.messages(run_id)


def test_an_order_that_was_moved_to_another_queue_is_refused(fleet: Fleet) -> None:
    run_id = waiting_run(fleet)
    moved = order_for(fleet, run_id, SERVERS[0])
    result = fleet.app.send_task(tasks.EXECUTE_RUN, moved, queue=SERVERS[1])
    fleet.wait_for_status(run_id, Status.FAILURE)
    assert f"meant for queue {SERVERS[0]}" in fleet.messages(run_id)
    wait_for(lambda: result.state == "FAILURE", what="the worker's refusal")


def test_what_the_centre_did_not_sign_is_refused_by_the_centre(fleet: Fleet) -> None:
    run_id = waiting_run(fleet)
    text, signature = order_for(fleet, run_id, "centre", signing_key=orders.new_signing_key())
    own, _ = order_for(fleet, run_id, "centre")
    _, late = order_for(fleet, run_id, "centre", seconds=-1)
    late_text, late = order_for(fleet, run_id, "centre", seconds=-1)
    attempts = [(), (own,), (text, signature), (own, signature), (late_text, late), ({"run_id": run_id}, late)]
    results = [fleet.app.send_task(tasks.EXECUTE_RUN, attempt, queue="centre") for attempt in attempts]
    for result in results:
        wait_for(lambda result=result: result.state == "FAILURE", what="the worker's refusal")  # type: ignore[misc]
    assert fleet.status(run_id) is Status.NOT_STARTED
    assert "Started process" not in fleet.messages(run_id)
    # The same run, as the centre orders it.
    fleet.app.send_task(tasks.EXECUTE_RUN, order_for(fleet, run_id, "centre"), queue="centre")
    fleet.wait_for_status(run_id, Status.SUCCESS)


def test_an_order_that_comes_twice_is_followed_once(fleet: Fleet) -> None:
    run_id = waiting_run(fleet)
    order = order_for(fleet, run_id, "centre")
    for _ in range(3):
        fleet.app.send_task(tasks.EXECUTE_RUN, order, queue="centre")
    fleet.wait_for_status(run_id, Status.SUCCESS)
    last = fleet.app.send_task(tasks.EXECUTE_RUN, order, queue="centre")
    wait_for(lambda: last.state == "SUCCESS", what="the order that comes late")
    assert fleet.messages(run_id).count("Started execution of run") == 1
    assert fleet.status(run_id) is Status.SUCCESS


def waiting_run(fleet: Fleet) -> str:
    """A run of the centre that Dagster knows and nobody has ordered."""
    first = fleet.launch("refresh_snapshots")
    run = fleet.wait_for_status(first, Status.SUCCESS)
    assert run.tags[QUEUE_TAG] == "centre"
    return fleet.instance.add_run(run._replace(run_id=str(uuid.uuid4()), status=Status.NOT_STARTED)).run_id
