"""Supply: the lines of the fleet as they are now, for the plan. How much of what was offered was taken in the last hours slows a line down."""

from __future__ import annotations

import datetime as dt
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from mail_pipelines.capacity import breakers
from mail_pipelines.capacity.fleet import Fleet, Limits, Pair
from mail_pipelines.capacity.lines import Line
from mail_pipelines.database.models import Campaign, CampaignMinute, State
from mail_pipelines.delivery.recording import SLOT_SECONDS

# Deferrals of so long ago count, if there were so many answers; a line never counts for less than this part of itself.
FLOW_HOURS, _LEAST_ANSWERS, _LEAST_FLOW = 2, 100, 0.1
# A provider that is on trial takes a few messages now, and what it is worth later the next plan will know.
_TRIAL_SECONDS = 2 * SLOT_SECONDS


def read(connection: Connection, fleet: Fleet, providers: Iterable[str], now: dt.datetime) -> list[Line]:
    """The lines of all members that speak to these providers, as far as these are not held."""
    return lines(fleet, _flows(connection, now), providers, now)


def lines(fleet: Fleet, flows: Mapping[Pair, float], providers: Iterable[str], now: dt.datetime) -> list[Line]:
    """The same from plain values: `flows` is what `flow` says of each pair, 1 where it is missing."""
    return [
        _line(fleet, member.id, member.pool_id, provider, limits, flows.get((member.id, provider), 1.0), now)
        for provider in sorted(set(providers))
        if not fleet.held.over_provider(provider)
        for member in fleet.members
        if member.speaks and (limits := fleet.limits(member.id, provider)) is not None
    ]


def _line(fleet: Fleet, server_id: int, pool_id: int, provider: str, limits: Limits, flow: float, now: dt.datetime) -> Line:
    used = fleet.used.get((server_id, provider), {})
    breaker = fleet.stopped.get((server_id, provider))
    opens_at = 0
    if breaker is not None:
        opens_at = int(breaker.until.timestamp()) if breaker.state == breakers.OPEN and breaker.until else int(now.timestamp()) + _TRIAL_SECONDS
    return Line(
        server_id, pool_id, provider, limits.per_second, limits.per_hour, limits.per_day,
        used.get(SLOT_SECONDS, 0), used.get(3600, 0), used.get(86400, 0), flow, opens_at, limits.warming,
    )  # fmt: skip


def more_servers(fleet: Fleet, count: int, pool_ids: Iterable[int], providers: Iterable[str], caps: Sequence[int] = (), opens_at: int = 0) -> list[Line]:
    """The lines that `count` more servers of each of these pools would have, under the limits of all servers: from `opens_at` (epoch seconds) on, and with
    `caps` for the first days of sending; without any they are warm.
    """
    return [
        Line(-number, pool_id, provider, limits.per_second, limits.per_hour, _capped(limits.per_day, caps), opens_at=opens_at, warming=bool(caps))
        for pool_id in sorted(set(pool_ids))
        for number in range(1, count + 1)
        for provider in sorted(set(providers))
        if (limits := fleet.limits(0, provider)) is not None and not fleet.held.over_provider(provider)
    ]


def _capped(per_day: Sequence[int | None], caps: Sequence[int]) -> tuple[int | None, ...]:
    """The lesser of both, day by day; the last limit stands for all days after."""
    limits = [per_day[min(day, len(per_day) - 1)] for day in range(max(len(per_day), len(caps) + 1))]
    return tuple(limit if day >= len(caps) else caps[day] if limit is None else min(limit, caps[day]) for day, limit in enumerate(limits))


def _flows(connection: Connection, now: dt.datetime) -> Mapping[Pair, float]:
    """The part of the answers of the last hours that were no deferrals, by server and provider."""
    sending = connection.execute(sa.select(Campaign.id).where(Campaign.state == "sending")).scalars().all()
    if not sending:
        return {}
    by = (CampaignMinute.server_id, CampaignMinute.provider, CampaignMinute.state)
    since = int(now.timestamp()) // 60 - FLOW_HOURS * 60
    answers = [int(state) for state in (State.DELIVERED, State.BOUNCED, State.DEFERRED)]
    query = (
        sa.select(*by, sa.func.sum(CampaignMinute.count))
        .where(CampaignMinute.campaign_id.in_(sending), CampaignMinute.minute >= since, CampaignMinute.server_id != 0, CampaignMinute.state.in_(answers))
        .group_by(*by)
    )
    counts: defaultdict[Pair, dict[int, int]] = defaultdict(dict)
    for server_id, provider, state, count in connection.execute(query):
        counts[server_id, provider][state] = int(count)
    return {pair: flow(found.get(int(State.DEFERRED), 0), sum(found.values())) for pair, found in counts.items()}


def flow(deferred: int, answers: int) -> float:
    """The part of a line that is counted on after so many deferrals among the answers of the last `FLOW_HOURS`."""
    return max(_LEAST_FLOW, 1 - deferred / answers) if answers >= _LEAST_ANSWERS else 1.0
