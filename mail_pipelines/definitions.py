"""The only place where the parts of the Dagster code location meet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import dagster as dg

from mail_pipelines import config, jobs, schedules
from mail_pipelines.assets import audience, capacity, delivery, reporting, reputation, sending, synced
from mail_pipelines.ops import maintenance
from mail_pipelines.ops.inbound import read_inbound_mail
from mail_pipelines.ops.provisioning import provision_server, retire_server
from mail_pipelines.resources.database import CentralDatabase
from mail_pipelines.resources.provisioning import Provisioning
from mail_pipelines.resources.server import DispatchServer
from mail_pipelines.sensors import alerts, campaigns, failures, files, inbound, servers, shards
from mail_pipelines.sensors import capacity as shortage
from mail_pipelines.sensors.ticks import sensor
from mail_pipelines.sources.declaration import Source


def _sensors(database: CentralDatabase, provisioning: Provisioning, interval_seconds: int) -> list[dg.SensorDefinition]:
    """All sensors, which run from the start. What a campaign waits for has its tick in each interval, the others in every third."""
    calm = 3 * interval_seconds
    return [
        sensor(files.dropped_files, database, calm, jobs=[maintenance.import_contacts]),
        sensor(campaigns.due_campaigns, database, interval_seconds, jobs=[jobs.build_audience]),
        sensor(shards.open_shards, database, interval_seconds, jobs=[jobs.send_campaign]),
        sensor(shards.finished_shards, database, calm),
        sensor(campaigns.finished_campaigns, database, interval_seconds, jobs=[jobs.report_campaign, maintenance.close_open_rows]),
        sensor(inbound.inbound_mail, database, calm, jobs=[read_inbound_mail]),
        sensor(servers.server_health, database, calm),
        sensor(alerts.alerts, database, calm),
        sensor(shortage.capacity_sensor(provisioning), database, calm, jobs=[provision_server, retire_server, jobs.audit_delivery_logs]),
        dg.run_failure_sensor(default_status=dg.DefaultSensorStatus.RUNNING, minimum_interval_seconds=calm, request_job=jobs.report_campaign)(
            failures.failed_runs
        ),
    ]


def build_defs(
    *,
    resources: Mapping[str, Any] | None = None,
    settings: config.OperationSettings | None = None,
    sources: Sequence[Source] | None = None,
    told: config.ReputationSettings | None = None,
) -> dg.Definitions:
    """All definitions; tests and commands give other `resources`, `settings`, `sources` or `told` (by providers) instead of patching."""
    configured = config.load()
    operation = settings or configured.operation
    declared = synced.declared(configured.home) if sources is None else sources
    told = told or configured.reputation
    by_providers = reputation.reputation_assets(told)
    sync = [jobs.sync_external()] if declared or by_providers else []
    sync_schedules = [schedule for job in sync for schedule in schedules.sync_schedules(declared, job)]
    if by_providers:
        sync_schedules.append(schedules.reputation_schedule(told, operation.time_zone, sync[0]))
    given: dict[str, Any] = {"database": CentralDatabase(), "server": DispatchServer(), "provisioning": Provisioning(), **(resources or {})}
    return dg.Definitions(
        assets=[*dg.load_assets_from_modules([audience, sending, delivery, capacity, reporting]), *synced.synced_assets(declared), *by_providers],
        jobs=[
            *jobs.ALL,
            *sync,
            maintenance.maintenance,
            maintenance.close_open_rows,
            maintenance.import_contacts,
            read_inbound_mail,
            provision_server,
            retire_server,
        ],
        sensors=_sensors(given["database"], given["provisioning"], operation.sensor_seconds),
        schedules=[*schedules.all_schedules(operation), *sync_schedules],
        resources=given,
        # Runs execute in one process: a send session is one process by design, and workers of a queue may not fork again.
        executor=dg.in_process_executor,
    )


defs = build_defs()
