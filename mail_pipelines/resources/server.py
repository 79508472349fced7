"""The dispatch server a send run speaks for."""

from __future__ import annotations

import os

import dagster as dg
import sqlalchemy as sa

from mail_pipelines.config import Settings
from mail_pipelines.database.engine import reading
from mail_pipelines.dispatch import servers

# The run tag that names the server a run is meant for (dagster-celery routes by it; elsewhere it is a label).
QUEUE_TAG = "dagster-celery/queue"


class DispatchServer(dg.ConfigurableResource):
    """Resolves a run to its server: the worker's own name, else the run's tag, else the server with most unspent grant."""

    def of_run(self, engine: sa.Engine, settings: Settings, campaign_id: int, run: dg.DagsterRun) -> servers.ServerInfo:
        with reading(engine) as connection:
            return servers.for_run(connection, settings, campaign_id, own=_own(), hint=run.tags.get(QUEUE_TAG))

    def of_partition(self, engine: sa.Engine, settings: Settings, key: str) -> servers.ServerInfo:
        """The server a partition is about; raises `DispatchError` anywhere but on its host."""
        with reading(engine) as connection:
            return servers.of_this_host(connection, settings, key, own=_own())


def _own() -> str | None:
    return os.environ.get("MAIL_PIPELINES_SERVER")


def control_queue(server: str) -> str:
    """The queue of what a server does beside sending: audit, settlement."""
    return f"{server}-ctl"
