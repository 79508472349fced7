"""Campaigns in time: keys for Dagster, freezes that are due, results of what has finished."""

from __future__ import annotations

import datetime as dt
import json
from collections.abc import Iterable, Sequence

import dagster as dg
import sqlalchemy as sa
from sqlalchemy.engine import Connection

from mail_pipelines import partitions
from mail_pipelines.campaigns import lifecycle, overdue, putting_off
from mail_pipelines.campaigns.states import CampaignState
from mail_pipelines.database.engine import reading
from mail_pipelines.database.models import Campaign, Segment, State
from mail_pipelines.jobs import build_audience, report_campaign
from mail_pipelines.ops.maintenance import close_open_rows
from mail_pipelines.resources.database import CentralDatabase
from mail_pipelines.resources.queues import PARTITION_TAG
from mail_pipelines.sensors.runs import recent_failures, unfinished
from mail_pipelines.sensors.ticks import instance_of

# Dagster's storage takes one statement for all, and SQLite not more than some thousand values in one (dagster#16260).
KEYS_A_TICK = 50
REPORTS_A_TICK = 50
# After so many failed freezes in a row an operator has to look (`failed_runs` holds the campaign).
FAILURES_UNTIL_HELD = 3
# A campaign gets its results when it has been over for no longer: shorter than Dagster's runs are kept, since a run key is one run only
# as long as that run is known, and longer than unknown rows of a cancelled campaign stay open.
_REPORT_FOR = dt.timedelta(days=14)
_KEY_FOR = dt.timedelta(days=30)
# What there is to show of a campaign that has just begun is little, and the run would be in the way of its first sessions.
_PROGRESS_AFTER = dt.timedelta(minutes=5)
# With 64 shards each below the 100,000 partitions of an asset above which Dagster's pages and ticks get slow.
_CAMPAIGN_KEYS = 1_000


def missing_keys(wanted: Iterable[str], known: Iterable[str]) -> list[str]:
    """Keys to add, at most `KEYS_A_TICK`."""
    present = set(known)
    return [key for key in wanted if key not in present][:KEYS_A_TICK]


def report_requests(finished: Sequence[str], sending: Sequence[str], now: dt.datetime) -> list[tuple[str, str]]:
    """(campaign, run key) of the results to request: once when nothing is open any more, and once an hour while sending."""
    return [(key, f"{key}:finished") for key in finished] + [(key, f"{key}:{now:%Y-%m-%dT%H}") for key in sending]


def due_campaigns(context: dg.SensorEvaluationContext, database: CentralDatabase) -> dg.SensorResult:
    """Give campaigns and segments their partition keys, and freeze the audience of every campaign whose start has come."""
    now = dt.datetime.now(dt.UTC)
    with reading(database.engine) as connection:
        due = lifecycle.due(connection, now) + lifecycle.building(connection)
        campaign_keys = _campaign_keys(connection, now)
        segment_keys = connection.execute(sa.select(Segment.key).order_by(Segment.id)).scalars().all()
    instance = instance_of(context)
    # Dagster looks whether a key is there and inserts it then, so two adders at once race (error 1062 of MySQL). Each definition therefore has one adder:
    # campaigns and segments this sensor, servers `server_health`; Dagster runs no sensor twice at once. What fails is asked for again by the next tick.
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
        if campaign.key in known
        and campaign.key not in busy
        and recent_failures(instance, build_audience.name, campaign.key, campaign.updated_at) < FAILURES_UNTIL_HELD
    ]
    return dg.SensorResult(run_requests=runs, dynamic_partitions_requests=requests)


def _campaign_keys(connection: Connection, now: dt.datetime) -> Sequence[str]:
    """Campaigns that Dagster should know: those scheduled, running or over for less than 30 days, the last changed first."""
    query = (
        sa.select(Campaign.key)
        .where(Campaign.state != CampaignState.DRAFT.value, sa.func.coalesce(Campaign.finished_at, now) > now - _KEY_FOR)
        .order_by(Campaign.updated_at.desc(), Campaign.id)
        .limit(_CAMPAIGN_KEYS)
    )
    return connection.execute(query).scalars().all()


def finished_campaigns(context: dg.SensorEvaluationContext, database: CentralDatabase) -> dg.SensorResult:
    """Finish campaigns without open rows and ask for their results once; refresh those of ones that run for minutes every hour.

    A cancelled campaign is over when its last row has ended, which may be days after the cancel. The cursor holds the run keys that
    were asked for; should it be lost, Dagster still runs a run key once.
    """
    now = dt.datetime.now(dt.UTC)
    engine = database.engine
    with reading(engine) as connection:
        running = lifecycle.running(connection)
        ended = lifecycle.ended(connection, now - _REPORT_FOR)
        cancelled = [campaign for campaign in ended if campaign.state is CampaignState.CANCELLED]
        opened = overdue.open_rows(connection, running + cancelled)
        windows_closed = putting_off.closing(connection, now, database.settings.sending.lease_seconds)
    finished = [campaign.key for campaign in ended if not opened.get(campaign.id)]
    finished += [campaign.key for campaign in running if not opened[campaign.id] and lifecycle.finish_if_done(engine, campaign.id, now)]
    begun = [campaign.key for campaign in running if campaign.started_at is not None and campaign.started_at <= now - _PROGRESS_AFTER]
    requested = report_requests(finished, [key for key in begun if key not in finished], now)
    instance = instance_of(context)
    known = set(instance.get_dynamic_partitions(partitions.campaigns.name or ""))
    asked = set(json.loads(context.cursor or "[]"))
    new = [(key, run_key) for key, run_key in requested if key in known and run_key not in asked][:REPORTS_A_TICK]
    runs = [dg.RunRequest(job_name=report_campaign.name, partition_key=key, run_key=run_key) for key, run_key in new]
    if windows_closed or any(overdue.needs_closing(campaign, opened[campaign.id], now) for campaign in running + cancelled):
        if not unfinished(instance, close_open_rows.name):
            runs.append(dg.RunRequest(job_name=close_open_rows.name))
    elif any(rows.get(State.UNKNOWN) for rows in opened.values()):
        runs.append(dg.RunRequest(job_name=close_open_rows.name, run_key=f"unknown:{now:%Y-%m-%dT%H}"))
    cursor = json.dumps(sorted((asked | {run_key for _, run_key in new}) & {run_key for _, run_key in requested}))
    return dg.SensorResult(run_requests=runs, cursor=cursor)
