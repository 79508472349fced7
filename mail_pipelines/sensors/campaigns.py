"""Campaigns in time: keys for Dagster, freezes that are due, results of what has finished."""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterable, Sequence

import dagster as dg
import sqlalchemy as sa

from mail_pipelines import partitions
from mail_pipelines.campaigns import lifecycle, overdue, progress
from mail_pipelines.database.engine import reading
from mail_pipelines.database.models import Campaign, Segment
from mail_pipelines.jobs import build_audience, report_campaign
from mail_pipelines.ops.maintenance import close_open_rows
from mail_pipelines.resources.database import CentralDatabase
from mail_pipelines.sensors.runs import PARTITION_TAG, recent_failures, unfinished

KEYS_A_TICK = 50
# After so many failed freezes in a row an operator has to look (`failed_runs` holds the campaign).
FAILURES_UNTIL_HELD = 3
_REPORT_FOR = dt.timedelta(days=2)


def missing_keys(wanted: Iterable[str], known: Iterable[str]) -> list[str]:
    """Keys to add, at most `KEYS_A_TICK`."""
    present = set(known)
    return [key for key in wanted if key not in present][:KEYS_A_TICK]


def report_requests(finished: Sequence[str], sending: Sequence[str], now: dt.datetime) -> list[tuple[str, str]]:
    """(campaign, run key) of the results to request: once when finished, and once an hour while sending."""
    return [(key, f"{key}:finished") for key in finished] + [(key, f"{key}:{now:%Y-%m-%dT%H}") for key in sending]


def due_campaigns(context: dg.SensorEvaluationContext, database: CentralDatabase) -> dg.SensorResult:
    """Give campaigns and segments their partition keys, and freeze the audience of every campaign whose start has come."""
    now = dt.datetime.now(dt.UTC)
    with reading(database.engine) as connection:
        due = lifecycle.due(connection, now) + lifecycle.building(connection)
        campaign_keys = connection.execute(sa.select(Campaign.key).where(Campaign.state != "draft").order_by(Campaign.id)).scalars().all()
        segment_keys = connection.execute(sa.select(Segment.key).order_by(Segment.id)).scalars().all()
    instance = context.instance
    requests: list[dg.AddDynamicPartitionsRequest] = []
    known = set(instance.get_dynamic_partitions(partitions.campaigns.name or ""))
    for definition, wanted in ((partitions.campaigns, campaign_keys), (partitions.segments, segment_keys)):
        present = known if definition is partitions.campaigns else instance.get_dynamic_partitions(definition.name or "")
        if new := missing_keys(wanted, present):
            requests.append(definition.build_add_request(new))
            known |= set(new)
    busy = {run.tags.get(PARTITION_TAG) for run in unfinished(instance, build_audience.name)}
    runs = [
        dg.RunRequest(job_name=build_audience.name, partition_key=campaign.key)
        for campaign in due
        if campaign.key in known and campaign.key not in busy and recent_failures(instance, build_audience.name, campaign.key) < FAILURES_UNTIL_HELD
    ]
    return dg.SensorResult(run_requests=runs, dynamic_partitions_requests=requests)


def finished_campaigns(context: dg.SensorEvaluationContext, database: CentralDatabase) -> dg.SensorResult:
    """Finish campaigns without open rows and ask for their results once; refresh those of running ones every hour."""
    now = dt.datetime.now(dt.UTC)
    engine = database.engine
    with reading(engine) as connection:
        running = lifecycle.running(connection)
        done = [campaign for campaign in running if not progress.totals(connection, campaign).open]
        closing = overdue.needs_closing(connection, running, now)
        unknown = overdue.has_unknown(connection, running)
    for campaign in done:
        lifecycle.finish_if_done(engine, campaign.id, now)
    with reading(engine) as connection:
        finished = connection.execute(
            sa.select(Campaign.key).where(Campaign.state.in_(("finished", "cancelled")), Campaign.finished_at > now - _REPORT_FOR)
        ).scalars()
        requested = report_requests(list(finished), [campaign.key for campaign in running if campaign not in done], now)
    known = set(context.instance.get_dynamic_partitions(partitions.campaigns.name or ""))
    runs = [dg.RunRequest(job_name=report_campaign.name, partition_key=key, run_key=run_key) for key, run_key in requested if key in known]
    if closing and not unfinished(context.instance, close_open_rows.name):
        runs.append(dg.RunRequest(job_name=close_open_rows.name))
    elif unknown:
        runs.append(dg.RunRequest(job_name=close_open_rows.name, run_key=f"unknown:{now:%Y-%m-%dT%H}"))
    return dg.SensorResult(run_requests=runs)
