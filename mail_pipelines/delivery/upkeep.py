"""Dropping bookkeeping that nothing refers to any more: claims, allotments, usage windows, days of warm-ups, readings of reputation,
send windows."""

from __future__ import annotations

import datetime as dt

import sqlalchemy as sa
from sqlalchemy.engine import Engine

from mail_pipelines.database import pruning
from mail_pipelines.database.engine import reading
from mail_pipelines.database.models import Allotment, Campaign, Claim, ProviderUsage, Reputation, WarmUpDay, WindowRows, WindowSpan
from mail_pipelines.delivery.recording import USAGE_WINDOWS

KEEP_CLAIMS = dt.timedelta(days=14)
KEEP_WINDOWS = dt.timedelta(days=3)
# Those of a day are judged by warm-ups (`capacity.warm_up`), also if the centre was away for a while; what they found is kept for longer.
KEEP_DAYS = dt.timedelta(days=14)
KEEP_WARM_UP_DAYS = dt.timedelta(days=120)
# What providers told: a year can be compared with the one before.
KEEP_REPUTATION = dt.timedelta(days=800)


def prune(engine: Engine, now: dt.datetime) -> dict[str, int]:
    """Delete what is old, at most 10,000 rows a transaction; returns the number of rows by table.

    A server proves by one of its own newest claims that the database did not go back in time. So the claims of each server's last
    two weeks of activity are kept, however long ago they were, and those of campaigns that run for as long as they do.
    """
    over = sa.select(Campaign.id).where(Campaign.state.in_(("finished", "cancelled", "archived")))
    past, past_days = int((now - KEEP_WINDOWS).timestamp()), int((now - KEEP_DAYS).timestamp())
    return {
        "claims": _prune_claims(engine),
        "allotments": pruning.delete(
            engine, Allotment, (Allotment.slot_start, Allotment.campaign_id, Allotment.server_id, Allotment.provider), Allotment.slot_start < past
        ),
        "provider_usage": pruning.delete(
            engine,
            ProviderUsage,
            (ProviderUsage.server_id, ProviderUsage.provider, ProviderUsage.window_seconds, ProviderUsage.window_start),
            ProviderUsage.window_start + ProviderUsage.window_seconds < sa.case((ProviderUsage.window_seconds == max(USAGE_WINDOWS), past_days), else_=past),
        ),
        "warm_up_days": pruning.delete(
            engine, WarmUpDay, (WarmUpDay.server_id, WarmUpDay.provider, WarmUpDay.day), WarmUpDay.day < int((now - KEEP_WARM_UP_DAYS).timestamp())
        ),
        "reputation": pruning.delete(
            engine, Reputation, (Reputation.source, Reputation.subject, Reputation.day), Reputation.day < int((now - KEEP_REPUTATION).timestamp())
        ),
        "window_spans": pruning.delete(
            engine, WindowSpan, (WindowSpan.campaign_id, WindowSpan.time_zone, WindowSpan.opens_at), WindowSpan.campaign_id.in_(over)
        ),
        "window_rows": pruning.delete(
            engine, WindowRows, (WindowRows.campaign_id, WindowRows.provider, WindowRows.time_zone, WindowRows.opens_at), WindowRows.campaign_id.in_(over)
        ),
    }


def _prune_claims(engine: Engine) -> int:
    with reading(engine) as connection:
        newest = connection.execute(sa.select(Claim.server_id, sa.func.max(Claim.opened_at)).group_by(Claim.server_id)).tuples().all()
    running = sa.select(Campaign.id).where(Campaign.state.in_(("sending", "paused")))
    return sum(
        pruning.delete(
            engine,
            Claim,
            (Claim.id,),
            sa.and_(Claim.server_id == server_id, Claim.state == "closed", Claim.opened_at <= last - KEEP_CLAIMS, Claim.campaign_id.not_in(running)),
        )
        for server_id, last in newest
    )
