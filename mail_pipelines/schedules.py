"""Schedules, with cron and time zone from the settings."""

from __future__ import annotations

import dagster as dg

from mail_pipelines.config import OperationSettings
from mail_pipelines.jobs import refresh_snapshots_job
from mail_pipelines.ops.maintenance import maintenance


def all_schedules(settings: OperationSettings) -> list[dg.ScheduleDefinition]:
    """Both schedules run from the start: nobody has to turn them on."""
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
        dg.ScheduleDefinition(
            name="maintenance",
            job=maintenance,
            cron_schedule=settings.maintenance_cron,
            execution_timezone=settings.time_zone,
            default_status=running,
            description="Nightly upkeep.",
        ),
    ]
