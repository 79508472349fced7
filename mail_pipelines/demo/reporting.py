"""Whether Dagster has computed the results of a campaign that is over."""

from __future__ import annotations

import dagster as dg

from mail_pipelines.config import Settings
from mail_pipelines.errors import MailPipelinesError


def reported(settings: Settings, key: str) -> bool:
    """Whether the run that computes them after the end has succeeded. Raises `MailPipelinesError` if it failed."""
    with dg.DagsterInstance.from_config(str(settings.dagster_home)) as instance:
        tags = {"dagster/partition": key, "dagster/run_key": f"{key}:finished"}
        runs = instance.get_runs(dg.RunsFilter(job_name="report_campaign", tags=tags))
    if any(run.status is dg.DagsterRunStatus.FAILURE for run in runs):
        raise MailPipelinesError("the run that computes the campaign's results failed; its log is in the UI")
    return any(run.status is dg.DagsterRunStatus.SUCCESS for run in runs)
