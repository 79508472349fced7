"""Alerts: what operators are told of, by mail or webhook."""

from __future__ import annotations

import datetime as dt
from collections import Counter

import dagster as dg

from mail_pipelines.alerts import causes, telling
from mail_pipelines.alerts.cause import Cause
from mail_pipelines.alerts.channels import ChannelError, channels_of
from mail_pipelines.database.engine import database_now, reading
from mail_pipelines.jobs import SYNC_EXTERNAL, send_campaign
from mail_pipelines.resources.database import CentralDatabase
from mail_pipelines.sensors.ticks import instance_of

FAILED_WITHIN = dt.timedelta(hours=1)
# Of these others tell what is to be told: the ledger decides what is open, and others go on with it; each source has its own cause (`alerts.external`).
_TOLD_OTHERWISE = (send_campaign.name, SYNC_EXTERNAL)
_RUNS_A_LOOK = 100


def alerts(context: dg.SensorEvaluationContext, database: CentralDatabase) -> dg.SensorResult | dg.SkipReason:
    """Tell operators what they have to know of: each cause once, again after a day, and when it is over. What no relay takes now is told at a later tick.

    The cursor is what keeps messages from going out, so that it is logged once.
    """
    settings = database.settings
    try:
        channels = channels_of(settings.alerts)
    except ChannelError as error:
        return _ended(context, (str(error),))
    if not channels:
        return dg.SkipReason("nobody is told: set alerts.relay_host or alerts.webhook_url")
    with reading(database.engine) as connection:
        now = database_now(connection)
        found = causes.collect(connection, settings)
    found += failed_runs(instance_of(context), now)
    told = telling.look(database.engine, found, channels, now, dt.timedelta(hours=settings.alerts.reminder_hours))
    return _ended(context, told.errors, told.news)


def failed_runs(instance: dg.DagsterInstance, now: dt.datetime) -> list[Cause]:
    """Jobs with failed runs in the last hour."""
    filters = dg.RunsFilter(statuses=[dg.DagsterRunStatus.FAILURE], updated_after=now - FAILED_WITHIN)
    failed = [run for run in instance.get_runs(filters, limit=_RUNS_A_LOOK) if run.job_name not in _TOLD_OTHERWISE]
    # The newest first: its id is the one to look at.
    last = {run.job_name: run.run_id for run in reversed(failed)}
    counts = sorted(Counter(run.job_name for run in failed).items())
    words = {job: f"{count} run{'s' if count > 1 else ''} of {job} failed within an hour, the last is {last[job]}" for job, count in counts}
    return [Cause("runs", job, text, "dagster run list --limit 20") for job, text in words.items()]


def _ended(context: dg.SensorEvaluationContext, errors: tuple[str, ...], news: int = 0) -> dg.SensorResult:
    trouble = "; ".join(errors)
    if trouble and trouble != context.cursor:
        context.log.error("operators are not told: %s", trouble)
    return dg.SensorResult(cursor=trouble, skip_reason=dg.SkipReason(trouble or (f"{news} pieces of news were told" if news else "there is no news")))
