"""Rows whose time is over: what has to be done for which campaign, by the counters, and unknown rows that are due to be sent again.

Sensors ask every few seconds; the work itself is done in a run.
"""

from __future__ import annotations

import datetime as dt
from collections import defaultdict
from collections.abc import Iterable, Mapping

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine

from mail_pipelines.campaigns import resending, store
from mail_pipelines.campaigns.campaign import Campaign, OnUnknown
from mail_pipelines.campaigns.open_rows import WAITING
from mail_pipelines.campaigns.states import CampaignState
from mail_pipelines.database import models
from mail_pipelines.database.models import OPEN_STATES, CampaignCounter, State

# An unknown message is sent again no sooner: by then its bounce, if there is one, has come.
RESEND_AFTER = dt.timedelta(hours=6)
# So long before its expiry a campaign sends nothing again: the copy must have time to be claimed and answered.
RESEND_UNTIL_EXPIRY = dt.timedelta(minutes=15)
# Open rows of one campaign by state, only where there are any.
OpenRows = Mapping[State, int]


def open_rows(connection: Connection, campaigns: Iterable[Campaign]) -> dict[int, OpenRows]:
    """The open rows of each campaign by its id, from the counters: one statement, however many campaigns."""
    rows = sa.func.sum(CampaignCounter.count)
    query = (
        sa.select(CampaignCounter.campaign_id, CampaignCounter.state, rows.label("rows"))
        .where(
            CampaignCounter.campaign_id.in_([campaign.id for campaign in campaigns]),
            CampaignCounter.state.in_([int(state) for state in OPEN_STATES]),
        )
        .group_by(CampaignCounter.campaign_id, CampaignCounter.state)
        .having(rows != 0)
    )
    found: defaultdict[int, dict[State, int]] = defaultdict(dict)
    for row in connection.execute(query):
        found[row.campaign_id][State(row.state)] = int(row.rows)
    return {campaign.id: found.get(campaign.id, {}) for campaign in campaigns}


def cancelled_with_open_rows(connection: Connection) -> list[Campaign]:
    """Cancelled campaigns that are not at rest: a killed cancel, rows that came back from a server since, unknown rows."""
    row = models.Campaign
    opened = (
        sa.select(CampaignCounter.campaign_id)
        .join(row, row.id == CampaignCounter.campaign_id)
        .where(row.state == CampaignState.CANCELLED.value, CampaignCounter.state.in_([int(state) for state in OPEN_STATES]))
        .group_by(CampaignCounter.campaign_id)
        .having(sa.func.sum(CampaignCounter.count) > 0)
    )
    return store.select(connection, row.id.in_(opened))


def needs_closing(campaign: Campaign, opened: OpenRows, now: dt.datetime) -> bool:
    """Whether waiting rows of this running or cancelled campaign have to be ended."""
    expired = campaign.expires_at is not None and campaign.expires_at <= now
    return (expired or campaign.state is CampaignState.CANCELLED) and any(opened.get(state, 0) for state in WAITING)


def resend_unknown(engine: Engine, campaign: Campaign, now: dt.datetime) -> int:
    """Offer rows that have been unknown for six hours once more, if the campaign has `on_unknown: resend`; returns how many.

    A row is sent again once, and not when the campaign is held or about to expire.
    """
    if campaign.definition.on_unknown is not OnUnknown.RESEND or campaign.state is not CampaignState.SENDING or campaign.hold is not None:
        return 0
    if campaign.expires_at is not None and now >= campaign.expires_at - RESEND_UNTIL_EXPIRY:
        return 0
    return resending.send_again(engine, campaign.id, now, (CampaignState.SENDING,), unknown_since=now - RESEND_AFTER)
