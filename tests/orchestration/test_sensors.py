"""Sensors ask for what is needed, once, and for no more than there is room for."""

from __future__ import annotations

import datetime as dt
import fcntl
import json
import os
import time
from collections import Counter
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
import sqlalchemy as sa

from mail_pipelines import partitions
from mail_pipelines.database.engine import transact
from mail_pipelines.database.models import Campaign, Claim, Delivery, Server, State
from mail_pipelines.definitions import build_defs
from mail_pipelines.delivery import counters
from mail_pipelines.dispatch import openings
from mail_pipelines.dispatch.openings import Opening
from mail_pipelines.resources.database import CentralDatabase
from mail_pipelines.resources.server import QUEUE_TAG
from mail_pipelines.sensors import campaigns, files, servers, shards
from tests.dispatch.world import World

DATABASE = CentralDatabase()


@pytest.fixture(scope="module")
def repository() -> dg.RepositoryDefinition:
    return build_defs().get_repository_def()


def context(instance: dg.DagsterInstance, repository: dg.RepositoryDefinition, cursor: str | None = None) -> dg.SensorEvaluationContext:
    return dg.build_sensor_context(instance=instance, cursor=cursor, repository_def=repository)


def alive(world: World, *keys: str) -> None:
    """Servers that have just beaten."""
    now = dt.datetime.now(dt.UTC)
    for key in keys:
        world.server(key)
        transact(world.engine, lambda c, key=key: c.execute(sa.update(Server).where(Server.key == key).values(heartbeat_at=now)))


def end_rows(world: World, shard: int, state: State = State.DELIVERED) -> None:
    """Every row of a shard reaches a state, with its counters."""

    def work(connection: sa.Connection) -> None:
        where = (Delivery.campaign_id == world.campaign_id, Delivery.shard == shard)
        rows = connection.execute(sa.select(Delivery.provider, Delivery.state).where(*where)).all()
        moves: Counter[Any] = Counter()
        for row in rows:
            moves[shard, row.provider, State(row.state), ""] -= 1
            moves[shard, row.provider, state, ""] += 1
        connection.execute(sa.update(Delivery).where(*where).values(state=int(state), sort_key=int(time.time())))
        counters.add(connection, world.campaign_id, 0, moves, dt.datetime.now(dt.UTC))

    transact(world.engine, work)


def test_open_shards_fills_the_free_slots_of_living_servers(world: World, instance: dg.DagsterInstance, repository: dg.RepositoryDefinition) -> None:
    alive(world, "s1", "s2")
    world.server("silent")
    instance.add_dynamic_partitions("campaigns", ["spring"])
    begin = time.monotonic()
    result = shards.open_shards(context(instance, repository), DATABASE)
    assert time.monotonic() - begin < 1
    assert isinstance(result, dg.SensorResult)
    requests = result.run_requests or []
    assert Counter(request.tags[QUEUE_TAG] for request in requests) == {"s1": 2, "s2": 2}
    assert sorted(str(request.partition_key) for request in requests) == [f"spring|0{shard}" for shard in range(4)]


def test_shards_that_run_or_wait_are_not_asked_for_again(world: World) -> None:
    alive(world, "s1", "s2")
    from mail_pipelines.capacity import allotments

    allotments.fill(world.engine)
    busy = {Opening("spring", shard, "s1") for shard in (0, 1)}
    with world.engine.connect() as connection:
        found = openings.find(connection, dt.datetime.now(dt.UTC), slots=2, heartbeat_seconds=10, in_flight=busy)
    assert found == [Opening("spring", 2, "s2"), Opening("spring", 3, "s2")]


@pytest.mark.parametrize("change", [{"state": "paused"}, {"state": "scheduled"}, {"held_reason": "look"}, {"state": "cancelled"}, {"state": "finished"}])
def test_no_runs_for_a_campaign_that_is_not_sending(
    world: World, instance: dg.DagsterInstance, repository: dg.RepositoryDefinition, change: dict[str, Any]
) -> None:
    alive(world, "s1")
    instance.add_dynamic_partitions("campaigns", ["spring"])
    world.set_campaign(**change)
    assert isinstance(shards.open_shards(context(instance, repository), DATABASE), dg.SkipReason)


