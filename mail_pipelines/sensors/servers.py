"""Servers: their keys and slots in Dagster, and runs whose process has gone."""

from __future__ import annotations

import time

import dagster as dg

from mail_pipelines import partitions
from mail_pipelines.database.engine import database_now, reading
from mail_pipelines.dispatch import servers
from mail_pipelines.dispatch.files import ServerFolders, is_locked
from mail_pipelines.resources.database import CentralDatabase
from mail_pipelines.resources.server import QUEUE_TAG
from mail_pipelines.sensors.campaigns import missing_keys

SEND_POOL = "dispatch"
# From the start of a run's process to the lock of its session: imports and a look at the database.
START_SECONDS = 60


def server_health(context: dg.SensorEvaluationContext, database: CentralDatabase) -> dg.SensorResult | dg.SkipReason:
    """Keep the send slots equal to what the active servers offer, and mark runs failed whose session is gone."""
    settings = database.settings
    with reading(database.engine) as connection:
        fleet = servers.all_servers(connection)
        now = database_now(connection)
    speaking = [server for server in fleet if server.state == "active" and not server.is_silent(now, settings.server.heartbeat_seconds)]
    _set_slots(context.instance, max(1, len(speaking) * settings.server.slots))
    for run in _dead_runs(context.instance, {server.key: ServerFolders.of(settings.server, server.key) for server in fleet}):
        context.instance.report_run_failed(run, "the session's process is gone; its claims are settled by the next run on the same server")
    new = missing_keys([server.key for server in fleet], context.instance.get_dynamic_partitions(partitions.servers.name or ""))
    silent = [server.key for server in fleet if server.state == "active" and server not in speaking]
    if silent:
        context.log.warning("silent servers: %s", ", ".join(silent))
    if new:
        return dg.SensorResult(dynamic_partitions_requests=[partitions.servers.build_add_request(new)])
    return dg.SkipReason(f"{len(speaking)} of {len(fleet)} servers are active and speaking")


def _set_slots(instance: dg.DagsterInstance, slots: int) -> None:
    storage = instance.event_log_storage
    current = {limit.name: limit.limit for limit in storage.get_pool_limits()}
    if current.get(SEND_POOL) != slots:
        storage.set_concurrency_slots(SEND_POOL, slots)


def _dead_runs(instance: dg.DagsterInstance, folders: dict[str, ServerFolders]) -> list[dg.DagsterRun]:
    """Send runs that Dagster calls started, of servers on this host, whose session no living process holds."""
    dead = []
    started = dg.RunsFilter(job_name="send_campaign", statuses=[dg.DagsterRunStatus.STARTED])
    for record in instance.get_run_records(started, limit=200):
        run = record.dagster_run
        place = folders.get(run.tags.get(QUEUE_TAG, ""))
        if place is None or not place.journal.exists() or record.start_time is None or time.time() - record.start_time < START_SECONDS:
            continue
        if not is_locked(place.sessions / run.run_id):
            dead.append(run)
    return dead
