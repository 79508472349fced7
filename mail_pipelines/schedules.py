"""Schedules, with cron and time zone from the settings where an operator may want others."""

from __future__ import annotations

from collections.abc import Sequence

import dagster as dg

from mail_pipelines import config, partitions
from mail_pipelines.assets.reputation import asset_key
from mail_pipelines.capacity import demand
from mail_pipelines.config import OperationSettings, ReputationSettings
from mail_pipelines.database.engine import database_now, reading
from mail_pipelines.dispatch import audit, servers
from mail_pipelines.jobs import SYNC_EXTERNAL, audit_delivery_logs, plan_capacity, refresh_snapshots_job
from mail_pipelines.ops.maintenance import maintenance
from mail_pipelines.reputation.readings import configured
from mail_pipelines.resources.database import CentralDatabase
from mail_pipelines.resources.queues import QUEUE_TAG, control_queue
from mail_pipelines.resources.run_tags import SOURCE
from mail_pipelines.sensors.runs import unfinished
from mail_pipelines.sources import running
from mail_pipelines.sources.declaration import Source

# Past the full hour, when campaigns like to start.
_AUDIT_CRON = "20 * * * *"
# Between two plans the rule of every tick serves what is new (`capacity.allotments`).
_PLAN_CRON = "*/5 * * * *"
_FAR_PLAN_AT = (4, 0)


def due_audits(context: dg.ScheduleEvaluationContext, database: CentralDatabase) -> list[dg.RunRequest] | dg.SkipReason:
    """An audit for each speaking server whose journal has lines that none has read."""
    settings = database.settings
    with reading(database.engine) as connection:
        now = database_now(connection)
        standings = audit.standings(connection)
        fleet = [server for server in servers.all_servers(connection) if not server.is_silent(now, settings.server.heartbeat_seconds)]
    known = set(context.instance.get_dynamic_partitions(partitions.servers.name or ""))
    due = [server.key for server in fleet if server.key in known and audit.unread(server, standings.get(server.key))]
    if not due:
        return dg.SkipReason("no server has new lines in its log")
    hour = f"{context.scheduled_execution_time:%Y-%m-%dT%H}"
    return [dg.RunRequest(partition_key=key, run_key=f"{key}:{hour}", tags={QUEUE_TAG: control_queue(key)}) for key in due]


def due_plan(context: dg.ScheduleEvaluationContext, database: CentralDatabase) -> dg.RunRequest | dg.SkipReason:
    """A new plan while anything is sending or scheduled for the next 48 hours, and once a day for what the weeks after bring."""
    time = context.scheduled_execution_time
    with reading(database.engine) as connection:
        if (time.hour, time.minute) != _FAR_PLAN_AT and not demand.needed(connection, database_now(connection)):
            return dg.SkipReason("nothing is sending or scheduled for the next 48 hours")
    return dg.RunRequest(run_key=f"{time:%Y-%m-%dT%H:%M}")


def sync_schedules(sources: Sequence[Source], job: dg.UnresolvedAssetJobDefinition) -> list[dg.ScheduleDefinition]:
    """One for each source that declares when it is read."""
    found = []
    for source in sources:
        if source.schedule:
            try:
                found.append(_sync_schedule(source, job))
            except dg.DagsterInvalidDefinitionError:
                # A time that never comes, as 31 February: nothing else may fail to load for it, and an alert says that the source grows old.
                continue
    return found


def _sync_schedule(source: Source, job: dg.UnresolvedAssetJobDefinition) -> dg.ScheduleDefinition:
    def due(context: dg.ScheduleEvaluationContext) -> dg.RunRequest | dg.SkipReason:
        keys = [dg.AssetKey([source.name, section]) for section in source.parts]
        # One that waits for its turn or is starting, also by hand, has no lock yet, and one that works has none between two parts. One that was killed is soon
        # called failed.
        asked_for = (run.asset_selection for run in unfinished(context.instance, SYNC_EXTERNAL))
        if running.is_running(config.load().home, source.name) or any(selection is None or selection & set(keys) for selection in asked_for):
            return dg.SkipReason("the run before is still under way, or waits for its turn")
        run_key = f"{source.name}:{context.scheduled_execution_time:%Y-%m-%dT%H:%M}"
        return dg.RunRequest(run_key=run_key, asset_selection=keys, tags={SOURCE: source.name})

    return dg.schedule(
        job=job,
        name=f"sync_{source.name.replace('-', '_')}",
        cron_schedule=source.schedule or "",
        execution_timezone=source.time_zone,
        default_status=dg.DefaultScheduleStatus.RUNNING,
        description=f"Bring the external source {source.name} up to date.",
    )(due)


def reputation_schedule(settings: ReputationSettings, time_zone: str, job: dg.UnresolvedAssetJobDefinition) -> dg.ScheduleDefinition:
    """One for all providers that are asked."""
    keys = [asset_key(source) for source in configured(settings)]

    def due(context: dg.ScheduleEvaluationContext) -> dg.RunRequest:
        return dg.RunRequest(run_key=f"reputation:{context.scheduled_execution_time:%Y-%m-%dT%H:%M}", asset_selection=keys)

    return dg.schedule(
        job=job,
        name="sync_reputation",
        cron_schedule=settings.cron,
        execution_timezone=time_zone,
        default_status=dg.DefaultScheduleStatus.RUNNING,
        description="Ask mailbox providers what they tell of our domains and addresses.",
    )(due)


def all_schedules(settings: OperationSettings) -> list[dg.ScheduleDefinition]:
    """All schedules run from the start: nobody has to turn them on."""
    running = dg.DefaultScheduleStatus.RUNNING
    return [
        dg.ScheduleDefinition(
            name="refresh_snapshots",
            job=refresh_snapshots_job,
            cron_schedule=settings.snapshot_cron,
            execution_timezone=settings.time_zone,
            default_status=running,
            description="Keep the snapshots young, so that a freeze has little left to read.",
        ),
        dg.schedule(
            job=audit_delivery_logs,
            name="audit_delivery_logs",
            cron_schedule=_AUDIT_CRON,
            execution_timezone=settings.time_zone,
            default_status=running,
            description="Audit the log of every dispatch server that has new lines.",
        )(due_audits),
        dg.schedule(
            job=plan_capacity,
            name="plan_capacity",
            cron_schedule=_PLAN_CRON,
            execution_timezone=settings.time_zone,
            default_status=running,
            description="Plan anew while anything is sending or scheduled.",
        )(due_plan),
        dg.ScheduleDefinition(
            name="maintenance",
            job=maintenance,
            cron_schedule=settings.maintenance_cron,
            execution_timezone=settings.time_zone,
            default_status=running,
            description="Nightly upkeep.",
        ),
    ]