def test_a_claim_left_behind_brings_a_run_to_its_own_server(world: World) -> None:
    alive(world, "s1", "s2")
    now = dt.datetime.now(dt.UTC)
    for shard in range(4):
        end_rows(world, shard)
    with world.engine.connect() as connection:
        assert openings.find(connection, now, slots=2, heartbeat_seconds=10, in_flight=()) == []
        server = connection.execute(sa.select(Server.id).where(Server.key == "s2")).scalar_one()
    claim = {"id": 5, "campaign_id": 1, "shard": 3, "provider": "google", "server_id": server, "run_id": "r", "size": 1, "state": "open", "incarnation": "i"}
    place = {"boot_id": "b", "journal_inode": 1, "journal_offset": 0, "opened_at": now, "lease_until": now - dt.timedelta(seconds=1)}
    transact(world.engine, lambda connection: connection.execute(sa.insert(Claim).values(claim | place)))
    with world.engine.connect() as connection:
        assert openings.find(connection, now, slots=2, heartbeat_seconds=10, in_flight=()) == [Opening("spring", 3, "s2")]


def test_finished_shards_materialises_what_the_ledger_calls_final_once(world: World, instance: dg.DagsterInstance, repository: dg.RepositoryDefinition) -> None:
    instance.add_dynamic_partitions("campaigns", ["spring"])
    end_rows(world, 0)
    end_rows(world, 1, State.UNKNOWN)
    result = shards.finished_shards(context(instance, repository), DATABASE)
    assert isinstance(result, dg.SensorResult)
    keys = {str(event.partition) for event in result.asset_events}
    # Unused shards are final too; shard 1 has unknown rows, which are open.
    assert keys == {"spring|00", *(f"spring|{shard:02d}" for shard in range(4, 64))}
    assert isinstance(shards.finished_shards(context(instance, repository, result.cursor), DATABASE), dg.SkipReason)
    end_rows(world, 1, State.UNRESOLVED)
    later = shards.finished_shards(context(instance, repository, result.cursor), DATABASE)
    assert isinstance(later, dg.SensorResult)
    assert [str(event.partition) for event in later.asset_events] == ["spring|01"]
    assert json.loads(later.cursor or "")["spring"][:3] == [0, 1, 4]


def test_results_are_asked_for_once_when_the_ledger_says_finished(world: World, instance: dg.DagsterInstance, repository: dg.RepositoryDefinition) -> None:
    instance.add_dynamic_partitions("campaigns", ["spring"])
    first = campaigns.finished_campaigns(context(instance, repository), DATABASE)
    assert [request.run_key for request in first.run_requests or []] == [f"spring:{dt.datetime.now(dt.UTC):%Y-%m-%dT%H}"]
    for shard in range(4):
        end_rows(world, shard)
    for _ in range(3):
        result = campaigns.finished_campaigns(context(instance, repository), DATABASE)
        # Dagster runs a run key once.
        assert [(request.job_name, request.run_key) for request in result.run_requests or []] == [("report_campaign", "spring:finished")]
    with world.engine.connect() as connection:
        assert connection.execute(sa.select(Campaign.state)).scalar_one() == "finished"


def test_rows_past_their_time_bring_a_run_that_ends_them(world: World, instance: dg.DagsterInstance, repository: dg.RepositoryDefinition) -> None:
    instance.add_dynamic_partitions("campaigns", ["spring"])
    world.set_campaign(expire_at=dt.datetime.now(dt.UTC) - dt.timedelta(seconds=1))
    result = campaigns.finished_campaigns(context(instance, repository), DATABASE)
    assert "close_open_rows" in {request.job_name for request in result.run_requests or []}
    job = build_defs().resolve_job_def("close_open_rows")
    assert job.execute_in_process(instance=instance, resources={"database": DATABASE}).success
    assert world.states() == {State.EXPIRED: 120}
    world.check_counters()
    with world.engine.connect() as connection:
        assert connection.execute(sa.select(Campaign.state)).scalar_one() == "finished"


def test_due_campaigns_get_their_key_and_their_freeze(world: World, instance: dg.DagsterInstance, repository: dg.RepositoryDefinition) -> None:
    world.set_campaign(state="scheduled", start_at=dt.datetime.now(dt.UTC) - dt.timedelta(seconds=1))
    result = campaigns.due_campaigns(context(instance, repository), DATABASE)
    assert [list(request.partition_keys) for request in result.dynamic_partitions_requests or []] == [["spring"]]
    assert [(request.job_name, request.partition_key) for request in result.run_requests or []] == [("build_audience", "spring")]
    world.set_campaign(start_at=dt.datetime.now(dt.UTC) + dt.timedelta(hours=1))
    assert not campaigns.due_campaigns(context(instance, repository), DATABASE).run_requests


def test_a_freeze_that_fails_three_times_is_not_asked_for_again(world: World, instance: dg.DagsterInstance, repository: dg.RepositoryDefinition) -> None:
    world.set_campaign(state="scheduled", start_at=dt.datetime.now(dt.UTC))
    for _ in range(3):
        run = instance.create_run_for_job(
            build_defs().resolve_job_def("build_audience"), tags={"dagster/partition": "spring"}, status=dg.DagsterRunStatus.STARTED
        )
        assert campaigns.due_campaigns(context(instance, repository), DATABASE).run_requests == []
        instance.report_run_failed(run)
    assert campaigns.due_campaigns(context(instance, repository), DATABASE).run_requests == []


