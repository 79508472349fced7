"""Sensors ask for what is needed, once, and for no more than there is room for."""

from __future__ import annotations

import contextlib
import datetime as dt
import fcntl
import json
import os
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import dagster as dg
import pytest
import sqlalchemy as sa

from mail_pipelines import partitions
from mail_pipelines.campaigns import lifecycle, scheduling
from mail_pipelines.capacity import allotments, warm_up
from mail_pipelines.database.engine import database_now, reading, transact
from mail_pipelines.database.models import Allotment, Campaign, CampaignCounter, Claim, Delivery, ProviderUsage, Server, State
from mail_pipelines.definitions import build_defs
from mail_pipelines.delivery import counters
from mail_pipelines.delivery.recording import slot_at
from mail_pipelines.dispatch import openings
from mail_pipelines.dispatch import servers as fleet
from mail_pipelines.dispatch.claims import OpenClaim
from mail_pipelines.dispatch.files import is_locked, only_one
from mail_pipelines.dispatch.holds import Kind
from mail_pipelines.dispatch.openings import Opening
from mail_pipelines.resources import run_tags
from mail_pipelines.resources.database import CentralDatabase, run_lock
from mail_pipelines.resources.queues import QUEUE_TAG, SOURCES_AT_ONCE, SOURCES_POOL
from mail_pipelines.sensors import campaigns, failures, files, servers, shards
from mail_pipelines.sensors import runs as runs_of_dagster
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


@contextlib.contextmanager
def asked(table: str) -> Iterator[list[str]]:
    """The statements about a table that any database is asked meanwhile."""
    found: list[str] = []

    def hear(_connection: sa.Connection, _cursor: object, statement: str, *_rest: object) -> None:
        if table in statement:
            found.append(statement)

    sa.event.listen(sa.Engine, "before_cursor_execute", hear)
    try:
        yield found
    finally:
        sa.event.remove(sa.Engine, "before_cursor_execute", hear)


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


def test_send_runs_are_found_by_campaign_server_and_attempt(world: World, instance: dg.DagsterInstance, repository: dg.RepositoryDefinition) -> None:
    """As the daemon makes them: what a job says of its partitions included."""
    alive(world, "s1", "s2")
    instance.add_dynamic_partitions("campaigns", ["spring"])
    job = build_defs().resolve_job_def("send_campaign")
    assert run_tags.of_sending(("spring", "s2"), 7) == {"mail_pipelines/campaign": "spring", "mail_pipelines/server": "s2", "mail_pipelines/attempt": "7"}
    # Not by the alphabet, and not by which is the newest.
    for attempt in (10, 9):
        instance.create_run_for_job(job, tags=run_tags.of_sending(("spring", "s2"), attempt), status=dg.DagsterRunStatus.SUCCESS)
    instance.create_run_for_job(job, tags=run_tags.of_sending(("autumn", "s1"), 30), status=dg.DagsterRunStatus.SUCCESS)
    with asked("run_tags") as questions:
        result = shards.open_shards(context(instance, repository), DATABASE)
    assert isinstance(result, dg.SensorResult)
    assert len(questions) == 1
    for request in result.run_requests or ():
        resolved = request.with_resolved_tags_and_config(job, (), instance)
        instance.create_run_for_job(job, tags=resolved.tags)

    def found(server: str) -> list[str]:
        runs = instance.get_runs(dg.RunsFilter(tags={run_tags.CAMPAIGN: "spring", run_tags.SERVER: server}))
        return sorted(run.tags[run_tags.ATTEMPT] for run in runs)

    assert [found("s1"), found("s2")] == [["1", "2"], ["10", "11", "12", "9"]]


def test_shards_that_run_or_wait_are_not_asked_for_again(world: World) -> None:
    alive(world, "s1", "s2")
    allotments.fill(world.engine, 10)
    busy = {Opening("spring", shard, "s1") for shard in (0, 1)}
    with world.engine.connect() as connection:
        found = openings.find(connection, dt.datetime.now(dt.UTC), slots=2, heartbeat_seconds=10, in_flight=busy)
    assert found == [Opening("spring", 2, "s2"), Opening("spring", 3, "s2")]


