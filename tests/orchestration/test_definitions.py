"""What Dagster sees: names, defaults and rules that other parts rely on."""

from __future__ import annotations

import dagster as dg
import pytest

from mail_pipelines import partitions
from mail_pipelines.definitions import build_defs

ASSETS = {
    "contact_snapshot": "audience",
    "engagement_snapshot": "audience",
    "recipient_segments": "audience",
    "campaign_audiences": "audience",
    "send_batches": "sending",
    "delivery_results": "delivery",
    "delivery_logs": "delivery",
    "campaign_statistics": "reporting",
    "capacity_plan": "capacity",
}
SENSORS = {
    "alerts",
    "dropped_files",
    "due_campaigns",
    "open_shards",
    "finished_shards",
    "finished_campaigns",
    "server_health",
    "capacity_shortage",
    "failed_runs",
    "inbound_mail",
}
JOBS = {
    "build_audience",
    "send_campaign",
    "report_campaign",
    "audit_delivery_logs",
    "refresh_snapshots",
    "plan_capacity",
    "maintenance",
    "close_open_rows",
    "import_contacts",
    "read_inbound_mail",
    "provision_server",
    "retire_server",
}


@pytest.fixture(scope="module")
def repository() -> dg.RepositoryDefinition:
    return build_defs().get_repository_def()


def test_the_graph_has_its_assets_in_their_groups_with_owner_kinds_and_words(repository: dg.RepositoryDefinition) -> None:
    found = {key.to_user_string(): repository.asset_graph.get(key) for key in repository.asset_graph.get_all_asset_keys()}
    assert {name: node.group_name for name, node in found.items()} == ASSETS
    for name, node in found.items():
        assert node.owners, name
        assert node.kinds, name
        assert node.description, name
        assert len(node.description.split()) > 8, name


def test_nothing_sends_by_itself(repository: dg.RepositoryDefinition) -> None:
    """No automation on what mails people: only the campaign's state and an explicit request start it."""
    for name in ASSETS:
        assert repository.asset_graph.get(dg.AssetKey(name)).automation_condition is None, name


def test_sensors_and_schedules_run_without_a_click(repository: dg.RepositoryDefinition) -> None:
    assert {sensor.name for sensor in repository.sensor_defs} == SENSORS
    assert {sensor.default_status for sensor in repository.sensor_defs} == {dg.DefaultSensorStatus.RUNNING}
    assert {schedule.name for schedule in repository.schedule_defs} == {"refresh_snapshots", "audit_delivery_logs", "plan_capacity", "maintenance"}
    assert {schedule.default_status for schedule in repository.schedule_defs} == {dg.DefaultScheduleStatus.RUNNING}


def test_the_jobs_are_there_with_a_description(repository: dg.RepositoryDefinition) -> None:
    jobs = {job.name: job for job in repository.get_all_jobs() if not job.name.startswith("__")}
    assert set(jobs) == JOBS
    assert all(job.description for job in jobs.values())
    assert jobs["send_campaign"].tags["dagster/max_retries"] == "0"


def test_every_edge_between_unlike_partitions_names_a_mapping(repository: dg.RepositoryDefinition) -> None:
    """Inferred mappings between dynamic partitions are wrong in silence: a backfill of one campaign would take all."""
    graph = repository.asset_graph
    for key in graph.get_all_asset_keys():
        node = graph.get(key)
        for parent in node.parent_keys:
            ours, theirs = node.partitions_def, graph.get(parent).partitions_def
            if ours is not None and theirs is not None and ours != theirs:
                assert parent in node.partition_mappings, f"{parent.to_user_string()} → {key.to_user_string()}"


def test_a_shard_belongs_to_its_campaign_alone() -> None:
    with dg.instance_for_test() as instance:
        instance.add_dynamic_partitions("campaigns", ["spring", "summer"])
        keys = partitions.campaign_shards.get_partition_keys(dynamic_partitions_store=instance)
        assert len(keys) == 128
        assert partitions.batch_key("spring", 7) in keys
        assert partitions.split_batch_key("spring|07") == ("spring", 7)


def test_runs_execute_in_one_process(repository: dg.RepositoryDefinition) -> None:
    assert repository.get_job("send_campaign").executor_def.name == "in_process"
