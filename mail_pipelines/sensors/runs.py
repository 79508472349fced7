"""Questions about Dagster's runs that several sensors ask."""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable, Iterable

import dagster as dg

from mail_pipelines.dispatch.openings import Opening
from mail_pipelines.partitions import split_batch_key
from mail_pipelines.resources.queues import PARTITION_TAG, QUEUE_TAG

UNFINISHED = [
    dg.DagsterRunStatus.QUEUED,
    dg.DagsterRunStatus.NOT_STARTED,
    dg.DagsterRunStatus.STARTING,
    dg.DagsterRunStatus.STARTED,
    dg.DagsterRunStatus.CANCELING,
]
RUN_KEY_TAG = "dagster/run_key"
# From the start of a run's process to its proof of life: imports and a look at the database.
START_SECONDS = 60
_AT_MOST = 1_000


def unfinished(instance: dg.DagsterInstance, job_name: str) -> list[dg.DagsterRun]:
    return list(instance.get_runs(dg.RunsFilter(job_name=job_name, statuses=UNFINISHED), limit=_AT_MOST))


def send_runs(instance: dg.DagsterInstance) -> set[Opening]:
    """Send runs that wait or work, of those that name their server."""
    found = set()
    for run in unfinished(instance, "send_campaign"):
        key, server = run.tags.get(PARTITION_TAG), run.tags.get(QUEUE_TAG)
        if key and server:
            found.add(Opening(*split_batch_key(key), server))
    return found


def recent_failures(instance: dg.DagsterInstance, job_name: str, partition_key: str, since: dt.datetime, last: int = 5) -> int:
    """How many of the newest runs of a partition have failed since the last that did not, and since a given time."""
    records = instance.get_run_records(dg.RunsFilter(job_name=job_name, tags={PARTITION_TAG: partition_key}), limit=last)
    failures = 0
    for record in records:
        ended = record.create_timestamp.timestamp() if record.end_time is None else record.end_time
        if record.dagster_run.status is not dg.DagsterRunStatus.FAILURE or ended < since.timestamp():
            break
        failures += 1
    return failures


def started(instance: dg.DagsterInstance, job_names: Iterable[str]) -> list[dg.RunRecord]:
    """Runs that Dagster calls started, whether their process lives or not."""
    return [
        record
        for name in job_names
        for record in instance.get_run_records(dg.RunsFilter(job_name=name, statuses=[dg.DagsterRunStatus.STARTED]), limit=_AT_MOST)
    ]


def gone(records: Iterable[dg.RunRecord], lives: Callable[[dg.DagsterRun], bool], now: float) -> list[dg.DagsterRun]:
    """Runs of those started that should long have shown that their process lives, and do not. `now` in epoch seconds."""
    old = [record.dagster_run for record in records if record.start_time is not None and now - record.start_time >= START_SECONDS]
    return [run for run in old if not lives(run)]


def report_gone(instance: dg.DagsterInstance, run: dg.DagsterRun, message: str) -> bool:
    """Mark a run failed whose process is gone; false if it ended by itself after the caller had read its status."""
    current = instance.get_run_by_id(run.run_id)
    if current is None or current.status is not dg.DagsterRunStatus.STARTED:
        return False
    instance.report_run_failed(current, message)
    return True
