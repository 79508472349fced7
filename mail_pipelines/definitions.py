"""The only place where the parts of the Dagster code location meet."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import dagster as dg

from mail_pipelines import config, jobs, schedules
from mail_pipelines.assets import audience, delivery, reporting, sending
from mail_pipelines.ops import maintenance
from mail_pipelines.ops.inbound import read_inbound_mail
from mail_pipelines.resources.database import CentralDatabase
from mail_pipelines.resources.server import DispatchServer
from mail_pipelines.sensors import campaigns, failures, files, inbound, servers, shards


def _sensors(interval_seconds: int) -> list[dg.SensorDefinition]:
    """All sensors run from the start: nobody has to turn them on."""
    running = dg.DefaultSensorStatus.RUNNING
    sensor = functools.partial(dg.sensor, minimum_interval_seconds=interval_seconds, default_status=running)
    return [
        sensor(jobs=[maintenance.import_contacts])(files.dropped_files),
        sensor(jobs=[jobs.build_audience])(campaigns.due_campaigns),
        sensor(jobs=[jobs.send_campaign])(shards.open_shards),
        sensor()(shards.finished_shards),
        sensor(jobs=[jobs.report_campaign, maintenance.close_open_rows])(campaigns.finished_campaigns),
        sensor(jobs=[read_inbound_mail])(inbound.inbound_mail),
        sensor()(servers.server_health),
        dg.run_failure_sensor(default_status=running, minimum_interval_seconds=interval_seconds, request_job=jobs.report_campaign)(failures.failed_runs),
    ]


def build_defs(*, resources: Mapping[str, Any] | None = None, settings: config.OperationSettings | None = None) -> dg.Definitions:
    """All definitions; tests and commands give other `resources` or `settings` instead of patching."""
    operation = settings or config.load().operation
    return dg.Definitions(
        assets=dg.load_assets_from_modules([audience, sending, delivery, reporting]),
        jobs=[*jobs.ALL, maintenance.maintenance, maintenance.close_open_rows, maintenance.import_contacts, read_inbound_mail],
        sensors=_sensors(operation.sensor_seconds),
        schedules=schedules.all_schedules(operation),
        resources={"database": CentralDatabase(), "server": DispatchServer(), **(resources or {})},
        # Runs execute in one process: a send session is one process by design, and workers of a queue may not fork again.
        executor=dg.in_process_executor,
    )


defs = build_defs()
