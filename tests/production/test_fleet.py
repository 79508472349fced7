"""Runs carried to workers by a broker: each where it belongs, none that the centre did not order, and none lost or done twice."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time

import dagster as dg
import pytest

from mail_pipelines.resources import orders, run_tags, tasks
from mail_pipelines.resources.queues import QUEUE_TAG
from tests.parts.processes import wait_for
from tests.production.fleet import FINISHED, SERVERS, Fleet

pytestmark = [pytest.mark.server, pytest.mark.timeout(900), pytest.mark.xdist_group("centre")]

Status = dg.DagsterRunStatus


CAMPAIGN = "steady"


# Sensors, ends of sessions, tags, accounts: what a broker carries, and how, is nothing to them.
WHOLE = pytest.mark.parametrize("fleet", ["rabbitmq"], indirect=True)


@pytest.fixture
def campaign(fleet: Fleet) -> str:
    """One campaign for all that strikes, sent so slowly that on a busy machine as well it is under way when they do."""
    fleet.begin(CAMPAIGN, 1.0)
    return CAMPAIGN


def order_for(fleet: Fleet, run_id: str, queue: str, *, signing_key: str | None = None, seconds: float = 600) -> tuple[str, str]:
    key = signing_key or fleet.platform.settings.broker.signing_key
    assert key
    return orders.sign(orders.Order(run_id, queue, time.time() + seconds), key)


def test_workers_of_both_servers_send_at_once(fleet: Fleet, campaign: str) -> None:
    wait_for(lambda: fleet.busy() == set(SERVERS), what="both servers at work")
    assert {record.dagster_run.tags[QUEUE_TAG] for record in fleet.send_runs(campaign)} == set(SERVERS)
    assert {record.dagster_run.tags[QUEUE_TAG] for record in fleet.runs("build_audience")} == {"centre"}


def test_a_terminated_run_is_canceled_and_leaves_nothing_in_doubt(fleet: Fleet, campaign: str) -> None:
    run = fleet.sending(campaign)
    fleet.terminate(run.run_id)
    fleet.wait_for_status(run.run_id, Status.CANCELED)
    assert fleet.open_claims(run.run_id) == 0
    assert fleet.rows_of_run(run.run_id) == {}
    assert "cancelled by the operator" in fleet.messages(run.run_id)


def test_a_killed_process_fails_its_run_and_its_claims_are_settled(fleet: Fleet, campaign: str) -> None:
    run = fleet.sending(campaign)
    os.kill(fleet.process_of(run.run_id), signal.SIGKILL)
    fleet.wait_for_status(run.run_id, Status.FAILURE)
    wait_for(lambda: fleet.open_claims(run.run_id) == 0, what="settlement")


@WHOLE
def test_a_worker_that_is_stopped_ends_its_sessions_early_and_in_order(fleet: Fleet, campaign: str) -> None:
    run = fleet.sending(campaign)
    name = f"worker of {run.tags[QUEUE_TAG]}"
    fleet.end(name)
    # By itself the session would go on for 45 minutes.
    assert fleet.status(run.run_id) is Status.SUCCESS
    assert fleet.open_claims(run.run_id) == 0
    assert fleet.rows_of_run(run.run_id) == {}
    assert "asked to end" in fleet.messages(run.run_id)
    fleet.start_worker_again(name, run.tags[QUEUE_TAG])


@WHOLE
def test_a_send_run_without_a_queue_goes_to_a_server(fleet: Fleet, campaign: str) -> None:
    tags = {"dagster/partition": f"{campaign}|00", "dagster/partition/campaign": campaign, "dagster/partition/shard": "00"}
    fleet.sending(campaign)
    run_id = fleet.launch("send_campaign", **tags)
    # Past the point where it knows its server, on which it may not write tags.
    begun = f"sending shard 00 of {campaign} through"
    wait_for(lambda: begun in fleet.messages(run_id) or fleet.status(run_id) in FINISHED, what="the run's begin")
    assert begun in fleet.messages(run_id), fleet.messages(run_id)
    run = fleet.instance.get_run_by_id(run_id)
    assert run is not None
    assert run.tags[QUEUE_TAG] in SERVERS
    assert (run.tags[run_tags.CAMPAIGN], run.tags[run_tags.SERVER]) == (campaign, run.tags[QUEUE_TAG])
    assert int(run.tags[run_tags.ATTEMPT]) >= 1


@WHOLE
def test_runs_are_found_by_campaign_server_and_attempt(fleet: Fleet, campaign: str) -> None:
    for server in SERVERS:
        first = fleet.runs("send_campaign", **{run_tags.CAMPAIGN: campaign, run_tags.SERVER: server, run_tags.ATTEMPT: "1"})
        assert [record.dagster_run.tags[QUEUE_TAG] for record in first] == [server]

    def identities(records: list[dg.RunRecord]) -> set[str]:
        return {record.dagster_run.run_id for record in records}

    # While others may begin.
    before = identities(fleet.send_runs(campaign))
    every = identities(fleet.runs("send_campaign", **{run_tags.CAMPAIGN: campaign}))
    assert before <= every <= identities(fleet.send_runs(campaign))
    assert fleet.runs("build_audience", **{run_tags.CAMPAIGN: campaign})


@WHOLE
def test_after_all_of_it_every_recipient_has_one_copy(fleet: Fleet, campaign: str) -> None:
    fleet.quicken(campaign)
    # Doubt may be about the messages that a killed process had at their destinations.
    fleet.holds_promise(campaign, unknown=48)


def test_a_run_of_the_centre_is_refused_by_a_server(fleet: Fleet) -> None:
    run_id = fleet.launch("refresh_snapshots", **{QUEUE_TAG: SERVERS[0]})
    fleet.wait_for_status(run_id, Status.FAILURE)
    assert "executes only at the centre" in fleet.messages(run_id)
    assert "Started process" not in fleet.messages(run_id)


def test_an_order_that_was_moved_to_another_queue_is_refused(fleet: Fleet) -> None:
    run_id = waiting_run(fleet)
    moved = order_for(fleet, run_id, SERVERS[0])
    result = fleet.app.send_task(tasks.EXECUTE_RUN, moved, queue=SERVERS[1])
    if fleet.backing.database is None:
        fleet.wait_for_status(run_id, Status.FAILURE)
        assert f"meant for queue {SERVERS[0]}" in fleet.messages(run_id)
        wait_for(lambda: result.state == "FAILURE", what="the worker's refusal")
    else:
        # To this server's account there is no such run, of which it could say how it ended.
        said = fleet.log(f"worker of {SERVERS[1]}")
        wait_for(lambda: result.id in (text := said.read_text()) and "CHECK OPTION failed" in text, what="the worker's refusal")
        assert fleet.status(run_id) is Status.NOT_STARTED
    assert "Started process" not in fleet.messages(run_id)


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
    sent = [fleet.app.send_task(tasks.EXECUTE_RUN, order, queue="centre") for _ in range(3)]
    fleet.wait_for_status(run_id, Status.SUCCESS)
    sent.append(fleet.app.send_task(tasks.EXECUTE_RUN, order, queue="centre"))
    assert sorted(result.get(120) for result in sent) == [tasks.IGNORED] * 3 + [0]
    assert fleet.messages(run_id).count("Started process for run") == 1
    assert fleet.status(run_id) is Status.SUCCESS


@WHOLE
def test_one_worker_for_two_servers_speaks_for_each_by_its_own_account(fleet: Fleet) -> None:
    own = fleet.platform.settings.home / "servers"
    own.mkdir()
    for name in SERVERS:
        environ = fleet.backing.of_server.get(name, {})
        given = {key: environ.get(f"MAIL_PIPELINES_DATABASE__{key.upper()}") for key in ("url", "password")}
        words = [f"{key} = {json.dumps(value)}" for key, value in given.items() if value]
        (own / f"{name}.toml").write_text("\n".join(["[database]", *words]), encoding="utf-8")
    name = "control worker of both"
    fleet.start_worker(name, ",".join(SERVERS), "--control")
    audits = {server: fleet.launch("audit_delivery_logs", **{"dagster/partition": server}) for server in SERVERS}
    for server, run_id in audits.items():
        assert fleet.wait_for_status(run_id, Status.SUCCESS).tags[QUEUE_TAG] == f"{server}-ctl"
    fleet.end(name)
    shutil.rmtree(own)


def waiting_run(fleet: Fleet) -> str:
    """A run of the centre that Dagster knows and nobody has ordered."""
    return fleet.add_run("refresh_snapshots", **{QUEUE_TAG: "centre"})