def test_all_servers_join_a_large_shard_at_once_and_a_small_one_has_one(world: World) -> None:
    alive(world, "s1", "s2")
    for shard in range(1, 4):
        end_rows(world, shard)
    allotments.fill(world.engine, 10)

    def found() -> list[Opening]:
        with world.engine.connect() as connection:
            return openings.find(connection, dt.datetime.now(dt.UTC), slots=2, heartbeat_seconds=10, in_flight=())

    assert found() == [Opening("spring", 0, "s1")]
    more = {(0, "google", State.PENDING, ""): openings.ROWS_TO_JOIN}
    transact(world.engine, lambda connection: counters.add(connection, world.campaign_id, counters.CENTRE, more, dt.datetime.now(dt.UTC)))
    allotments.fill(world.engine, 10)
    assert found() == [Opening("spring", 0, "s1"), Opening("spring", 0, "s2")]


def test_campaigns_of_one_priority_have_their_sessions_in_turn(world: World) -> None:
    alive(world, "s1", "s2")

    def copy(connection: sa.Connection) -> None:
        """A campaign `autumn` of the same rows, begun after `spring`."""
        for table, other in ((Campaign, {"id": 2, "key": "autumn"}), (Delivery, {"campaign_id": 2}), (CampaignCounter, {"campaign_id": 2})):
            rows = connection.execute(sa.select(table.__table__)).mappings().all()
            connection.execute(sa.insert(table), [{**row, **other} for row in rows])

    transact(world.engine, copy)
    allotments.fill(world.engine, 10)

    def found(*in_flight: Opening) -> Counter[str]:
        with world.engine.connect() as connection:
            runs = openings.find(connection, dt.datetime.now(dt.UTC), slots=2, heartbeat_seconds=10, in_flight=in_flight)
        return Counter(opening.campaign for opening in runs)

    assert found() == {"spring": 2, "autumn": 2}
    assert found(Opening("spring", 0, "s1"), Opening("spring", 1, "s2")) == {"autumn": 2}
    assert found(Opening("autumn", 0, "s1")) == {"spring": 2, "autumn": 1}
    transact(world.engine, lambda connection: connection.execute(sa.update(Campaign).where(Campaign.key == "autumn").values(priority=2)))
    assert found() == {"autumn": 4}


