"""Failed runs: a campaign whose freeze fails again and again is held, so that an operator sees it and nobody is mailed by accident."""

from __future__ import annotations

import datetime as dt

import dagster as dg
from sqlalchemy.engine import Connection

from mail_pipelines.campaigns import states, store
from mail_pipelines.campaigns.campaign import CampaignError
from mail_pipelines.database.engine import reading, transact
from mail_pipelines.jobs import build_audience, report_campaign
from mail_pipelines.resources.database import CentralDatabase
from mail_pipelines.resources.queues import PARTITION_TAG
from mail_pipelines.sensors.campaigns import FAILURES_UNTIL_HELD
from mail_pipelines.sensors.runs import RUN_KEY_TAG, recent_failures

# The results of a finished campaign are tried so often; then somebody has to look at the runs.
REPORT_ATTEMPTS = 3


def failed_runs(context: dg.RunFailureSensorContext, database: CentralDatabase) -> dg.RunRequest | None:
    """Hold a campaign after three failed freezes in a row, and ask for failed results again. Failed send runs need nothing: the ledger decides what is open.

    Only failures since the campaign was last changed count, so that a resumed campaign has three new attempts.
    """
    run = context.dagster_run
    key = run.tags.get(PARTITION_TAG)
    context.log.warning("run %s of %s failed%s", run.run_id, run.job_name, f" for {key}" if key else "")
    if not key or run.job_name not in (build_audience.name, report_campaign.name):
        return None
    try:
        with reading(database.engine) as connection:
            campaign = store.load(connection, key)
    except CampaignError:
        # A run for a key that is no campaign.
        return None
    failures = recent_failures(context.instance, run.job_name, key, campaign.updated_at)
    if run.job_name == report_campaign.name:
        # Hourly results come again by themselves; those of the end were asked for by a run key that is used up.
        at_the_end = run.tags.get(RUN_KEY_TAG, "").startswith(f"{key}:finished")
        return dg.RunRequest(partition_key=key, run_key=f"{key}:finished:{failures}") if at_the_end and failures < REPORT_ATTEMPTS else None
    if failures < FAILURES_UNTIL_HELD:
        return None
    reason = f"the audience could not be built {FAILURES_UNTIL_HELD} times: see run {run.run_id}, then resume the campaign"

    def hold(connection: Connection) -> bool:
        return states.hold(connection, campaign.id, reason, dt.datetime.now(dt.UTC))

    transact(database.engine, hold)
    return None
