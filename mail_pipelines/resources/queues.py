"""The queues that carry runs to workers: their names, who reads which, and to which a run goes.

| queue | who reads it |
|---|---|
| `centre` | the centre: everything but sending and audits |
| `dispatch` | every dispatch server: send runs that name no server |
| `<server>` | that server: its send slots |
| `<server>-ctl` | that server, one run at a time: audits |
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from mail_pipelines import config

# Not imported: what only asks for names would take a second and a half longer to start.
if TYPE_CHECKING:
    import dagster as dg
    from sqlalchemy.engine import Connection

# The run tag that names the queue (dagster-celery's name for it; where runs are processes of this host it is a label).
QUEUE_TAG = "dagster-celery/queue"
CENTRE = "centre"
DISPATCH = "dispatch"
PARTITION_TAG = "dagster/partition"
CAMPAIGN_TAG = "dagster/partition/campaign"
# The pool of runs that read or tell external sources, and how many there are at once unless an operator says otherwise (in the UI: Deployment, Concurrency).
# They wait for others most of the time, and may wait long: the centre's worker has slots for them beside those for plans, freezes and servers in the making.
SOURCES_POOL = "sources"
SOURCES_AT_ONCE = 2
# What dispatch servers execute: the job, and the asset that it consists of. A materialisation from the UI has a job without a name of its own.
SENDING = ("send_campaign", "send_batches")
AUDIT = ("audit_delivery_logs", "delivery_logs")


def this_server(environ: Mapping[str, str] = os.environ) -> str | None:
    """The dispatch server this process speaks for, of several the first; None at the centre."""
    return next(iter(config.servers_of_this_host(environ)), None)


def control_queue(server: str) -> str:
    """The queue of what a server does beside sending."""
    return f"{server}-ctl"


def sending_queues(*servers: str) -> tuple[str, ...]:
    return (DISPATCH, *servers)


def own_queues(server: str | None) -> tuple[str, ...]:
    """The queues whose runs may execute where this server is spoken for, or at the centre."""
    return (*sending_queues(server), control_queue(server)) if server else (CENTRE,)


def server_of(queue: str, fleet: Iterable[str]) -> str | None:
    """The server whose queue this is; None for the centre's and the shared one."""
    return next((server for server in fleet if queue in (server, control_queue(server))), None)


def executes(run: dg.DagsterRun, what: tuple[str, str]) -> bool:
    """Whether a run executes `SENDING` or `AUDIT` and nothing else."""
    job, asset = what
    return [list(key.path) for key in run.asset_selection] == [[asset]] if run.asset_selection else run.job_name == job


def is_for_servers(run: dg.DagsterRun) -> bool:
    return executes(run, SENDING) or executes(run, AUDIT)


def choose(connection: Connection, run: dg.DagsterRun, heartbeat_seconds: float) -> str:
    """The queue of a run: its tag's, or for a run that names none the one where it belongs.

    A send run goes to the server with most unspent grant for its campaign: the centre knows that better than the server that is idle.
    """
    import sqlalchemy as sa

    from mail_pipelines.database.models import Campaign
    from mail_pipelines.dispatch import servers
    from mail_pipelines.dispatch.files import DispatchError

    if (named := run.tags.get(QUEUE_TAG)) is not None:
        return named
    if executes(run, AUDIT) and (server := run.tags.get(PARTITION_TAG)):
        return control_queue(server)
    if not executes(run, SENDING):
        return CENTRE
    campaign_id = connection.execute(sa.select(Campaign.id).where(Campaign.key == run.tags.get(CAMPAIGN_TAG, ""))).scalar_one_or_none()
    if campaign_id is None:
        return DISPATCH
    try:
        return servers.choose(connection, campaign_id, None, heartbeat_seconds).key
    except DispatchError:
        # None speaks at the moment: the first that does takes it.
        return DISPATCH