def test_more_slots_than_dagster_takes_are_no_error(
    world: World, instance: dg.DagsterInstance, repository: dg.RepositoryDefinition, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would end each tick of the sensor before all its other work."""
    alive(world, "s1", "s2")
    monkeypatch.setenv("MAIL_PIPELINES_SERVER__SLOTS", "501")

    def look() -> tuple[dict[str, int], list[str]]:
        tick = context(instance, repository)
        with mock.patch.object(tick.log, "error") as error:
            result = servers.server_health(tick, CentralDatabase())
        assert [list(request.partition_keys) for request in result.dynamic_partitions_requests or ()] == [["s1", "s2"]]
        return {limit.name: limit.limit for limit in instance.event_log_storage.get_pool_limits()}, [
            call.args[0] % call.args[1:] for call in error.call_args_list
        ]

    limits, (said,) = look()
    assert limits["dispatch"] == 1000
    assert said.startswith("the servers have 1002 send slots, of which Dagster takes 1000 at most: set DAGSTER_MAX_GLOBAL_OP_CONCURRENCY_LIMIT to more")
    monkeypatch.setenv("DAGSTER_MAX_GLOBAL_OP_CONCURRENCY_LIMIT", "1002")
    # External sources have a few, unless an operator says how many.
    assert limits["sources"] == SOURCES_AT_ONCE
    instance.event_log_storage.set_concurrency_slots(SOURCES_POOL, 5)
    limits, errors = look()
    assert (limits["dispatch"], limits["sources"], errors) == (1002, 5, [])


def test_a_few_deferred_rows_have_one_run_for_all_their_shards(world: World) -> None:
    alive(world, "s1", "s2")
    allotments.fill(world.engine, 10)
    for shard in range(4):
        end_rows(world, shard, State.DEFERRED)

    def found(*in_flight: Opening, many: int = 0) -> list[Opening]:
        with world.engine.connect() as connection, pytest.MonkeyPatch.context() as patch:
            patch.setattr(openings, "ROWS_TO_JOIN", many or openings.ROWS_TO_JOIN)
            return openings.find(connection, dt.datetime.now(dt.UTC), slots=2, heartbeat_seconds=10, in_flight=in_flight)

    assert len(found()) == 1
    # Whatever shard it began with, and on whichever server.
    assert found(Opening("spring", 9, "s2")) == []
    assert len(found(Opening("autumn", 0, "s2"))) == 1
    # 30 rows of each shard, all due.
    assert {opening.shard for opening in found(many=30)} == {0, 1, 2, 3}
    assert len(found(many=31)) == 1


def test_rows_that_wait_for_a_later_window_bring_no_server_more(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """A shard is as full as its rows that are due."""
    alive(world, "s1", "s2", "s3")
    allotments.fill(world.engine, 10)
    for shard in range(4):
        end_rows(world, shard, State.DEFERRED if shard == 0 else State.DELIVERED)
    monkeypatch.setattr(openings, "ROWS_TO_JOIN", 10)

    def found(due: int) -> list[Opening]:
        """With so many of 30 rows due."""
        later = int(time.time()) + 3600
        with reading(world.engine) as connection:
            waiting = connection.execute(sa.select(Delivery.contact_id).where(Delivery.shard == 0).order_by(Delivery.contact_id)).scalars().all()
        assert len(waiting) == 30
        rows = sa.update(Delivery).where(Delivery.contact_id.in_(waiting[due:]))
        transact(world.engine, lambda connection: connection.execute(rows.values(sort_key=later, reason="window")))
        with world.engine.connect() as connection:
            return openings.find(connection, dt.datetime.now(dt.UTC), slots=2, heartbeat_seconds=10, in_flight=())

    assert [len(found(due)) for due in (30, 20, 19, 10, 9)] == [3, 3, 2, 2, 1]


def test_a_server_without_room_for_its_log_gets_no_runs(world: World) -> None:
    alive(world, "s1", "s2")
    allotments.fill(world.engine, 10)
    transact(world.engine, lambda connection: connection.execute(sa.update(Server).where(Server.key == "s1").values(health={"free_mb": 99})))
    with world.engine.connect() as connection:
        found = openings.find(connection, dt.datetime.now(dt.UTC), slots=2, heartbeat_seconds=10, in_flight=())
    assert {opening.server for opening in found} == {"s2"}


def test_a_server_whose_clock_is_off_is_named_every_tick(world: World, instance: dg.DagsterInstance, repository: dg.RepositoryDefinition) -> None:
    alive(world, "s1", "s2", "s3")
    world.set_server("s1", health={"clock_ahead": -301.0})
    world.set_server("s2", health={"clock_ahead": 2.0})
    tick = context(instance, repository)
    with mock.patch.object(tick.log, "warning") as warning:
        servers.server_health(tick, DATABASE)
    ((words, *values),) = [call.args for call in warning.call_args_list]
    assert (words % tuple(values)).startswith("the clock of s1 is 301 s behind the database's: let NTP set it")


def test_the_days_of_a_warm_up_are_judged_and_the_server_has_runs(
    world: World, instance: dg.DagsterInstance, repository: dg.RepositoryDefinition, monkeypatch: pytest.MonkeyPatch
) -> None:
    alive(world, "s1")
    with reading(world.engine) as connection:
        server, now = fleet.find(connection, "s1"), database_now(connection)
    today = warm_up.day_of(now)
    # No day ends meanwhile, and no slot.
    for module in (warm_up, allotments):
        monkeypatch.setattr(module, "database_now", lambda connection: now)
    used = {"server_id": server.id, "provider": "google", "window_seconds": warm_up.DAY, "window_start": today - warm_up.DAY, "used": 400}

    def begin(connection: sa.Connection) -> None:
        warm_up.set_by_hand(connection, "s1", dt.datetime.fromtimestamp(today - warm_up.DAY, dt.UTC), curve="careful")
        connection.execute(sa.insert(ProviderUsage).values(used))

    transact(world.engine, begin)
    tick = context(instance, repository)
    with mock.patch.object(tick.log, "info") as info:
        servers.server_health(tick, DATABASE)
        servers.server_health(tick, DATABASE)
    ((words, change),) = [call.args for call in info.call_args_list]
    yesterday = dt.datetime.fromtimestamp(today - 1, dt.UTC).date()
    assert words % change == f"warm-up of s1 to google: step 0 → 1 after {yesterday}: used 83% of 480 with good signals"
    assert {limit.name: limit.limit for limit in instance.event_log_storage.get_pool_limits()}["dispatch"] == 2
    instance.add_dynamic_partitions("campaigns", ["spring"])
    result = shards.open_shards(context(instance, repository), DATABASE)
    assert isinstance(result, dg.SensorResult)
    assert {request.tags[QUEUE_TAG] for request in result.run_requests or ()} == {"s1"}
    with reading(world.engine) as connection:
        assert fleet.find(connection, "s1").state == "warming"
        assert fleet.choose(connection, world.campaign_id, None, 10).key == "s1"
        assert fleet.find(connection, "s1").sends
        query = sa.select(Allotment.provider, Allotment.granted).where(Allotment.slot_start == slot_at(now))
        assert dict(connection.execute(query).tuples().all()) == {"google": 672, "microsoft": 480, "yahoo": 480, "other": 480}


@pytest.mark.parametrize("state", ["paused", "scheduled", "cancelled", "finished"])
def test_no_runs_for_a_campaign_that_is_not_sending(world: World, instance: dg.DagsterInstance, repository: dg.RepositoryDefinition, state: str) -> None:
    alive(world, "s1")
    instance.add_dynamic_partitions("campaigns", ["spring"])
    world.set_campaign(state=state)
    assert isinstance(shards.open_shards(context(instance, repository), DATABASE), dg.SkipReason)


@pytest.mark.parametrize(
    ("kind", "key", "left"),
    [(kind, None, {}) for kind in (Kind.EVERYTHING, Kind.CAMPAIGN, Kind.BRAND, Kind.POOL)]
    + [(Kind.SERVER, "s1", {"s2": 2}), (Kind.PROVIDER, "google", {"s1": 2, "s2": 1})],
)
def test_no_runs_for_what_is_held_until_it_is_released(
    world: World, instance: dg.DagsterInstance, repository: dg.RepositoryDefinition, kind: Kind, key: str | None, left: dict[str, int]
) -> None:
    def asked() -> Counter[str]:
        result = shards.open_shards(context(instance, repository), DATABASE)
        return Counter(request.tags[QUEUE_TAG] for request in (result.run_requests if isinstance(result, dg.SensorResult) else None) or [])

    alive(world, "s1", "s2")
    instance.add_dynamic_partitions("campaigns", ["spring"])
    # Grants that were given before a hold are worth nothing under it.
    assert asked() == {"s1": 2, "s2": 2}
    world.hold(kind, key)
    assert asked() == left
    # Each shard of this world is to one provider.
    if kind is Kind.PROVIDER:
        for provider in {"microsoft", "yahoo", "other"}:
            world.hold(kind, provider)
        assert asked() == {}
        for provider in {"microsoft", "yahoo", "other"}:
            world.release(kind, provider)
    world.release(kind, key)
    assert asked() == {"s1": 2, "s2": 2}


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
    assert json.loads(later.cursor or "")["partial"]["spring"][:3] == [0, 1, 4]
    end_rows(world, 2)
    end_rows(world, 3)
    last = shards.finished_shards(context(instance, repository, later.cursor), DATABASE)
    # Dagster on MySQL keeps a cursor of 64 KB at most.
    assert json.loads(last.cursor or "") == {"complete": [1], "partial": {}}
    assert isinstance(shards.finished_shards(context(instance, repository, last.cursor), DATABASE), dg.SkipReason)


def test_results_are_asked_for_once_when_the_ledger_says_finished(world: World, instance: dg.DagsterInstance, repository: dg.RepositoryDefinition) -> None:
    instance.add_dynamic_partitions("campaigns", ["spring"])
    assert asked_for(campaigns.finished_campaigns(context(instance, repository), DATABASE)) == []
    world.set_campaign(started_at=dt.datetime.now(dt.UTC) - dt.timedelta(minutes=6))
    begin = dt.datetime.now(dt.UTC)
    first = campaigns.finished_campaigns(context(instance, repository), DATABASE)
    # By the hour in which the sensor looked.
    assert asked_for(first) in [[("report_campaign", f"spring:{moment:%Y-%m-%dT%H}")] for moment in (begin, dt.datetime.now(dt.UTC))]
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
        monkeypatch.setattr(runs_of_dagster, "START_SECONDS", 0)
        servers.server_health(context(instance, repository), DATABASE)
        statuses = [instance.get_run_by_id(run.run_id).status for run in runs]  # type: ignore[union-attr]
    assert statuses == [dg.DagsterRunStatus.STARTED, dg.DagsterRunStatus.FAILURE]
    assert {limit.name: limit.limit for limit in instance.event_log_storage.get_pool_limits()}["dispatch"] == 2


def test_what_a_revoked_server_called_started_is_marked_failed(world: World, instance: dg.DagsterInstance, repository: dg.RepositoryDefinition) -> None:
    """It fills Dagster's limits on runs at once otherwise."""
    alive(world, "stolen", "other")
    world.set_server("stolen", state="retired")
    runs = [start_run(instance, "send_campaign", **{QUEUE_TAG: key, "dagster/partition": "spring|00"}) for key in ("stolen", "other")]
    servers.server_health(context(instance, repository), DATABASE)
    assert [status(instance, run) for run in runs] == [dg.DagsterRunStatus.FAILURE, dg.DagsterRunStatus.STARTED]


def test_a_server_of_another_host_that_is_silent_for_half_an_hour_is_lost(
    world: World, instance: dg.DagsterInstance, repository: dg.RepositoryDefinition
) -> None:
    """By the database's clock, and only what the centre has watched: not after it was stopped itself, nor when the server speaks again."""
    alive(world, "near", "paused", "far", "back")
    world.folders("near").journal.touch()
    world.server("new")
    world.set_server("paused", state="paused")
    with reading(world.engine) as connection:
        now = database_now(connection)
        far = fleet.find(connection, "far")
    old = now - dt.timedelta(hours=1)
    for key in ("near", "paused", "far", "back"):
        world.set_server(key, heartbeat_at=old)
    world.grant(far)
    opened = world.claim(far, shard=1)
    assert isinstance(opened, OpenClaim)
    run = start_run(instance, "send_campaign", **{QUEUE_TAG: "far", "dagster/partition": "spring|00"})
    audit = start_run(instance, "audit_delivery_logs", **{QUEUE_TAG: "far-ctl", "dagster/partition": "far"})

    def look(cursor: Any = None) -> Any:
        result = servers.server_health(context(instance, repository, json.dumps(cursor) if cursor else None), DATABASE)
        return json.loads(result.cursor or "")

    def states() -> dict[str, str]:
        with reading(world.engine) as connection:
            return {server.key: server.state for server in fleet.all_servers(connection)}

    before = {"near": "active", "paused": "paused", "far": "active", "new": "active", "back": "active"}
    first = look()
    assert sorted(first["since"]) == ["back", "far"]
    assert [status(instance, one) for one in (run, audit)] == [dg.DagsterRunStatus.STARTED] * 2
    look(first | {"since": {"far": (now - dt.timedelta(seconds=31)).isoformat()}})
    assert [status(instance, one) for one in (run, audit)] == [dg.DagsterRunStatus.FAILURE] * 2
    watched = now - dt.timedelta(minutes=31)
    # The centre was stopped between these looks.
    gone = first | {"since": {"far": watched.isoformat()}, "at": (now - dt.timedelta(minutes=6)).isoformat()}
    assert dt.datetime.fromisoformat(look(gone)["since"]["far"]) >= now
    assert states() == before
    world.set_server("back", heartbeat_at=dt.datetime.now(dt.UTC))
    look(first | {"since": {key: watched.isoformat() for key in ("far", "back")}})
    assert states() == before | {"far": "lost"}
    assert world.states() == {State.PENDING: 120 - len(opened.rows), State.UNKNOWN: len(opened.rows)}
    assert world.open_claims() == 0
    world.check_counters()


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


def inbox_files(world: World, *names: str) -> Path:
    """Files in the list `news` of the inbox, written a minute ago, in this order."""
    folder = Path(world.settings.operation.inbox) / "news"
    folder.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(names):
        (folder / name).write_bytes(b"email\n")
        os.utime(folder / name, (time.time() - 60 + number, time.time() - 60 + number))
    return folder


def imports(instance: dg.DagsterInstance, repository: dg.RepositoryDefinition) -> list[dg.RunRequest]:
    result = files.dropped_files(context(instance, repository), DATABASE)
    return list(result.run_requests or []) if isinstance(result, dg.SensorResult) else []


def start_import(instance: dg.DagsterInstance, request: dg.RunRequest) -> dg.DagsterRun:
    job = build_defs().resolve_job_def("import_contacts")
    return instance.create_run_for_job(job, run_config=request.run_config, tags=request.tags, status=dg.DagsterRunStatus.STARTED)


def test_dropped_files_are_imported_oldest_first_and_not_twice_at_a_time(
    world: World, instance: dg.DagsterInstance, repository: dg.RepositoryDefinition
) -> None:
    folder = inbox_files(world, "a.csv", "a.csv.rejected.csv", "b.parquet", "notes.txt")
    (folder / "still-written.csv").write_bytes(b"email\n")
    requests = imports(instance, repository)
    assert [Path(request.run_config["ops"]["import_file"]["config"]["path"]).name for request in requests] == ["a.csv", "b.parquet"]
    assert {request.run_config["ops"]["import_file"]["config"]["list_name"] for request in requests} == {"news"}
    for request in requests:
        start_import(instance, request)
    assert imports(instance, repository) == []


def test_a_killed_import_is_asked_for_again_and_a_failing_file_is_left_after_three(
    world: World, instance: dg.DagsterInstance, repository: dg.RepositoryDefinition
) -> None:
    folder = inbox_files(world, "a.csv")
    for _ in range(3):
        (request,) = imports(instance, repository)
        instance.report_run_failed(start_import(instance, request))
    assert imports(instance, repository) == []
    (folder / "a.csv").write_bytes(b"email\na@small.test\n")
    os.utime(folder / "a.csv", (time.time() - 30, time.time() - 30))
    # Another version of the file is another matter.
    assert len(imports(instance, repository)) == 1


def test_a_file_whose_import_was_cancelled_is_left(world: World, instance: dg.DagsterInstance, repository: dg.RepositoryDefinition) -> None:
    inbox_files(world, "a.csv")
    (request,) = imports(instance, repository)
    instance.report_run_canceled(start_import(instance, request))
    assert imports(instance, repository) == []


def test_tags_of_an_import_do_not_tell_the_file(world: World, instance: dg.DagsterInstance, repository: dg.RepositoryDefinition) -> None:
    inbox_files(world, "friends-of-jo.csv")
    (request,) = imports(instance, repository)
    assert "jo" not in " ".join(request.tags.values())


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


# --- liveness -----------------------------------------------------------------------------------------------------


def start_run(instance: dg.DagsterInstance, job_name: str, **tags: str) -> dg.DagsterRun:
    file = {"ops": {"import_file": {"config": {"path": "a.csv", "list_name": "news"}}}}
    run = instance.create_run_for_job(
        build_defs().resolve_job_def(job_name), tags=tags, run_config=file if job_name == "import_contacts" else None, status=dg.DagsterRunStatus.STARTING
    )
    instance.handle_new_event(_started(run))
    return run


def status(instance: dg.DagsterInstance, run: dg.DagsterRun) -> dg.DagsterRunStatus:
    found = instance.get_run_by_id(run.run_id)
    assert found is not None
    return found.status


def test_a_run_proves_until_its_end_is_recorded_that_its_process_lives(world: World, instance: dg.DagsterInstance) -> None:
    job = build_defs().resolve_job_def("close_open_rows")
    seen = []

    def look(_connection: object, *_rest: object) -> None:
        (run,) = instance.get_runs(limit=1)
        seen.append((run.status, is_locked(run_lock(world.settings, run.run_id))))

    engine = DATABASE.engine
    sa.event.listen(engine, "before_cursor_execute", look)
    first = job.execute_in_process(instance=instance, resources={"database": DATABASE})
    sa.event.remove(engine, "before_cursor_execute", look)
    assert set(seen) == {(dg.DagsterRunStatus.STARTED, True)}
    assert is_locked(run_lock(world.settings, first.run_id))
    # The next run of the same process ends the proof of the one before.
    second = job.execute_in_process(instance=instance, resources={"database": DATABASE})
    assert not run_lock(world.settings, first.run_id).exists()
    assert is_locked(run_lock(world.settings, second.run_id))


@pytest.mark.parametrize("job_name", ["build_audience", "close_open_rows", "import_contacts"])
def test_a_killed_run_of_the_centre_is_marked_failed_and_a_living_or_young_one_is_not(
    world: World, instance: dg.DagsterInstance, repository: dg.RepositoryDefinition, monkeypatch: pytest.MonkeyPatch, job_name: str
) -> None:
    killed, living = start_run(instance, job_name), start_run(instance, job_name)
    run_lock(world.settings, killed.run_id).parent.mkdir(parents=True, exist_ok=True)
    run_lock(world.settings, killed.run_id).touch()
    with only_one(run_lock(world.settings, living.run_id), "the other run"):
        servers.server_health(context(instance, repository), DATABASE)
        assert status(instance, killed) is dg.DagsterRunStatus.STARTED
        monkeypatch.setattr(runs_of_dagster, "START_SECONDS", 0)
        servers.server_health(context(instance, repository), DATABASE)
        assert status(instance, killed) is dg.DagsterRunStatus.FAILURE
        assert status(instance, living) is dg.DagsterRunStatus.STARTED
    assert not run_lock(world.settings, killed.run_id).exists()


def test_a_run_that_ended_while_it_was_looked_at_keeps_its_end(world: World, instance: dg.DagsterInstance) -> None:
    run = start_run(instance, "close_open_rows")
    instance.report_run_canceled(run)
    assert not runs_of_dagster.report_gone(instance, run, "gone")
    assert status(instance, run) is dg.DagsterRunStatus.CANCELED


def test_a_freeze_that_was_killed_is_asked_for_again(
    world: World, instance: dg.DagsterInstance, repository: dg.RepositoryDefinition, monkeypatch: pytest.MonkeyPatch
) -> None:
    instance.add_dynamic_partitions("campaigns", ["spring"])
    world.set_campaign(state="building", start_at=dt.datetime.now(dt.UTC))
    start_run(instance, "build_audience", **{"dagster/partition": "spring"})
    assert campaigns.due_campaigns(context(instance, repository), DATABASE).run_requests == []
    monkeypatch.setattr(runs_of_dagster, "START_SECONDS", 0)
    servers.server_health(context(instance, repository), DATABASE)
    assert len(campaigns.due_campaigns(context(instance, repository), DATABASE).run_requests or []) == 1


# --- holds --------------------------------------------------------------------------------------------------------


def fail(instance: dg.DagsterInstance, job_name: str = "build_audience", **tags: str) -> dg.RunFailureSensorContext:
    """A failed run of `spring`, and the context in which the failure sensor hears of it."""
    run = start_run(instance, job_name, **{"dagster/partition": "spring"} | tags)
    event = instance.report_run_failed(run)
    failed = instance.get_run_by_id(run.run_id)
    assert failed is not None
    return dg.build_run_status_sensor_context("failed_runs", dagster_event=event, dagster_instance=instance, dagster_run=failed).for_run_failure()


@pytest.mark.slow
def test_a_campaign_held_after_three_failed_freezes_has_three_more_when_it_is_resumed(
    world: World, instance: dg.DagsterInstance, repository: dg.RepositoryDefinition
) -> None:
    def asked() -> int:
        return len(campaigns.due_campaigns(context(instance, repository), DATABASE).run_requests or [])

    instance.add_dynamic_partitions("campaigns", ["spring"])
    world.set_campaign(state="scheduled", start_at=dt.datetime.now(dt.UTC))
    for _ in range(2):
        for failure in range(3):
            assert asked() == 1
            heard = fail(instance)
            failures.failed_runs(heard, DATABASE)
            assert (world.held() is not None) == (failure == 2)
        assert heard.dagster_run.run_id in (world.held() or "")
        assert asked() == 0
        scheduling.resume(world.engine, "spring", dt.datetime.now(dt.UTC), "tester")
        # A failure that is heard of late does not hold it again.
        failures.failed_runs(heard, DATABASE)
        assert world.held() is None


@pytest.mark.slow
def test_failures_of_other_runs_hold_nothing(world: World, instance: dg.DagsterInstance) -> None:
    for job_name, key in (("send_campaign", "spring|00"), ("report_campaign", "spring"), ("build_audience", "no-such-campaign")):
        for _ in range(3):
            run = start_run(instance, job_name, **{"dagster/partition": key})
            event = instance.report_run_failed(run)
            heard = dg.build_run_status_sensor_context("failed_runs", dagster_event=event, dagster_instance=instance, dagster_run=run)
            failures.failed_runs(heard.for_run_failure(), DATABASE)
    assert world.held() is None


@pytest.mark.slow
def test_failed_results_of_the_end_are_asked_for_again_but_not_for_ever(world: World, instance: dg.DagsterInstance) -> None:
    assert failures.failed_runs(fail(instance, "report_campaign", **{"dagster/run_key": "spring:2026-03-02T10"}), DATABASE) is None
    start_run(instance, "report_campaign", **{"dagster/partition": "spring"})
    run_key: str | None = "spring:finished"
    asked = []
    while run_key is not None:
        request = failures.failed_runs(fail(instance, "report_campaign", **{"dagster/run_key": run_key}), DATABASE)
        run_key = request.run_key if request else None
        asked.append(run_key)
    assert asked == ["spring:finished:1", "spring:finished:2", None]


# --- the end ------------------------------------------------------------------------------------------------------


def asked_for(result: dg.SensorResult) -> list[tuple[str | None, str | None]]:
    return [(request.job_name, request.run_key) for request in result.run_requests or []]


def test_results_of_a_cancelled_campaign_wait_for_its_last_row(world: World, instance: dg.DagsterInstance, repository: dg.RepositoryDefinition) -> None:
    instance.add_dynamic_partitions("campaigns", ["spring"])
    now = dt.datetime.now(dt.UTC)
    end_rows(world, 0, State.UNKNOWN)
    assert lifecycle.cancel(world.engine, "spring", now) == 90
    begin = dt.datetime.now(dt.UTC)
    result = campaigns.finished_campaigns(context(instance, repository), DATABASE)
    assert asked_for(result) in [[("close_open_rows", f"unknown:{moment:%Y-%m-%dT%H}")] for moment in (begin, dt.datetime.now(dt.UTC))]
    long_ago = int((now - dt.timedelta(hours=73)).timestamp())
    transact(world.engine, lambda c: c.execute(sa.update(Delivery).where(Delivery.state == int(State.UNKNOWN)).values(sort_key=long_ago)))
    job = build_defs().resolve_job_def("close_open_rows")
    assert job.execute_in_process(instance=instance, resources={"database": DATABASE}).success
    assert world.states() == {State.UNRESOLVED: 30, State.CANCELLED: 90}
    world.check_counters()
    result = campaigns.finished_campaigns(context(instance, repository, result.cursor), DATABASE)
    assert asked_for(result) == [("report_campaign", "spring:finished")]
    assert asked_for(campaigns.finished_campaigns(context(instance, repository, result.cursor), DATABASE)) == []


@pytest.mark.parametrize(("days", "asked"), [(5, [("report_campaign", "spring:finished")]), (20, [])])
def test_results_are_asked_for_also_when_the_daemon_was_down(
    world: World, instance: dg.DagsterInstance, repository: dg.RepositoryDefinition, days: int, asked: list[tuple[str, str]]
) -> None:
    for shard in range(4):
        end_rows(world, shard)
    world.set_campaign(state="finished", finished_at=dt.datetime.now(dt.UTC) - dt.timedelta(days=days))
    # Without a key Dagster cannot be asked, and that must not be forgotten.
    unknown = campaigns.finished_campaigns(context(instance, repository), DATABASE)
    assert asked_for(unknown) == []
    instance.add_dynamic_partitions("campaigns", ["spring"])
    result = campaigns.finished_campaigns(context(instance, repository, unknown.cursor), DATABASE)
    assert asked_for(result) == asked
    assert asked_for(campaigns.finished_campaigns(context(instance, repository, result.cursor), DATABASE)) == []


@pytest.mark.slow
def test_a_tick_stays_bounded_with_300_campaigns(world: World, instance: dg.DagsterInstance, repository: dg.RepositoryDefinition) -> None:
    now = dt.datetime.now(dt.UTC)
    states = ("scheduled", "sending", "paused", "finished", "cancelled", "finished")
    rows = []
    for number in range(300):
        state = states[number % len(states)]
        ended = None if state in ("scheduled", "sending", "paused") else now - dt.timedelta(days=40 if number % 6 == 5 else 3)
        rows.append(
            {"id": 1_000 + number, "key": f"c{number}", "name": "c", "state": state, "brand_id": 1, "segments": {"include": [], "exclude": []}}
            | {"unsubscribe": "all", "on_unknown": "hold", "priority": 1, "start_at": now, "expire_at": now + dt.timedelta(days=1), "shards": 4}
            | {"version_id": 1, "created_at": now, "updated_at": now, "started_at": now - dt.timedelta(hours=1), "finished_at": ended}
        )
    world.set_campaign(started_at=now - dt.timedelta(hours=1))
    counts = [
        {"campaign_id": 1_000 + number, "shard": shard, "provider": provider, "server_id": server, "state": int(state), "count": 1}
        for number in range(300)
        for shard in range(4)
        for provider in ("google", "other")
        for server in (1, 2)
        for state in ((State.PENDING, State.DELIVERED) if number % 6 in (1, 2) else (State.DELIVERED,))
    ]
    transact(world.engine, lambda c: (c.execute(sa.insert(Campaign), rows), c.execute(sa.insert(CampaignCounter), counts)))
    # The processor time of this process: other work on the machine does not count.
    begin = time.process_time()
    due = campaigns.due_campaigns(context(instance, repository), DATABASE)
    assert time.process_time() - begin < 1
    keys = {key for request in due.dynamic_partitions_requests or [] for key in request.partition_keys}
    assert len(keys) == campaigns.KEYS_A_TICK
    for _ in range(10):
        instance.add_dynamic_partitions("campaigns", sorted(keys))
        due = campaigns.due_campaigns(context(instance, repository), DATABASE)
        keys = {key for request in due.dynamic_partitions_requests or [] for key in request.partition_keys}
    # Those over for 40 days get no key any more.
    assert len(instance.get_dynamic_partitions("campaigns")) == 251
    begin = time.process_time()
    assert len(campaigns.due_campaigns(context(instance, repository), DATABASE).run_requests or []) == lifecycle.DUE_A_TICK
    assert time.process_time() - begin < 1
    asked, cursor = [], None
    for _ in range(6):
        begin = time.process_time()
        result = campaigns.finished_campaigns(context(instance, repository, cursor), DATABASE)
        assert time.process_time() - begin < 1
        assert len(result.run_requests or []) <= campaigns.REPORTS_A_TICK
        asked += [run_key for _, run_key in asked_for(result)]
        cursor = result.cursor
    # 100 that are over and 101 that run, each once.
    assert len(asked) == len(set(asked)) == 201
