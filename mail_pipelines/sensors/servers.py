"""Servers: their keys and slots in Dagster, and runs whose process has gone."""

from __future__ import annotations

import datetime as dt
import json
import time
from collections.abc import Collection

import dagster as dg
from dagster._utils.concurrency import get_max_concurrency_limit_value

from mail_pipelines import partitions
from mail_pipelines.capacity import domain_breakers, health, warm_up
from mail_pipelines.config import Settings
from mail_pipelines.database.engine import database_now, reading
from mail_pipelines.dispatch import clock, registry, servers
from mail_pipelines.dispatch.files import ServerFolders, is_locked
from mail_pipelines.domains.resolver import ResolverError
from mail_pipelines.jobs import SYNC_EXTERNAL, audit_delivery_logs, build_audience, plan_capacity, refresh_snapshots_job, report_campaign, send_campaign
from mail_pipelines.ops.inbound import read_inbound_mail
from mail_pipelines.ops.maintenance import close_open_rows, import_contacts, maintenance
from mail_pipelines.ops.provisioning import provision_server, retire_server
from mail_pipelines.provisioning import listing
from mail_pipelines.resources.database import CentralDatabase, run_lock
from mail_pipelines.resources.queues import PARTITION_TAG, QUEUE_TAG, SOURCES_AT_ONCE, SOURCES_POOL, control_queue
from mail_pipelines.sensors.campaigns import missing_keys
from mail_pipelines.sensors.runs import gone, report_gone, started
from mail_pipelines.sensors.ticks import instance_of

SEND_POOL = "dispatch"
# Read by every process that uses Dagster's instance.
MORE_SLOTS = "set DAGSTER_MAX_GLOBAL_OP_CONCURRENCY_LIMIT to more in the environment of the centre's units, or server.slots to less"
CENTRE_JOBS = (
    *(
        job.name
        for job in (
            build_audience,
            report_campaign,
            refresh_snapshots_job,
            plan_capacity,
            maintenance,
            close_open_rows,
            import_contacts,
            read_inbound_mail,
            provision_server,
            retire_server,
        )
    ),
    SYNC_EXTERNAL,
)


def server_health(context: dg.SensorEvaluationContext, database: CentralDatabase) -> dg.SensorResult:
    """Keep the send slots equal to what the servers that send offer, judge the days of warm-ups and the breakers of domains, drain servers that providers or
    block lists refuse, mark runs failed whose process or server is gone, and give up servers that are lost.
    """
    settings = database.settings
    for change in warm_up.judge(database.engine):
        context.log.info("%s", change)
    for breaker in domain_breakers.judge(database.engine):
        context.log.warning("%s", breaker)
    with reading(database.engine) as connection:
        fleet = servers.all_servers(connection)
        now = database_now(connection)
    speaking = [server for server in fleet if server.sends and not server.is_silent(now, settings.server.heartbeat_seconds)]
    instance = instance_of(context)
    wanted = len(speaking) * settings.server.slots
    if _set_slots(instance, wanted) < wanted:
        context.log.error("the servers have %d send slots, of which Dagster takes %d at most: %s", wanted, most_slots(), MORE_SLOTS)
    # What a server of this host left behind its next run settles, whoever is silent.
    elsewhere = [
        server
        for server in fleet
        if registry.may_be_lost(server)
        and server.is_silent(now, settings.server.heartbeat_seconds)
        and not ServerFolders.of(settings.server, server.key).journal.exists()
    ]
    watch = registry.Watch.read(json.loads(context.cursor) if context.cursor else None).look([server.key for server in elsewhere], now)
    gone_for_good = {server.key for server in fleet if server.state == registry.ServerState.RETIRED}
    _end_runs_of(instance, {*watch.silent_for(dt.timedelta(seconds=servers.SILENT_BEATS * settings.server.heartbeat_seconds)), *gone_for_good})
    _end_dead_sessions(instance, settings, {server.key: ServerFolders.of(settings.server, server.key) for server in fleet})
    _end_dead_audits(instance, settings)
    _end_dead_centre_runs(instance, settings)
    # Nobody else adds keys of servers (`due_campaigns` says why).
    new = missing_keys([server.key for server in fleet], instance.get_dynamic_partitions(partitions.servers.name or ""))
    silent = [server.key for server in fleet if server.sends and server not in speaking]
    if silent:
        context.log.warning("silent servers: %s", ", ".join(silent))
    for server in speaking:
        if server.clock_error:
            context.log.warning("%s: %s", server.clock_error, clock.REMEDY)
    _look_at_block_lists(context, database, speaking, now)
    for words in health.look(database.engine):
        context.log.error("%s", words)
    lost = watch.silent_for(registry.LOST_AFTER)
    for server in elsewhere:
        if server.key in lost and (rows := registry.lose(database.engine, server.key, heartbeat_at=server.heartbeat_at)) is not None:
            context.log.error("server %s is lost: silent for %s; %d recipients it had in hand are unknown", server.key, registry.LOST_AFTER, rows)
    return dg.SensorResult(
        dynamic_partitions_requests=[partitions.servers.build_add_request(new)] if new else None,
        cursor=json.dumps(watch.write()),
        skip_reason=None if new else dg.SkipReason(f"{len(speaking)} of {len(fleet)} servers are active and speaking"),
    )


