"""Servers that are made here: those for which something is to be done now, and those that are missing."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import dagster as dg
import sqlalchemy as sa
from sqlalchemy.engine import Connection

from mail_pipelines import partitions
from mail_pipelines.capacity import health, verdicts
from mail_pipelines.config import Settings
from mail_pipelines.database.engine import database_now, reading, transact
from mail_pipelines.dispatch import audit, registry, servers
from mail_pipelines.jobs import audit_delivery_logs, send_campaign
from mail_pipelines.ops.provisioning import provision_server, retire_server
from mail_pipelines.provisioning import proposals, store
from mail_pipelines.provisioning.proposals import Wanted
from mail_pipelines.provisioning.states import IN_SERVICE, At, State, Step
from mail_pipelines.provisioning.store import Provision
from mail_pipelines.resources import run_tags
from mail_pipelines.resources.database import CentralDatabase
from mail_pipelines.resources.provisioning import Provisioning
from mail_pipelines.resources.queues import QUEUE_TAG, control_queue
from mail_pipelines.sensors.runs import unfinished
from mail_pipelines.sensors.ticks import Evaluate, instance_of

# A server that claims nothing any more, and waits for the end of its claims and of its log.
_LEAVES = At(State.DRAINING, Step.SETTLE)


def job_of(provision: Provision) -> dg.JobDefinition:
    """Which job takes a server on from where it is."""
    return retire_server if provision.state is State.DRAINING else provision_server


def run_request(provision: Provision) -> dg.RunRequest:
    job = job_of(provision)
    op = "remove_server" if job is retire_server else "make_server"
    return dg.RunRequest(job_name=job.name, run_config={"ops": {op: {"config": {"name": provision.key}}}}, tags=run_tags.server(provision.key))


def capacity_sensor(provisioning: Provisioning) -> Evaluate:
    """The sensor, with what makes servers and knows how many are wanted."""

    def capacity_shortage(context: dg.SensorEvaluationContext, database: CentralDatabase) -> dg.SensorResult:
        """Propose servers, or order them, when the capacity plan lacks some (`provisioning.mode`), end proposals and give back servers that have no use, and go
        on with those that wait for something.

        The log of a server that leaves is read to its end at once, by an audit of its own.
        """
        engine, settings = database.engine, database.settings
        wanted = [] if settings.provisioning.mode == "off" else [one for one in provisioning.wanted(engine, settings) if one.servers > 0]
        said = _short(provisioning, engine, settings, wanted) + _lapsed(engine, settings, wanted)
        if settings.provisioning.mode == "auto":
            said += transact(engine, give_back)
        for line in said:
            context.log.info("%s", line)
        with reading(engine) as connection:
            due = store.due(connection, database_now(connection))
            living = store.all_provisions(connection)
            unread = _unread(connection, [one.key for one in living if one.at == _LEAVES])
        if any(one.state is State.WARMING for one in living):
            transact(engine, store.warmed)
        # Before its log is read to the end it cannot go.
        due = [one for one in due if one.key not in unread]
        busy = _busy(instance_of(context), due) if due else set()
        requests = [run_request(provision) for provision in due if provision.key not in busy]
        if unread:
            known = set(instance_of(context).get_dynamic_partitions(partitions.servers.name or ""))
            requests += [audit_request(key, end) for key, end in unread.items() if key in known]
        return dg.SensorResult(run_requests=requests, skip_reason=None if requests else dg.SkipReason("; ".join(said) or "no servers are wanted"))

    return capacity_shortage


def _busy(instance: dg.DagsterInstance, due: Collection[Provision]) -> set[str]:
    """Servers of which a run is under way that has to be waited for: one that makes or removes it; and one at a server itself that leaves, which would be cut
    off from what it reports to with the server's accounts, and would hold up the end of its worker.
    """
    busy = {run.tags.get(run_tags.SERVER, "") for job in (provision_server, retire_server) for run in unfinished(instance, job.name)}
    if leaving := {one.key for one in due if one.at == _LEAVES}:
        busy |= leaving & {run.tags.get(run_tags.SERVER, "") for job in (send_campaign, audit_delivery_logs) for run in unfinished(instance, job.name)}
    return busy


def audit_request(key: str, end: Sequence[int]) -> dg.RunRequest:
    """An audit of a server's log up to `end` (inode, offset), asked for once."""
    run_key = f"{key}:{end[0]}:{end[1]}"
    return dg.RunRequest(job_name=audit_delivery_logs.name, partition_key=key, run_key=run_key, tags={QUEUE_TAG: control_queue(key)})


def _unread(connection: sa.Connection, leaving: Collection[str]) -> dict[str, Sequence[int]]:
    """The servers of these that have nothing in hand, and whose logs were not read to the end: its place as their last heartbeat told it."""
    if not leaving:
        return {}
    standings = audit.standings(connection)
    return {
        server.key: (server.health or {})["journal"]
        for server in servers.all_servers(connection)
        if server.key in leaving
        and server.state != registry.ServerState.LOST
        and not registry.open_claims(connection, server.id)
        and audit.unread(server, standings.get(server.key))
    }


def _short(provisioning: Provisioning, engine: sa.Engine, settings: Settings, wanted: Collection[Wanted]) -> list[str]:
    """Act on what is missing in each pool; what was done, in words."""
    if not wanted:
        return []
    parts = provisioning.parts(engine, settings)
    return [transact(engine, lambda connection, one=one: proposals.short(connection, parts, one)) for one in wanted]  # type: ignore[misc]


def _lapsed(engine: sa.Engine, settings: Settings, wanted: Collection[Wanted]) -> list[str]:
    """End proposals that nobody needs any more; what was done, in words."""
    with reading(engine) as connection:
        undecided = proposals.undecided(connection)
    pools = {one.pool for one in wanted}
    return transact(engine, lambda connection: proposals.lapse(connection, pools, settings.provisioning)) if undecided else []


def give_back(connection: Connection) -> list[str]:
    """Have servers removed that were taken out of service long ago, and then one that is not needed if none is going; what was done, in words."""
    now = database_now(connection)
    # All that act on servers made here wait for each other.
    made = {one.key: one for one in store.all_provisions(connection, lock=True)}
    serving = {key for key, one in made.items() if one.state in IN_SERVICE}
    leaving = any(one.state is State.DRAINING for one in made.values())
    reasons = verdicts.to_give_back(health.gone(connection, now), verdicts.standing(connection, now).values(), serving, leaving=leaving)
    for key, why in reasons.items():
        store.give_back(connection, key, why)
    return [f"server {key} is given back: {why}" for key, why in reasons.items()]
