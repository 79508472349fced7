"""The dispatch server a send run speaks for."""

from __future__ import annotations

import dagster as dg
import sqlalchemy as sa

from mail_pipelines.config import Settings
from mail_pipelines.database.engine import reading
from mail_pipelines.dispatch import servers
from mail_pipelines.resources.queues import DISPATCH, QUEUE_TAG, this_server


class DispatchServer(dg.ConfigurableResource):
    """Resolves a run to its server: the worker's own name, else the run's tag, else the server with most unspent grant."""

    def of_run(self, engine: sa.Engine, settings: Settings, campaign_id: int, run: dg.DagsterRun) -> servers.ServerInfo:
        queue = run.tags.get(QUEUE_TAG)
        with reading(engine) as connection:
            return servers.for_run(connection, settings, campaign_id, own=this_server(), hint=None if queue == DISPATCH else queue)

    def of_partition(self, engine: sa.Engine, settings: Settings, key: str) -> servers.ServerInfo:
        """The server a partition is about; raises `DispatchError` anywhere but on its host."""
        with reading(engine) as connection:
            return servers.of_this_host(connection, settings, key, own=this_server())