def _look_at_block_lists(context: dg.SensorEvaluationContext, database: CentralDatabase, speaking: Collection[servers.ServerInfo], now: dt.datetime) -> None:
    """Have the addresses of servers looked up whose turn it is. What follows is decided by `health`."""
    try:
        found = listing.look(database.engine, database.settings.dns, speaking, now)
    except ResolverError as error:
        context.log.warning("block lists cannot be asked: %s", error)
        return
    for key, listed in found.items():
        for words in listed.listed:
            context.log.warning("server %s: %s", key, words)


def most_slots() -> int:
    """How many Dagster takes in one pool."""
    return get_max_concurrency_limit_value()


def _set_slots(instance: dg.DagsterInstance, wanted: int) -> int:
    """Give the pool as many slots as are wanted, and no more than Dagster takes (it refuses more with an error); how many those are."""
    slots = min(max(1, wanted), most_slots())
    storage = instance.event_log_storage
    current = {limit.name: limit.limit for limit in storage.get_pool_limits()}
    if current.get(SEND_POOL) != slots:
        storage.set_concurrency_slots(SEND_POOL, slots)
    # How many sources are read at once an operator may say.
    if SOURCES_POOL not in current:
        storage.set_concurrency_slots(SOURCES_POOL, SOURCES_AT_ONCE)
    return slots


def _end_dead_sessions(instance: dg.DagsterInstance, settings: Settings, folders: dict[str, ServerFolders]) -> None:
    """Mark send runs failed, of servers on this host, whose session no living process holds."""

    def lives(run: dg.DagsterRun) -> bool:
        place = folders.get(run.tags.get(QUEUE_TAG, ""))
        # A server without a journal here is another host's.
        return place is None or not place.journal.exists() or is_locked(place.sessions / run.run_id) or is_locked(run_lock(settings, run.run_id))

    for run in gone(started(instance, [send_campaign.name]), lives, time.time()):
        report_gone(instance, run, "the session's process is gone; its claims are settled by the next run on the same server")


def _end_runs_of(instance: dg.DagsterInstance, keys: Collection[str]) -> None:
    """Mark runs failed that silent servers of other hosts were at, or retired ones: a thief may have called ended ones started, which fill Dagster's limits.

    The ledger knows what they have in hand, whatever Dagster says.
    """
    for record in started(instance, [send_campaign.name, audit_delivery_logs.name]):
        key = record.dagster_run.tags.get(QUEUE_TAG, "").removesuffix(control_queue(""))
        if key in keys:
            report_gone(instance, record.dagster_run, f"server {key} is silent or retired; its claims are settled when it comes back, or given up")


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
