"""Servers that are made here: those for which something is to be done now, and those that are missing."""

from __future__ import annotations

from collections.abc import Iterable

import dagster as dg
import sqlalchemy as sa

from mail_pipelines import partitions
from mail_pipelines.config import Settings
from mail_pipelines.database.engine import database_now, reading, transact
from mail_pipelines.dispatch import audit, servers
from mail_pipelines.jobs import audit_delivery_logs
from mail_pipelines.ops.provisioning import provision_server, retire_server
from mail_pipelines.provisioning import proposals, store
from mail_pipelines.provisioning.states import State, Step
from mail_pipelines.provisioning.store import Provision
from mail_pipelines.resources.database import CentralDatabase
from mail_pipelines.resources.provisioning import Provisioning
from mail_pipelines.resources.queues import QUEUE_TAG, control_queue
from mail_pipelines.sensors.runs import PARTITION_TAG, unfinished
from mail_pipelines.sensors.ticks import Evaluate, instance_of

SERVER_TAG = "mail-pipelines/server"


def job_of(provision: Provision) -> dg.JobDefinition:
    """Which job takes a server on from where it is."""
    return retire_server if provision.state is State.DRAINING else provision_server


def run_request(provision: Provision) -> dg.RunRequest:
    job = job_of(provision)
    op = "remove_server" if job is retire_server else "make_server"
    return dg.RunRequest(job_name=job.name, run_config={"ops": {op: {"config": {"name": provision.key}}}}, tags={SERVER_TAG: provision.key})


def capacity_sensor(provisioning: Provisioning) -> Evaluate:
    """The sensor, with what makes servers and knows how many are wanted."""

    def capacity_shortage(context: dg.SensorEvaluationContext, database: CentralDatabase) -> dg.SensorResult:
        """Propose servers, or order them, when the capacity plan lacks some (`provisioning.mode`), and go on with those that wait for something."""
        engine, settings = database.engine, database.settings
        said = [] if settings.provisioning.mode == "off" else _short(provisioning, engine, settings)
        for line in said:
            context.log.info("%s", line)
        with reading(engine) as connection:
            due = store.due(connection, database_now(connection))
            living = store.all_provisions(connection)
            warming = any(one.state is State.WARMING for one in living)
            unread = _unread(connection, [one.key for one in living if one.step is Step.SETTLE])
        if warming:
            transact(engine, store.warmed)
        busy: set[str] = set()
        if due:
            instance = instance_of(context)
            busy = {run.tags.get(SERVER_TAG, "") for job in (provision_server, retire_server) for run in unfinished(instance, job.name)}
        requests = [run_request(provision) for provision in due if provision.key not in busy]
        if unread:
            requests += _audits(instance_of(context), unread)
        return dg.SensorResult(run_requests=requests, skip_reason=None if requests else dg.SkipReason("; ".join(said) or "no servers are wanted"))

    return capacity_shortage


def _unread(connection: sa.Connection, keys: Iterable[str]) -> list[str]:
    """Those of these servers, which go, whose log has lines that nobody has read."""
    going, standings = set(keys), audit.standings(connection)
    return [server.key for server in servers.all_servers(connection) if server.key in going and audit.unread(server, standings.get(server.key))]


def _audits(instance: dg.DagsterInstance, keys: Iterable[str]) -> list[dg.RunRequest]:
    """An audit of each, which it would else wait for until the full hour; unless it is being audited."""
    known = instance.get_dynamic_partitions(partitions.servers.name or "")
    busy = {run.tags.get(PARTITION_TAG) for run in unfinished(instance, audit_delivery_logs.name)}
    return [
        dg.RunRequest(job_name=audit_delivery_logs.name, partition_key=key, tags={QUEUE_TAG: control_queue(key)})
        for key in keys
        if key in known and key not in busy
    ]


def _short(provisioning: Provisioning, engine: sa.Engine, settings: Settings) -> list[str]:
    """Act on what is missing in each pool; what was done, in words."""
    wanted = [one for one in provisioning.wanted(engine, settings) if one.servers > 0]
    if not wanted:
        return []
    parts = provisioning.parts(engine, settings)
    return [transact(engine, lambda connection, one=one: proposals.short(connection, parts, one)) for one in wanted]  # type: ignore[misc]
