"""Nightly upkeep: old runs of Dagster go and what they achieved stays, old events become sums."""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterator
from pathlib import Path

import dagster as dg
import pytest
import sqlalchemy as sa

from mail_pipelines import partitions
from mail_pipelines.assets.sending import send_batches
from mail_pipelines.campaigns import archiving
from mail_pipelines.contacts import changes
from mail_pipelines.database.engine import is_mysql, reading, transact
from mail_pipelines.database.models import DeliveryEvent, EngagementEvent, EngagementSum, State
from mail_pipelines.definitions import build_defs
from mail_pipelines.ops import maintenance
from mail_pipelines.resources.database import CentralDatabase
from mail_pipelines.sensors import campaigns, shards
from tests.dispatch.world import World
from tests.orchestration.test_sensors import context, end_rows

DATABASE = CentralDatabase()


def prune(instance: dg.DagsterInstance) -> None:
    job = build_defs().resolve_job_def("maintenance")
    assert job.execute_in_process(instance=instance, resources={"database": DATABASE}).success


@pytest.mark.slow
def test_final_shards_stay_green_when_old_runs_are_deleted(world: World, instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch) -> None:
    instance.add_dynamic_partitions("campaigns", ["spring"])
    for shard in range(4):
        end_rows(world, shard, State.DELIVERED)
    result = shards.finished_shards(context(instance, build_defs().get_repository_def()), DATABASE)
    assert isinstance(result, dg.SensorResult)
    for event in result.asset_events:
        instance.report_runless_asset_event(event)
    final = {str(partitions.batch_key("spring", shard)) for shard in range(64)}
    assert instance.get_materialized_partitions(send_batches.key) == final
    job = build_defs().resolve_job_def("refresh_snapshots")
    old = [instance.create_run_for_job(job, status=dg.DagsterRunStatus.SUCCESS).run_id for _ in range(3)]
    monkeypatch.setattr(maintenance, "KEEP_RUNS_DAYS", -1)
    prune(instance)
    assert not any(instance.has_run(run_id) for run_id in old)
    assert instance.get_materialized_partitions(send_batches.key) == final


@pytest.fixture
def alike(world: World, request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[dg.DagsterInstance]:
    """An instance whose storage is in the same kind of database as the ledger."""
    if not is_mysql(world.engine):
        yield request.getfixturevalue("instance")
        return
    url = request.getfixturevalue("mariadb").database().replace("+pymysql", "+mysqlconnector")
    (folder := tmp_path / "dagster").mkdir()
    with dg.instance_for_test(overrides={"storage": {"mysql": {"mysql_url": url}}}, temp_dir=str(folder)) as instance:
        yield instance


@pytest.mark.slow
def test_partitions_of_archived_campaigns_go_when_the_last_runs_are_gone(world: World, alike: dg.DagsterInstance) -> None:
    """Until then final shards stay green, and afterwards no sensor brings them back."""
    alike.add_dynamic_partitions("campaigns", ["spring", "summer"])
    for shard in range(4):
        end_rows(world, shard, State.DELIVERED)
    repository = build_defs().get_repository_def()
    result = shards.finished_shards(context(alike, repository), DATABASE)
    assert isinstance(result, dg.SensorResult)
    for event in result.asset_events:
        alike.report_runless_asset_event(event)
    final = {str(partitions.batch_key("spring", shard)) for shard in range(partitions.SHARDS)}

    def green() -> set[str]:
        """Partitions that there are, and that Dagster shows as materialised."""
        there = partitions.campaign_shards.get_partition_keys(dynamic_partitions_store=alike)
        return {str(key) for key in there} & alike.get_materialized_partitions(send_batches.key)

    now = dt.datetime.now(dt.UTC)
    Path(world.settings.campaigns.archive).mkdir(parents=True)
    world.set_campaign(state="finished", finished_at=now - dt.timedelta(days=300))
    prune(alike)
    with reading(world.engine) as connection:
        assert archiving.archived_before(connection, now) == set()
        assert archiving.archived_before(connection, now + dt.timedelta(days=1)) == {"spring"}
    assert green() == final
    for days, expected in ((maintenance.KEEP_RUNS_DAYS - 1, final), (maintenance.KEEP_RUNS_DAYS + 1, set())):
        # As if it had been archived as soon as it was over: a sensor brings none back that was archived later.
        world.set_campaign(finished_at=now - dt.timedelta(days=days), archived_at=now - dt.timedelta(days=days))
        prune(alike)
        assert green() == expected
    assert alike.get_dynamic_partitions("campaigns") == ["summer"]
    due = campaigns.due_campaigns(context(alike, repository), DATABASE)
    assert [key for request in due.dynamic_partitions_requests or [] for key in request.partition_keys] == []
    result = shards.finished_shards(context(alike, repository), DATABASE)
    assert isinstance(result, dg.SkipReason) or not result.asset_events


@pytest.mark.slow
def test_young_and_unfinished_runs_are_kept(world: World, instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch) -> None:
    job = build_defs().resolve_job_def("refresh_snapshots")
    young = instance.create_run_for_job(job, status=dg.DagsterRunStatus.FAILURE)
    prune(instance)
    assert instance.has_run(young.run_id)
    working = instance.create_run_for_job(job, status=dg.DagsterRunStatus.STARTED)
    monkeypatch.setattr(maintenance, "KEEP_RUNS_DAYS", -1)
    prune(instance)
    assert (instance.has_run(young.run_id), instance.has_run(working.run_id)) == (False, True)


@pytest.mark.slow
def test_old_events_are_rolled_up_and_the_night_says_how_many(world: World, instance: dg.DagsterInstance) -> None:
    at = dt.datetime.now(dt.UTC) - dt.timedelta(days=500)
    event = {"month": at.year * 100 + at.month, "occurred_at": at, "campaign_id": world.campaign_id, "contact_id": 1}
    opened = [event | {"id": number, "recorded_at": at, "kind": "open", "machine": False} for number in range(3)]
    world.set_campaign(state="finished")

    def write(connection: sa.Connection) -> None:
        connection.execute(sa.insert(EngagementEvent), opened)
        connection.execute(sa.insert(DeliveryEvent).values(event | {"id": 9, "attempt": 0, "kind": "deferred"}))

    transact(world.engine, write)
    transact(world.engine, lambda connection: changes.record(connection, range(5), "upsert", now=at))
    transact(world.engine, lambda connection: changes.record(connection, [1], "upsert", now=dt.datetime.now(dt.UTC)))
    job = build_defs().resolve_job_def("maintenance")
    result = job.execute_in_process(instance=instance, resources={"database": DATABASE})

    def told(op: str) -> dict[str, object]:
        (metadata,) = [event.step_output_data.metadata for event in result.events_for_node(op) if event.is_successful_output]
        return {name: entry.value for name, entry in metadata.items()}

    retired = told("retire_events")
    assert (retired["events_rolled_up"], retired["deferrals_dropped"]) == (3, 1)
    pruned = told("prune_bookkeeping")
    assert (pruned["contact_changes"], pruned["sync_outbox"], pruned["sync_dead_letters"], pruned["claims"]) == (5, 0, 0, 0)
    with reading(world.engine) as connection:
        assert connection.execute(sa.select(EngagementSum.count)).scalars().all() == [3]
