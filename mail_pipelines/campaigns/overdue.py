"""Rows whose time is over: what has to be done for which campaign, and sending unknown rows again where the campaign says so.

Sensors ask `needs_closing` every few seconds; the work itself is done in a run.
"""

from __future__ import annotations

import datetime as dt
from collections import Counter

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine

from mail_pipelines.campaigns import store
from mail_pipelines.campaigns.campaign import Campaign, OnUnknown
from mail_pipelines.campaigns.open_rows import WAITING
from mail_pipelines.campaigns.states import CampaignState
from mail_pipelines.contacts.sets import insert_if_absent
from mail_pipelines.database import models
from mail_pipelines.database.bulk import CHUNK_ROWS
from mail_pipelines.database.engine import transact
from mail_pipelines.database.models import CampaignCounter, Delivery, DeliveryEvent, State
from mail_pipelines.delivery import counters
from mail_pipelines.delivery.recording import event_id

# An unknown message is sent again no sooner: by then its bounce, if there is one, has come.
RESEND_AFTER = dt.timedelta(hours=6)
_RECENT = dt.timedelta(days=7)
_RESENT = "resent"


def cancelled_with_waiting_rows(connection: Connection, now: dt.datetime) -> list[Campaign]:
    """Cancelled campaigns whose waiting rows were not all turned: a killed cancel, or rows that came back from a server since."""
    row = models.Campaign
    recent = sa.and_(row.state == CampaignState.CANCELLED.value, row.updated_at > now - _RECENT)
    return [campaign for campaign in store.select(connection, recent) if _count(connection, campaign.id, WAITING)]


def needs_closing(connection: Connection, campaigns: list[Campaign], now: dt.datetime) -> bool:
    """Whether a campaign that is running has waiting rows past its expiry, or a cancelled one still has waiting rows."""
    expired = [campaign for campaign in campaigns if campaign.expires_at is not None and campaign.expires_at <= now]
    return any(_count(connection, campaign.id, WAITING) for campaign in expired) or bool(cancelled_with_waiting_rows(connection, now))


def has_unknown(connection: Connection, campaigns: list[Campaign]) -> bool:
    return any(_count(connection, campaign.id, (State.UNKNOWN,)) for campaign in campaigns)


def _count(connection: Connection, campaign_id: int, states: tuple[State, ...]) -> int:
    total = sa.select(sa.func.coalesce(sa.func.sum(CampaignCounter.count), 0)).where(
        CampaignCounter.campaign_id == campaign_id, CampaignCounter.state.in_([int(state) for state in states])
    )
    return int(connection.execute(total).scalar_one())


def resend_unknown(engine: Engine, campaign: Campaign, now: dt.datetime) -> int:
    """Offer rows that have been unknown for six hours once more, if the campaign has `on_unknown: resend`; returns how many.

    A row is sent again once: an event remembers it. The attempt stays, so the second copy carries the same Message-ID.
    """
    if campaign.definition.on_unknown is not OnUnknown.RESEND or campaign.state is not CampaignState.SENDING:
        return 0
    moved = 0
    while count := transact(engine, lambda connection: _resend_chunk(connection, campaign.id, now)):
        moved += count
    return moved


def _resend_chunk(connection: Connection, campaign_id: int, now: dt.datetime) -> int:
    resent = sa.exists().where(DeliveryEvent.campaign_id == campaign_id, DeliveryEvent.contact_id == Delivery.contact_id, DeliveryEvent.kind == _RESENT)
    rows = connection.execute(
        sa.select(Delivery.contact_id, Delivery.attempt, Delivery.shard, Delivery.provider)
        .where(
            Delivery.campaign_id == campaign_id,
            Delivery.state == int(State.UNKNOWN),
            Delivery.sort_key <= int((now - RESEND_AFTER).timestamp()),
            ~resent,
        )
        .limit(CHUNK_ROWS)
        .with_for_update()
    ).all()
    if not rows:
        return 0
    events = [
        {
            "month": now.year * 100 + now.month,
            "id": event_id(campaign_id, row.contact_id, row.attempt, _RESENT),
            "occurred_at": now,
            "campaign_id": campaign_id,
            "contact_id": row.contact_id,
            "attempt": row.attempt,
            "kind": _RESENT,
        }
        for row in rows
    ]
    connection.execute(insert_if_absent(DeliveryEvent), events)
    connection.execute(
        sa.update(Delivery)
        .where(Delivery.campaign_id == campaign_id, Delivery.contact_id.in_([row.contact_id for row in rows]), Delivery.state == int(State.UNKNOWN))
        .values(state=int(State.PENDING), sort_key=0, claim_id=None, server_id=None)
    )
    moves: Counter[counters.Place] = Counter()
    for row in rows:
        moves[row.shard, row.provider, State.UNKNOWN, ""] -= 1
        moves[row.shard, row.provider, State.PENDING, ""] += 1
    counters.add(connection, campaign_id, counters.CENTRE, moves, now)
    return len(rows)
