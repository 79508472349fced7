"""Questions about Dagster's runs that several sensors ask."""

from __future__ import annotations

import dagster as dg

from mail_pipelines.dispatch.openings import Opening
from mail_pipelines.partitions import split_batch_key
from mail_pipelines.resources.server import QUEUE_TAG

UNFINISHED = [
    dg.DagsterRunStatus.QUEUED,
    dg.DagsterRunStatus.NOT_STARTED,
    dg.DagsterRunStatus.STARTING,
    dg.DagsterRunStatus.STARTED,
    dg.DagsterRunStatus.CANCELING,
]
PARTITION_TAG = "dagster/partition"
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


def recent_failures(instance: dg.DagsterInstance, job_name: str, partition_key: str, last: int = 5) -> int:
    """How many of the newest runs of a partition have failed since the last that did not."""
    runs = instance.get_runs(dg.RunsFilter(job_name=job_name, tags={PARTITION_TAG: partition_key}), limit=last)
    failures = 0
    for run in runs:
        if run.status is not dg.DagsterRunStatus.FAILURE:
            break
        failures += 1
    return failures
