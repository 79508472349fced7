"""Servers: their keys and slots in Dagster, and runs whose process has gone."""

from __future__ import annotations

import datetime as dt
import time

import dagster as dg

from mail_pipelines import partitions
from mail_pipelines.config import Settings
from mail_pipelines.database.engine import database_now, reading
from mail_pipelines.dispatch import servers
from mail_pipelines.dispatch.files import ServerFolders, is_locked
from mail_pipelines.jobs import audit_delivery_logs, build_audience, refresh_snapshots_job, report_campaign, send_campaign
from mail_pipelines.ops.inbound import read_inbound_mail
from mail_pipelines.ops.maintenance import close_open_rows, import_contacts, maintenance
from mail_pipelines.resources.database import CentralDatabase, run_lock
from mail_pipelines.resources.queues import QUEUE_TAG, server_of
from mail_pipelines.sensors.campaigns import missing_keys
from mail_pipelines.sensors.runs import PARTITION_TAG, gone, report_gone, started

SEND_POOL = "dispatch"
# A server that has not been heard of for so long is not only slow: its runs are over for Dagster.
GONE_SECONDS = 300
CENTRE_JOBS = tuple(
    job.name for job in (build_audience, report_campaign, refresh_snapshots_job, maintenance, close_open_rows, import_contacts, read_inbound_mail)
)


def server_health(context: dg.SensorEvaluationContext, database: CentralDatabase) -> dg.SensorResult | dg.SkipReason:
    """Keep the send slots equal to what the active servers offer, and mark runs failed whose process is gone."""
    settings = database.settings
    with reading(database.engine) as connection:
        fleet = servers.all_servers(connection)
        now = database_now(connection)
    speaking = [server for server in fleet if server.state == "active" and not server.is_silent(now, settings.server.heartbeat_seconds)]
    _set_slots(context.instance, max(1, len(speaking) * settings.server.slots))
    _end_dead_sessions(context.instance, settings, {server.key: ServerFolders.of(settings.server, server.key) for server in fleet})
    _end_sessions_of_the_silent(context.instance, settings, {server.key for server in fleet if _is_gone(server, now)})
    _end_dead_audits(context.instance, settings)
    _end_dead_centre_runs(context.instance, settings)
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


def _end_dead_sessions(instance: dg.DagsterInstance, settings: Settings, folders: dict[str, ServerFolders]) -> None:
    """Mark send runs failed, of servers on this host, whose session no living process holds."""

    def lives(run: dg.DagsterRun) -> bool:
        place = folders.get(run.tags.get(QUEUE_TAG, ""))
        # A server without a journal here is another host's.
        return place is None or not place.journal.exists() or is_locked(place.sessions / run.run_id) or is_locked(run_lock(settings, run.run_id))

    for run in gone(started(instance, [send_campaign.name]), lives, time.time()):
        report_gone(instance, run, "the session's process is gone; its claims are settled by the next run on the same server")


def _is_gone(server: servers.ServerInfo, now: dt.datetime) -> bool:
    return server.heartbeat_at is None or now - server.heartbeat_at > dt.timedelta(seconds=GONE_SECONDS)


def _end_sessions_of_the_silent(instance: dg.DagsterInstance, settings: Settings, gone_servers: set[str]) -> None:
    """Mark runs failed that are on another host that has not been heard of for long: with the host, everything that could say so is gone.

    That only closes Dagster's books. What the ledger has claimed there stays so until the server is back and settles, or is declared lost.
    """

    def lives(run: dg.DagsterRun) -> bool:
        server = server_of(run.tags.get(QUEUE_TAG, ""), list(gone_servers))
        return server is None or ServerFolders.of(settings.server, server).journal.exists()

    for run in gone(started(instance, [send_campaign.name, audit_delivery_logs.name]), lives, time.time()):
        report_gone(instance, run, "its server has been silent for long; what it had in hand is settled when it is back")


def _end_dead_audits(instance: dg.DagsterInstance, settings: Settings) -> None:
    """Mark audits failed, of servers on this host, whose process is gone. The next one goes on where it was."""

    def lives(run: dg.DagsterRun) -> bool:
        journal = ServerFolders.of(settings.server, run.tags.get(PARTITION_TAG, "")).journal
        return not journal.exists() or is_locked(run_lock(settings, run.run_id))

    for run in gone(started(instance, [audit_delivery_logs.name]), lives, time.time()):
        report_gone(instance, run, "the audit's process is gone; the next one goes on where it was")


def _end_dead_centre_runs(instance: dg.DagsterInstance, settings: Settings) -> None:
    """Mark runs of the centre failed whose process is gone: they would block what is asked for once at a time until Dagster's time limit."""
    for run in gone(started(instance, CENTRE_JOBS), lambda run: is_locked(run_lock(settings, run.run_id)), time.time()):
        if report_gone(instance, run, "the run's process is gone; it is asked for again if it is still needed"):
            run_lock(settings, run.run_id).unlink(missing_ok=True)
