"""What an operator decides about a campaign's course: schedule, start now, take back, pause, resume.

Each function is one decision, safe to repeat by mistake: a second time raises `StateError`, which says what is possible. Cancelling
is in `lifecycle`, for it has work to do.
"""

from __future__ import annotations

import datetime as dt

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine

from mail_pipelines.campaigns import states, store, versions
from mail_pipelines.campaigns.campaign import Campaign, CampaignError
from mail_pipelines.campaigns.check import CheckFailed, check
from mail_pipelines.campaigns.states import Actor, CampaignState, StateError
from mail_pipelines.config import Settings
from mail_pipelines.database import models
from mail_pipelines.database.engine import reading, transact


def schedule(
    engine: Engine, settings: Settings, key: str, now: dt.datetime, *, start_at: dt.datetime | None = None, allow_unverified: bool = False
) -> Campaign:
    """Check the draft, compile its content for good, and schedule it for `start_at`, by default its own start.

    With `allow_unverified` the DNS is not asked about the From domain: for domains that exist in tests only.
    Raises `CheckFailed` with all problems, `CampaignError` without a start, `StateError` if it is no draft.
    """
    with reading(engine) as connection:
        campaign = store.load(connection, key)
    start = start_at or campaign.definition.start_at
    if campaign.state is not CampaignState.DRAFT:
        # Named before the check, which speaks of drafts.
        _move(engine, campaign, CampaignState.DRAFT, CampaignState.SCHEDULED, now)
    if start is None:
        raise CampaignError(f"campaign {key} has no start: give --at TIME, or `mail-pipelines campaign start {key}` for now")
    if problems := check(engine, settings, key, now, start_at=start, allow_unverified=allow_unverified):
        raise CheckFailed(key, problems)
    version = versions.compile_current(engine, key, now)

    def work(connection: Connection) -> Campaign:
        if store.load(connection, key, for_update=True).version_id != version.id:
            raise StateError(f"the content of campaign {key} was changed while it was checked; schedule it again")
        states.move(connection, campaign.id, CampaignState.DRAFT, CampaignState.SCHEDULED, actor=Actor.OPERATOR, now=now, start_at=start)
        return store.load(connection, key)

    return transact(engine, work)


def start(engine: Engine, settings: Settings, key: str, now: dt.datetime, *, allow_unverified: bool = False) -> Campaign:
    """Schedule the draft for now, or bring a scheduled campaign's start forward to now. Raises as `schedule` does."""
    with reading(engine) as connection:
        campaign = store.load(connection, key)
    if campaign.state is not CampaignState.SCHEDULED:
        return schedule(engine, settings, key, now, start_at=now, allow_unverified=allow_unverified)
    if problems := check(engine, settings, key, now, start_at=now, allow_unverified=allow_unverified):
        raise CheckFailed(key, problems)

    def work(connection: Connection) -> Campaign:
        forward = sa.update(models.Campaign).where(models.Campaign.id == campaign.id, models.Campaign.state == CampaignState.SCHEDULED.value)
        connection.execute(forward.values(start_at=now, updated_at=now))
        return store.load(connection, key)

    return transact(engine, work)


def unschedule(engine: Engine, key: str, now: dt.datetime) -> Campaign:
    """Make a scheduled campaign a draft again, so that it can be edited."""
    with reading(engine) as connection:
        campaign = store.load(connection, key)
    return _move(engine, campaign, CampaignState.SCHEDULED, CampaignState.DRAFT, now)


def pause(engine: Engine, key: str, now: dt.datetime) -> Campaign:
    """Stop a sending campaign: from the commit on no server claims another row of it."""
    with reading(engine) as connection:
        campaign = store.load(connection, key)
    return _move(engine, campaign, CampaignState.SENDING, CampaignState.PAUSED, now)


def resume(engine: Engine, key: str, now: dt.datetime, by_whom: str) -> Campaign:
    """Let a paused campaign send again, and end its own hold in whatever state. Raises `StateError` if it is neither paused nor held."""

    def work(connection: Connection) -> Campaign:
        campaign = store.load(connection, key, for_update=True)
        released = states.release(connection, campaign.id, by_whom, now)
        if campaign.state is CampaignState.PAUSED or not released:
            states.move(connection, campaign.id, CampaignState.PAUSED, CampaignState.SENDING, actor=Actor.OPERATOR, now=now)
        return store.load(connection, key)

    return transact(engine, work)


def _move(engine: Engine, campaign: Campaign, source: CampaignState, target: CampaignState, now: dt.datetime) -> Campaign:
    def work(connection: Connection) -> Campaign:
        states.move(connection, campaign.id, source, target, actor=Actor.OPERATOR, now=now)
        return store.load(connection, campaign.key)

    return transact(engine, work)
