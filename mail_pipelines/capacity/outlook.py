"""What the far plan looks at, read from the database: the calendar of scheduled campaigns, the trend of past ones, the days of each server, and
the servers on order."""

from __future__ import annotations

import datetime as dt
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import sqlalchemy as sa
from sqlalchemy.engine import Connection

from mail_pipelines.campaigns.send_window import SendWindow
from mail_pipelines.capacity import sizes
from mail_pipelines.capacity.far import Daily, InFlight, Outlook
from mail_pipelines.capacity.fleet import Fleet, Limits
from mail_pipelines.capacity.horizon import DAY, DAYS
from mail_pipelines.capacity.new_servers import HostSources
from mail_pipelines.database.models import DEFAULT_POOL, Campaign, CampaignCounter, Provision, Server, State
from mail_pipelines.dispatch import pools
from mail_pipelines.dispatch.registry import ServerState
from mail_pipelines.provisioning.states import IN_SERVICE, MAKING

# So many weeks back make the trend, and so much a week it may rise or fall.
PAST_WEEKS = 4
_LEAST_GROWTH, _MOST_GROWTH = 0.9, 1.1
_LAST_MADE = 5


@dataclass(frozen=True)
class Mailing:
    """A campaign of the past or of the calendar: its pool, the day on which it begins, its messages by provider, and when they may be sent."""

    pool_id: int
    day: dt.date
    rows: Mapping[str, int]
    window: SendWindow | None = None


def read(connection: Connection, fleet: Fleet, now: dt.datetime) -> list[Outlook]:
    """The outlook of each pool that has something to send, has sent, or is to."""
    today = now.date()
    keys = pools.keys(connection)
    past, coming = _past(connection, now), _coming(connection, now)
    found = []
    for pool_id in sorted({mailing.pool_id for mailing in [*past, *coming]} & keys.keys()):
        theirs = [mailing for mailing in past if mailing.pool_id == pool_id]
        found.append(of_pool(pool_id, keys[pool_id], theirs, [mailing for mailing in coming if mailing.pool_id == pool_id], today, fleet))
    return found


def of_pool(pool_id: int, key: str, past: Sequence[Mailing], coming: Sequence[Mailing], today: dt.date, fleet: Fleet) -> Outlook:
    """What comes up for a pool, and what its servers, and a warm one more, can send of it.

    What has windows is looked at from the narrowest on, each together with those that are narrower, as if these lay within it; a window counts by its own
    zone, for who will be in an audience is not known.
    """
    windows = {mailing.window: open_parts(mailing.window, today) for mailing in (*past, *coming) if mailing.window is not None}
    narrowest = sorted(windows, key=lambda window: (windows[window].sum(), str(window)))
    within = []
    for number in range(1, len(narrowest) + 1):
        chosen = narrowest[:number]
        parts = np.max([windows[window] for window in chosen], axis=0)
        before, after = ([mailing for mailing in mailings if mailing.window in chosen] for mailings in (past, coming))
        within.append(_of_demand(pool_id, key, outlook_of(before, after, today), fleet, parts))
    return replace(_of_demand(pool_id, key, outlook_of(past, coming, today), fleet), within=tuple(within))


def _of_demand(pool_id: int, key: str, demand: Mapping[str, Daily], fleet: Fleet, parts: Daily | None = None) -> Outlook:
    limits = {provider: fleet.limits(0, provider) for provider in demand}
    nothing = np.zeros(DAYS)
    capacity = {
        provider: sum((days_of(line, parts) for member in fleet.members if member.pool_id == pool_id and (line := fleet.limits(member.id, provider))), nothing)
        for provider in demand
    }
    warm: dict[str, float | Daily] = {}
    for provider, line in limits.items():
        # A limit that ends, as that of a warm-up, is not that of a warm server.
        last = None if line is None else replace(line, per_day=line.per_day[-1:])
        warm[provider] = nothing if last is None else days_of(last, parts)
    return Outlook(key, demand, capacity, warm, parts)


def able(outlook: Outlook, fleet: Fleet, server_id: int) -> list[Mapping[str, Daily]]:
    """What one server can send in each view of its pool."""
    return [{name: days_of(line, view.parts) for name in view.demand if (line := fleet.limits(server_id, name)) is not None} for view in outlook.views]