def test_a_run_whose_process_is_gone_is_marked_failed_and_a_living_one_is_not(
    world: World, instance: dg.DagsterInstance, repository: dg.RepositoryDefinition, monkeypatch: pytest.MonkeyPatch
) -> None:
    alive(world, "s1")
    folders = world.folders("s1")
    folders.journal.touch()
    job = build_defs().resolve_job_def("send_campaign")
    runs = []
    for number in range(2):
        tags = {QUEUE_TAG: "s1", "dagster/partition": f"spring|0{number}"}
        run = instance.create_run_for_job(job, tags=tags, status=dg.DagsterRunStatus.STARTING)
        instance.report_engine_event("started", run)
        instance.handle_new_event(_started(run))
        runs.append(run)
    with (folders.sessions / runs[0].run_id).open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        monkeypatch.setattr(servers, "START_SECONDS", 0)
        servers.server_health(context(instance, repository), DATABASE)
        statuses = [instance.get_run_by_id(run.run_id).status for run in runs]  # type: ignore[union-attr]
    assert statuses == [dg.DagsterRunStatus.STARTED, dg.DagsterRunStatus.FAILURE]
    assert {limit.name: limit.limit for limit in instance.event_log_storage.get_pool_limits()}["dispatch"] == 2


def _started(run: dg.DagsterRun) -> Any:
    from dagster._core.events import DagsterEvent, DagsterEventType
    from dagster._core.events.log import EventLogEntry

    return EventLogEntry(
        error_info=None,
        level="info",
        user_message="",
        run_id=run.run_id,
        timestamp=time.time(),
        dagster_event=DagsterEvent(event_type_value=DagsterEventType.RUN_START.value, job_name=run.job_name),
    )


def test_dropped_files_are_imported_once_each(tmp_path: Path, world: World) -> None:
    inbox = tmp_path / "home" / "inbox"
    (inbox / "news").mkdir(parents=True)
    for name in ("a.csv", "a.csv.rejected.csv", "b.parquet", "notes.txt"):
        (inbox / "news" / name).write_bytes(b"email\n")
    assert list(files.waiting_files(inbox, time.time())) == []
    for name in ("a.csv", "a.csv.rejected.csv"):
        os.utime(inbox / "news" / name, (time.time() - 60, time.time() - 60))
    os.utime(inbox / "news" / "b.parquet", (time.time() - 30, time.time() - 30))
    result = files.dropped_files(DATABASE)
    assert isinstance(result, dg.SensorResult)
    requests = result.run_requests or []
    assert [Path(request.run_config["ops"]["import_file"]["config"]["path"]).name for request in requests] == ["a.csv", "b.parquet"]
    assert {request.run_config["ops"]["import_file"]["config"]["list_name"] for request in requests} == {"news"}
    again = files.dropped_files(DATABASE)
    assert isinstance(again, dg.SensorResult)
    assert [request.run_key for request in again.run_requests or []] == [request.run_key for request in requests]


def test_a_dropped_file_is_imported_and_moved(tmp_path: Path, engine: sa.Engine, world: World, instance: dg.DagsterInstance) -> None:
    inbox = tmp_path / "home" / "inbox" / "news"
    inbox.mkdir(parents=True)
    (inbox / "a.csv").write_text("email,first_name\nnew@small.test,Ada\nbad,\n")
    job = build_defs().resolve_job_def("import_contacts")
    config = {"ops": {"import_file": {"config": {"path": str(inbox / "a.csv"), "list_name": "news"}}}}
    assert job.execute_in_process(instance=instance, run_config=config, resources={"database": DATABASE}).success
    assert (inbox / "done" / "a.csv").exists()
    with engine.connect() as connection:
        assert connection.execute(sa.text("SELECT COUNT(*) FROM contacts")).scalar_one() == 121


def test_maintenance_runs_on_an_empty_instance(world: World, instance: dg.DagsterInstance) -> None:
    job = build_defs().resolve_job_def("maintenance")
    assert job.execute_in_process(instance=instance, resources={"database": DATABASE}).success
    assert world.states() == {State.PENDING: 120}


def test_missing_keys_are_added_in_portions() -> None:
    wanted = [f"c{number}" for number in range(120)]
    assert campaigns.missing_keys(wanted, wanted[:10]) == wanted[10 : 10 + campaigns.KEYS_A_TICK]


def test_batch_keys_are_in_the_order_of_shards() -> None:
    assert [str(partitions.batch_key("spring", shard)) for shard in (0, 9, 63)] == ["spring|00", "spring|09", "spring|63"]
