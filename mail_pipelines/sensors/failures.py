"""Failed runs: a campaign whose freeze fails again and again is held, so that an operator sees it and nobody is mailed by accident."""

from __future__ import annotations

import datetime as dt

import dagster as dg
from sqlalchemy.engine import Connection

from mail_pipelines.campaigns import states, store
from mail_pipelines.campaigns.campaign import CampaignError
from mail_pipelines.database.engine import reading, transact
from mail_pipelines.jobs import build_audience
from mail_pipelines.resources.database import CentralDatabase
from mail_pipelines.sensors.campaigns import FAILURES_UNTIL_HELD
from mail_pipelines.sensors.runs import PARTITION_TAG, recent_failures


def failed_runs(context: dg.RunFailureSensorContext, database: CentralDatabase) -> None:
    """Hold a campaign after three failed freezes in a row. Failed send runs need nothing: the ledger decides what is open.

    Only failures since the campaign was last changed count, so that a resumed campaign has three new attempts.
    """
    run = context.dagster_run
    key = run.tags.get(PARTITION_TAG)
    context.log.warning("run %s of %s failed%s", run.run_id, run.job_name, f" for {key}" if key else "")
    if run.job_name != build_audience.name or not key:
        return
    try:
        with reading(database.engine) as connection:
            campaign = store.load(connection, key)
    except CampaignError:
        # A run for a key that is no campaign.
        return
    if recent_failures(context.instance, run.job_name, key, campaign.updated_at) < FAILURES_UNTIL_HELD:
        return
    reason = f"the audience could not be built {FAILURES_UNTIL_HELD} times: see run {run.run_id}, then resume the campaign"

    def hold(connection: Connection) -> bool:
        return states.hold(connection, campaign.id, reason, dt.datetime.now(dt.UTC))

    transact(database.engine, hold)
