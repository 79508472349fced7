"""The workers of a fleet without the rest of it: the tests play its web server and its daemon, each part of which a fleet on RabbitMQ has as a process."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import dagster as dg
from dagster._daemon.monitoring.run_monitoring import monitor_started_run

from mail_pipelines import partitions
from mail_pipelines.definitions import defs
from mail_pipelines.resources.database import CentralDatabase
from mail_pipelines.sensors import shards
from tests.production.fleet import FINISHED, Fleet

# Dagster's own hand it to launchers that start code; ours does not look at it.
_WORKSPACE: Any = None


class Workers(Fleet):
    """Runs are ordered, watched and cancelled by the same launcher, in the test's process."""

    def schedule(self, campaign: str) -> None:
        super().schedule(campaign)
        self.instance.add_dynamic_partitions(partitions.campaigns.name or "", [campaign])
        frozen = self.launch("build_audience", **defs.resolve_job_def("build_audience").get_tags_for_partition_key(campaign, None))
        self.wait_for_status(frozen, dg.DagsterRunStatus.SUCCESS)

    def launch(self, job: str, **tags: str) -> str:
        return self.instance.launch_run(self.add_run(job, **tags), _WORKSPACE).run_id

    def terminate(self, run_id: str) -> None:
        assert self.instance.run_launcher.terminate(run_id) or self.status(run_id) in FINISHED

    def status(self, run_id: str) -> dg.DagsterRunStatus:
        """As the daemon's watch over runs leaves it."""
        record = self.instance.get_run_record_by_id(run_id)
        assert record is not None
        if record.dagster_run.status is dg.DagsterRunStatus.STARTED:
            monitor_started_run(self.instance, _WORKSPACE, record, logging.getLogger(__name__))
        return super().status(run_id)

    def busy(self) -> set[str]:
        self.open_shards()
        return super().busy()

    def _sending(self, campaign: str) -> Iterator[dg.DagsterRun]:
        self.open_shards()
        yield from super()._sending(campaign)

    def open_shards(self) -> None:
        """One tick of the sensor that starts send runs."""
        context = dg.build_sensor_context(instance=self.instance, repository_def=defs.get_repository_def())
        asked = shards.open_shards(context, CentralDatabase())
        for request in (asked.run_requests or []) if isinstance(asked, dg.SensorResult) else []:
            assert request.job_name is not None
            assert request.partition_key is not None
            of_partition = defs.resolve_job_def(request.job_name).get_tags_for_partition_key(request.partition_key, None)
            self.launch(request.job_name, **{**of_partition, **request.tags})
