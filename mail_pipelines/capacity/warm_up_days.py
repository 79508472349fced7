"""What servers did on a day, by provider, from the numbers that are rolled up as mail is sent: usage windows, outcomes by the minute, complaints.

The ledger is not scanned: of it, only the rows of those who complained are looked up, for the server that had sent to them.
"""

from __future__ import annotations

import datetime as dt
from collections import defaultdict
from collections.abc import Collection
from dataclasses import replace

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from mail_pipelines.capacity.warm_up_rules import Counts
from mail_pipelines.database.models import Campaign, CampaignMinute, Delivery, EngagementEvent, ProviderUsage, State

# The longest usage window (s): a day of the database's clock.
DAY = 86400
# Complaints about campaigns that ended longer ago say nothing about the server as it is now.
_COMPLAINTS_AFTER = 14 * DAY
# A server and a provider.
Pair = tuple[int, str]
_ANSWERS = {State.DELIVERED: "delivered", State.BOUNCED: "bounced", State.DEFERRED: "deferred"}


def day_of(moment: dt.datetime) -> int:
    """The first epoch second of the day that contains a moment."""
    second = int(moment.timestamp())
    return second - second % DAY


def read(connection: Connection, day: int, server_ids: Collection[int], ignored: Collection[str]) -> dict[Pair, Counts]:
    """What these servers did on a day that is over; deferrals of the classes `ignored` are left out."""
    found: defaultdict[Pair, Counts] = defaultdict(Counts)
    usage = sa.select(ProviderUsage.server_id, ProviderUsage.provider, ProviderUsage.used)
    for row in connection.execute(
        usage.where(ProviderUsage.server_id.in_(server_ids), ProviderUsage.window_seconds == DAY, ProviderUsage.window_start == day, ProviderUsage.used > 0)
    ):
        found[row.server_id, row.provider] += Counts(sent=row.used)
    by = (CampaignMinute.server_id, CampaignMinute.provider, CampaignMinute.state)
    answers = (
        sa.select(*by, sa.func.sum(CampaignMinute.count).label("number"))
        .where(
            CampaignMinute.campaign_id.in_(campaigns_of(connection, day, since=day)),
            CampaignMinute.minute >= day // 60,
            CampaignMinute.minute < (day + DAY) // 60,
            CampaignMinute.server_id.in_(server_ids),
            CampaignMinute.state.in_([int(state) for state in _ANSWERS]),
            sa.or_(CampaignMinute.state != int(State.DEFERRED), CampaignMinute.reason.not_in(sorted(ignored))),
        )
        .group_by(*by)
    )
    for server_id, provider, state, number in connection.execute(answers).tuples():
        # A correction may take away what an earlier day counted.
        found[server_id, provider] += Counts(**{_ANSWERS[State(state)]: max(0, int(number))})
    for pair, number in _complaints(connection, day, server_ids).items():
        found[pair] = replace(found[pair], complaints=number)
    return dict(found)


def _complaints(connection: Connection, day: int, server_ids: Collection[int]) -> dict[Pair, int]:
    """Who complained on that day, about whatever the server had sent them."""
    complained = (
        sa.select(Delivery.server_id, Delivery.provider, sa.func.count(sa.distinct(EngagementEvent.contact_id)))
        .join_from(EngagementEvent, Delivery, sa.and_(Delivery.campaign_id == EngagementEvent.campaign_id, Delivery.contact_id == EngagementEvent.contact_id))
        .where(
            EngagementEvent.campaign_id.in_(campaigns_of(connection, day, since=day - _COMPLAINTS_AFTER)),
            EngagementEvent.kind == "complaint",
            EngagementEvent.recorded_at >= _moment(day),
            EngagementEvent.recorded_at < _moment(day + DAY),
            Delivery.server_id.in_(server_ids),
        )
        .group_by(Delivery.server_id, Delivery.provider)
    )
    return {(server_id or 0, provider): int(number) for server_id, provider, number in connection.execute(complained).tuples()}


def campaigns_of(connection: Connection, day: int, *, since: int) -> list[int]:
    """Campaigns that had begun by the end of the day, and were not over before `since`."""
    over = sa.func.coalesce(Campaign.finished_at, _moment(day))
    return list(connection.execute(sa.select(Campaign.id).where(Campaign.started_at < _moment(day + DAY), over >= _moment(since))).scalars())


def _moment(second: int) -> dt.datetime:
    return dt.datetime.fromtimestamp(second, dt.UTC)
