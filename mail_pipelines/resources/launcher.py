"""The run launcher of a centre with many servers: each run is an order to a worker, in the queue where it belongs.

Built on dagster-celery's launcher, from which it differs in what its users met as traps:

- a cancellation is recorded before the worker hears of it, else the run ends as failed and may be repeated;
- a run whose result is not known is not called failed: a restart of the database would end the books of sessions that go on sending;
- the task's id is the run's, so that there is no moment at which a run has a task that nobody can find;
- nothing is ever resumed: a session in the middle is settled, and another one begins.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import dagster as dg
from dagster._core.events import EngineEventData
from dagster._core.launcher import CheckRunHealthResult, LaunchRunContext, WorkerStatus
from dagster._serdes import ConfigurableClassData
from dagster_celery.launcher import CeleryRunLauncher
from dagster_celery.tags import DAGSTER_CELERY_RUN_PRIORITY_TAG, DAGSTER_CELERY_TASK_ID_TAG

from mail_pipelines import config
from mail_pipelines.config import ConfigError
from mail_pipelines.database.engine import reading
from mail_pipelines.dispatch import servers
from mail_pipelines.resources import orders, queues, run_tags, tasks
from mail_pipelines.resources.database import CentralDatabase

# Where Dagster has no time limit of its own for the start of a run.
_START_SECONDS = 600
_ENDS = {dg.DagsterEventType.RUN_SUCCESS, dg.DagsterEventType.RUN_FAILURE, dg.DagsterEventType.RUN_CANCELED}


class QueueLauncher(CeleryRunLauncher):
    """Launches runs as signed orders. It has no options: broker, results and keys are settings of the home (`[broker]`)."""

    def __init__(self, inst_data: ConfigurableClassData | None = None) -> None:
        settings = config.load()
        super().__init__(default_queue=queues.CENTRE, broker=settings.broker.url, backend=settings.broker.results, inst_data=inst_data)
        self.celery = tasks.make_app(settings)

    @classmethod
    def config_type(cls) -> dict[str, Any]:
        return {}

    @classmethod
    def from_config_value(cls, inst_data: ConfigurableClassData, config_value: Mapping[str, Any]) -> QueueLauncher:  # noqa: ARG003
        return cls(inst_data)

    def launch_run(self, context: LaunchRunContext) -> None:
        run, settings = context.dagster_run, config.load()
        if not settings.broker.signing_key:
            raise ConfigError("broker.signing_key is not set: only the centre launches runs, and `mail-pipelines init --production` makes its key")
        with reading(CentralDatabase().engine) as connection:
            queue = queues.choose(connection, run, settings.server.heartbeat_seconds)
        # Before the order: the worker may be quicker than the next line.
        tags = {queues.QUEUE_TAG: queue, DAGSTER_CELERY_TASK_ID_TAG: run.run_id, **run_tags.missing(self._instance, run, queue)}
        self._instance.add_run_tags(run.run_id, tags)
        until = time.time() + (self._instance.run_monitoring_start_timeout_seconds or _START_SECONDS)
        order = orders.sign(orders.Order(run.run_id, queue, until), settings.broker.signing_key)
        self.celery.send_task(tasks.EXECUTE_RUN, order, task_id=run.run_id, queue=queue, priority=_priority(run))
        self._instance.report_engine_event(f"In queue {queue}.", run, EngineEventData({"queue": queue}), cls=self.__class__)

    def terminate(self, run_id: str) -> bool:
        run = self._instance.get_run_by_id(run_id)
        if run is None or run.is_finished:
            return False
        if run.status is not dg.DagsterRunStatus.CANCELING:
            self._instance.report_run_canceling(run)
        # Nobody is left to answer, and Dagster would wait for `cancel_timeout_seconds`.
        if self._instance.all_logs(run_id, of_type=_ENDS):
            self._instance.report_run_canceled(run, "It was about to end by itself when it was cancelled.")
            return True
        if self._has_ended(run_id):
            self._instance.report_run_canceled(run, "Cancelled after its process had ended without a word to Dagster: see the worker's log.")
            return True
        for exchange in self._listening(run.tags.get(queues.QUEUE_TAG, queues.CENTRE)):
            tasks.control(self.celery, exchange).revoke(run_id, terminate=True, signal="SIGTERM")
        return True

    def _listening(self, queue: str) -> list[str]:
        """The exchanges of all workers that may have the run."""
        if queue == queues.CENTRE:
            return [tasks.control_exchange(None)]
        with reading(CentralDatabase().engine) as connection:
            fleet = servers.all_servers(connection)
        keys = [server.key for server in fleet]
        own = queues.server_of(queue, keys)
        # One worker for all servers of a host. What a server says of itself counts only if it is one.
        workers = {server.worker if server.worker in keys else server.key for server in fleet if own in (None, server.key)}
        return [tasks.control_exchange(worker) for worker in sorted(workers)]

    @property
    def supports_resume_run(self) -> bool:
        return False

    def check_run_worker_health(self, run: dg.DagsterRun) -> CheckRunHealthResult:
        """Failed only if the worker said that it has ended. What ends without a word is found by its server's silence, or Dagster's time limit.

        Dagster asks about runs that have begun and not ended. One that ended while Dagster's storage was away could not say so there.
        """
        if self._has_ended(run.run_id) or self._was_killed_after_another(run.run_id):
            return CheckRunHealthResult(WorkerStatus.FAILED, "The run's process has ended without a word to Dagster: see the worker's log.")
        return CheckRunHealthResult(WorkerStatus.RUNNING)

    def _has_ended(self, run_id: str) -> bool:
        """Whether a worker said that it has ended. One that was told to end is called revoked at once, and says itself when it has."""
        result = self.celery.AsyncResult(run_id)
        return bool(result.ready()) and result.state != "REVOKED" and result.result != tasks.IGNORED

    def _was_killed_after_another(self, run_id: str) -> bool:
        """Whether its process was killed that had finished a cancelled run before: Celery takes that for the late end of the cancellation, whatever
        it executes by now. A run of which the worker says so has been cancelled itself, which Dagster knows first, or is such a one.
        """
        if self.celery.AsyncResult(run_id).state != "REVOKED":
            return False
        run = self._instance.get_run_by_id(run_id)
        return run is not None and run.status is dg.DagsterRunStatus.STARTED

    def get_run_worker_debug_info(self, run: dg.DagsterRun, include_container_logs: bool | None = True) -> str | None:
        queue = run.tags.get(queues.QUEUE_TAG, queues.CENTRE)
        return f"queue {queue}, state of the task: {self.celery.AsyncResult(run.run_id).state}; does a worker of this queue run?"


def _priority(run: dg.DagsterRun) -> int:
    """0 to 10; the higher goes first."""
    given = run.tags.get(DAGSTER_CELERY_RUN_PRIORITY_TAG, "")
    return min(10, int(given)) if given.isdecimal() else 0