def open_parts(window: SendWindow, today: dt.date) -> Daily:
    """The part of each day from today on (UTC) in which a window is open, by its own zone."""
    begin = int(dt.datetime.combine(today, dt.time(), dt.UTC).timestamp())
    seconds = np.zeros(DAYS)
    for opens, closes in window.spans(window.zone, begin, begin + DAYS * DAY):
        for day in range((opens - begin) // DAY, (closes - 1 - begin) // DAY + 1):
            seconds[day] += min(closes, begin + (day + 1) * DAY) - max(opens, begin + day * DAY)
    return seconds / DAY


def in_flight(connection: Connection, sources: HostSources, today: dt.date) -> list[InFlight]:
    """Servers that are being made: each is worth what the source says that it was ordered from."""
    default = pools.keys(connection)[DEFAULT_POOL]
    # One that serves already is of the fleet, also in the moment before its row says so.
    serves = sa.exists().where(Server.id == Provision.server_id, Server.state != ServerState.PROVISIONING.value)
    query = sa.select(Provision.pool, Provision.source, Provision.requested_at).where(Provision.state.in_(MAKING), ~serves).order_by(Provision.id)
    making = connection.execute(query)
    return [InFlight.being_made(row.pool or default, sources.of(row.source), row.requested_at.date(), today) for row in making]


def lead_seconds(connection: Connection) -> float:
    """How long it takes to make a server, by the last that were made here: from the request to its service. 0 if none was."""
    done = sa.select(Provision.state_at, Provision.requested_at).where(Provision.state.in_(IN_SERVICE)).order_by(Provision.id.desc()).limit(_LAST_MADE)
    # One that was warming is in its state since it is warm.
    took = [(row.state_at - row.requested_at).total_seconds() for row in connection.execute(done)]
    return statistics.median(took) if (took := [seconds for seconds in took if seconds < DAY]) else 0.0


def outlook_of(past: Iterable[Mailing], coming: Iterable[Mailing], today: dt.date) -> dict[str, Daily]:
    """Messages by provider and day from today on: what the calendar says, and no less than the trend."""
    known: defaultdict[str, Daily] = defaultdict(lambda: np.zeros(DAYS))
    for mailing in coming:
        day = max(0, (mailing.day - today).days)
        for provider, rows in mailing.rows.items():
            if day < DAYS:
                known[provider][day] += rows
    history: defaultdict[str, Daily] = defaultdict(lambda: np.zeros(PAST_WEEKS * 7))
    for mailing in past:
        day = PAST_WEEKS * 7 - (today - mailing.day).days
        for provider, rows in mailing.rows.items():
            if 0 <= day < PAST_WEEKS * 7:
                history[provider][day] += rows
    return {provider: np.maximum(known[provider], trend(history[provider])) for provider in sorted({*known, *history})}


def trend(history: Daily) -> Daily:
    """The days to come if weeks go on as the last ones did: each weekday's mean, growing or shrinking as the second half of the time did to the first."""
    weeks = history.reshape(PAST_WEEKS, 7)
    first, second = weeks[: PAST_WEEKS // 2].sum(), weeks[PAST_WEEKS // 2 :].sum()
    growth = float(np.clip((second / first) ** (2 / PAST_WEEKS), _LEAST_GROWTH, _MOST_GROWTH)) if first and second else 1.0
    seen = weeks[np.argmax(weeks.sum(axis=1) > 0) :]
    ahead = np.arange(DAYS)
    means: Daily = seen.mean(axis=0)[ahead % 7] * growth ** (ahead // 7)
    return means


def days_of(limits: Limits, parts: Daily | None = None) -> Daily:
    """What a server may send to a provider on each day, or in these parts of each."""
    rate = limits.per_second * DAY if limits.per_hour is None else min(limits.per_second * DAY, limits.per_hour * 24.0)
    rates = np.full(DAYS, rate) if parts is None else rate * parts
    caps = [limits.per_day[min(day, len(limits.per_day) - 1)] for day in range(DAYS)]
    return np.minimum(rates, [np.inf if cap is None else cap for cap in caps])


def _past(connection: Connection, now: dt.datetime) -> list[Mailing]:
    since = now - dt.timedelta(weeks=PAST_WEEKS)
    columns = (Campaign.id, Campaign.pool_id, Campaign.started_at, Campaign.send_window)
    rows = connection.execute(sa.select(*columns).where(Campaign.started_at >= since)).all()
    messages: defaultdict[int, dict[str, int]] = defaultdict(dict)
    by = (CampaignCounter.campaign_id, CampaignCounter.provider)
    sent = (CampaignCounter.campaign_id.in_([row.id for row in rows]), CampaignCounter.state != int(State.SUPPRESSED))
    for campaign_id, provider, count in connection.execute(sa.select(*by, sa.func.sum(CampaignCounter.count)).where(*sent).group_by(*by)) if rows else ():
        messages[campaign_id][provider] = int(count)
    return [Mailing(row.pool_id, row.started_at.date(), messages[row.id], _window(row.send_window)) for row in rows]


def _window(document: Mapping[str, Any] | None) -> SendWindow | None:
    return None if document is None else SendWindow.from_document(document)


def _coming(connection: Connection, now: dt.datetime) -> list[Mailing]:
    """Scheduled campaigns, and what is left of those that are sending, which counts as today's."""
    until = now + dt.timedelta(days=DAYS)
    scheduled = (Campaign.state.in_(sizes.COMING), Campaign.start_at < until)
    rows = connection.execute(sa.select(Campaign.id, Campaign.pool_id, Campaign.start_at, Campaign.send_window).where(*scheduled)).all()
    expected = sizes.expected(connection, [row.id for row in rows])
    found = [Mailing(row.pool_id, row.start_at.date(), expected[row.id], _window(row.send_window)) for row in rows if row.id in expected]
    waiting = [int(state) for state in (State.PENDING, State.DEFERRED)]
    sending = connection.execute(sa.select(Campaign.id, Campaign.pool_id, Campaign.send_window).where(Campaign.state == "sending")).all()
    left: defaultdict[int, dict[str, int]] = defaultdict(dict)
    by = (CampaignCounter.campaign_id, CampaignCounter.provider)
    query = sa.select(*by, sa.func.sum(CampaignCounter.count)).where(CampaignCounter.campaign_id.in_([row.id for row in sending]))
    for campaign_id, provider, count in connection.execute(query.where(CampaignCounter.state.in_(waiting)).group_by(*by)) if sending else ():
        left[campaign_id][provider] = int(count)
    return found + [Mailing(row.pool_id, now.date(), left[row.id], _window(row.send_window)) for row in sending if row.id in left]
