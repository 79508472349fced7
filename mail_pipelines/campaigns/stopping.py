"""Campaigns that stop themselves: too many bad addresses, refused content or complaints hold a campaign, with the reason.

What belongs here: what the recorded outcomes say of each sending campaign. What does not: the thresholds (`delivery.breakers`) and the
hold itself (`states`). A held campaign claims nothing; `campaign resume` releases it, and from then on only what comes later counts.
"""

from __future__ import annotations

import datetime as dt
from collections import Counter, defaultdict

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine

from mail_pipelines.campaigns import states
from mail_pipelines.database.engine import reading, transact
from mail_pipelines.database.models import Campaign, CampaignCounter, CampaignMinute, EngagementEvent, State
from mail_pipelines.delivery.breakers import CampaignRules, Counts, campaign_rules
from mail_pipelines.delivery.classes import Action, classes_of
from mail_pipelines.dispatch import holds

_ANSWERS = (State.DELIVERED, State.BOUNCED, State.DEFERRED)
_REASONS = {
    Counts.BAD_ADDRESSES: classes_of(Action.HARD, Action.HARD_SECOND),
    Counts.REFUSED_CONTENT: classes_of(Action.CAMPAIGN),
}


def stop_bad(engine: Engine, now: dt.datetime, rules: CampaignRules | None = None) -> dict[str, str]:
    """Hold sending campaigns whose answers pass a limit; returns the reason of each that was held now, by key."""
    rules = rules or campaign_rules()
    with reading(engine) as connection:
        query = sa.select(Campaign.id, Campaign.key, Campaign.updated_at).where(Campaign.state == "sending", ~holds.over_campaigns())
        reasons = {row.id: (row.key, _reason(connection, row.id, row.updated_at, now, rules)) for row in connection.execute(query).all()}
    held = {}
    for campaign_id, (key, reason) in reasons.items():
        if reason and transact(engine, lambda connection, campaign_id=campaign_id, reason=reason: states.hold(connection, campaign_id, reason, now)):  # type: ignore[misc]
            held[key] = reason
    return held


def _reason(connection: Connection, campaign_id: int, changed_at: dt.datetime, now: dt.datetime, rules: CampaignRules) -> str | None:
    """Why the campaign has to stop, if it has to."""
    # Of the minute of the change itself nobody knows what came after it.
    since = max(int(changed_at.timestamp()) // 60 + 1, int((now - rules.window).timestamp()) // 60)
    answers = _answers(connection, campaign_id, since)
    for rule in rules.rules:
        if rule.counts is Counts.COMPLAINTS:
            bad, total = _complaints(connection, campaign_id, changed_at), _delivered(connection, campaign_id)
        else:
            bad, total = sum(answers[reason] for reason in _REASONS[rule.counts]), answers.total()
        if bad and rule.trips(bad, total):
            return f"stopped itself: {bad:,} {rule.counts} in {total:,} answers, the limit is {rule.share:.1%}; see what is wrong, then resume it"
    return None


def _answers(connection: Connection, campaign_id: int, since_minute: int) -> Counter[str]:
    """Answers by class from a minute (epoch minutes) on."""
    rows = connection.execute(
        sa.select(CampaignMinute.reason, sa.func.sum(CampaignMinute.count))
        .where(CampaignMinute.campaign_id == campaign_id, CampaignMinute.minute >= since_minute, CampaignMinute.state.in_([int(state) for state in _ANSWERS]))
        .group_by(CampaignMinute.reason)
    )
    found: defaultdict[str, int] = defaultdict(int)
    for reason, count in rows.tuples():
        found[reason] += int(count)
    return Counter(found)


def _complaints(connection: Connection, campaign_id: int, since: dt.datetime) -> int:
    complained = (EngagementEvent.campaign_id == campaign_id, EngagementEvent.kind == "complaint", EngagementEvent.recorded_at >= since)
    return connection.execute(sa.select(sa.func.count(sa.distinct(EngagementEvent.contact_id))).where(*complained)).scalar_one()


def _delivered(connection: Connection, campaign_id: int) -> int:
    ours = (CampaignCounter.campaign_id == campaign_id, CampaignCounter.state == int(State.DELIVERED))
    return int(connection.execute(sa.select(sa.func.coalesce(sa.func.sum(CampaignCounter.count), 0)).where(*ours)).scalar_one())
