"""The steps that time and decisions make a campaign take: due, expired, given up, cancelled, finished.

What belongs here: functions of the database and a given time, each safe to repeat and to run while servers send. Sensors and
commands call them. What does not: the freeze (`audience`) and the moves between states (`states`).
"""

from __future__ import annotations

import datetime as dt
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine

from mail_pipelines.campaigns import progress, resending, states, store
from mail_pipelines.campaigns.campaign import Campaign
from mail_pipelines.campaigns.open_rows import WAITING, any_open, move_rows
from mail_pipelines.campaigns.states import Actor, CampaignState
from mail_pipelines.database import models
from mail_pipelines.database.engine import reading, transact
from mail_pipelines.database.models import State
from mail_pipelines.dispatch import holds

_RUNNING = (CampaignState.SENDING, CampaignState.PAUSED)
# A tick looks at no more campaigns than these, the oldest first: they come to an end, and make room for the others.
DUE_A_TICK = 50
RUNNING_A_TICK = 500
ENDED_A_TICK = 500


def due(connection: Connection, now: dt.datetime) -> list[Campaign]:
    """Campaigns to freeze now: scheduled, at or past their start, not held; urgent ones first, then by start."""
    row = models.Campaign
    return store.select(
        connection,
        sa.and_(row.state == CampaignState.SCHEDULED.value, row.start_at <= now, ~holds.over_campaigns()),
        order_by=(row.priority.desc(), row.start_at, row.id),
        limit=DUE_A_TICK,
    )


def building(connection: Connection) -> list[Campaign]:
    """Campaigns whose freeze has begun and not ended, not held: it runs now, or was killed and is to be run again."""
    row = models.Campaign
    return store.select(connection, sa.and_(row.state == CampaignState.BUILDING.value, ~holds.over_campaigns()), limit=DUE_A_TICK)


def running(connection: Connection) -> list[Campaign]:
    """Campaigns that are sending or paused: those whose rows may expire, be given up or be the last."""
    return store.select(connection, models.Campaign.state.in_([state.value for state in _RUNNING]), limit=RUNNING_A_TICK)


def ended(connection: Connection, since: dt.datetime) -> list[Campaign]:
    """Campaigns that were finished or cancelled after `since`, the newest first. A cancelled one may still have open rows."""
    row = models.Campaign
    over = row.state.in_([state.value for state in CampaignState if state.is_terminal])
    return store.select(connection, sa.and_(over, row.finished_at > since), order_by=(row.finished_at.desc(), row.id), limit=ENDED_A_TICK)


def expire_open_rows(engine: Engine, campaign: Campaign, now: dt.datetime) -> int:
    """After the campaign's expiry, turn pending and deferred rows into expired; returns how many. Claimed rows are their sender's.

    Rows that waited to be sent again become unresolved.
    """
    if campaign.state not in _RUNNING or campaign.expires_at is None or now < campaign.expires_at:
        return 0
    return move_rows(engine, campaign.id, WAITING, State.EXPIRED, now, only=resending.give_up_waiting(engine, campaign.id, now))


def give_up_unknown(engine: Engine, campaign_id: int, now: dt.datetime, unknown_hours: float) -> int:
    """Turn rows that have been unknown for `unknown_hours` into unresolved, which is final; returns how many."""
    return move_rows(engine, campaign_id, (State.UNKNOWN,), State.UNRESOLVED, now, reached_by=now - dt.timedelta(hours=unknown_hours))


def finish_if_done(engine: Engine, campaign_id: int, now: dt.datetime) -> bool:
    """Finish a sending or paused campaign that has no open row left; true if this call finished it."""
    with reading(engine) as connection:
        if any_open(connection, campaign_id):
            return False

    def work(connection: Connection) -> bool:
        # Claims read this row FOR SHARE, so none is in flight while the ledger is probed again.
        state = connection.execute(sa.select(models.Campaign.state).where(models.Campaign.id == campaign_id).with_for_update()).scalar_one_or_none()
        if state not in _RUNNING or any_open(connection, campaign_id):
            return False
        states.move(connection, campaign_id, CampaignState(state), CampaignState.FINISHED, actor=Actor.CENTRE, now=now)
        return True

    return transact(engine, work)


def cancel(engine: Engine, key: str, now: dt.datetime) -> int:
    """Cancel the campaign and turn its waiting rows into cancelled; returns how many this call turned.

    From the commit of the move no server claims further rows. Rows already claimed end as their sender or settlement says.
    Cancelling again goes on where a killed call stopped. Raises `StateError` for a finished campaign.
    """

    def work(connection: Connection) -> int:
        campaign = store.load(connection, key, for_update=True)
        if campaign.state is not CampaignState.CANCELLED:
            counts = _counts_of_loaded_rows(connection, campaign) if campaign.state is CampaignState.BUILDING else {}
            states.move(connection, campaign.id, campaign.state, CampaignState.CANCELLED, actor=Actor.OPERATOR, now=now, **counts)
        return campaign.id

    return cancel_waiting_rows(engine, transact(engine, work), now)


def _counts_of_loaded_rows(connection: Connection, campaign: Campaign) -> dict[str, Any]:
    """A freeze cancelled half-way: its audience is what was loaded, the rest counts as excluded, so that the sums hold."""
    if campaign.audience_counts is None:
        return {}
    loaded = sum(progress.by_state(connection, campaign.id).values())
    excluded = campaign.audience_counts["excluded"] | {"cancelled": campaign.audience_counts["audience"] - loaded}
    return {"audience_counts": campaign.audience_counts | {"audience": loaded, "excluded": excluded}}


def cancel_waiting_rows(engine: Engine, campaign_id: int, now: dt.datetime) -> int:
    """Turn the pending and deferred rows of a cancelled campaign into cancelled; returns how many. Those to be sent again become unresolved."""
    return move_rows(engine, campaign_id, WAITING, State.CANCELLED, now, only=resending.give_up_waiting(engine, campaign_id, now))
