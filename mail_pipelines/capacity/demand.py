"""Demand: which campaigns have how many messages for which providers, from when on, and by when they should be sent.

What belongs here: reading it from the counters, and from what is scheduled. The ledger is never scanned: of deferred rows the counters know how many there
are but not when each is due, so they count from the first retry on. Of a campaign with a send window it is known how many wait for which opening; what is
in open windows is taken to be in the zones that are open now as the rows of these openings were.
"""

from __future__ import annotations

import datetime as dt
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from mail_pipelines.campaigns.campaign import EXPIRES_AFTER
from mail_pipelines.campaigns.send_window import SendWindow
from mail_pipelines.capacity import domain_breakers, sizes
from mail_pipelines.capacity.horizon import HOURS
from mail_pipelines.capacity.sizes import COMING
from mail_pipelines.database.models import Campaign, CampaignCounter, State
from mail_pipelines.dispatch import holds, windows
from mail_pipelines.dispatch.windows import Span, Windows

# The states of campaigns that are planned for.
PLANNED = ("sending", *COMING)


@dataclass(frozen=True)
class Job:
    """A campaign as planning sees it. Times are epoch seconds; `priority` is 0 (low) to 3 (urgent).

    `expected` campaigns have no audience yet: their size is a guess (`sizes`); not `sized` are those of which there is none.
    """

    id: int
    key: str
    priority: int
    pool_id: int
    overflow_pool_id: int | None = None
    start_at: int = 0
    finish_by: int | None = None
    expected: bool = False
    sized: bool = True


@dataclass(frozen=True)
class Demand:
    """Messages of a campaign for a provider that may be sent from `release` (epoch seconds) on; if it has a send window, only within these spans.

    `stopped`: until then its domain is stopped there, or on trial (`domain_breakers`).
    """

    job: Job
    provider: str
    rows: int
    release: int = 0
    spans: tuple[Span, ...] | None = None
    stopped: bool = False

    def opens_at(self, now: int) -> float:
        """The first second from `now` on in which some of it may be sent; never is infinity."""
        first = max(now, self.release)
        if self.spans is None:
            return first
        return min((max(opens, first) for opens, closes in self.spans if closes > first), default=float("inf"))


def needed(connection: Connection, now: dt.datetime) -> bool:
    """Whether there is anything to plan: a campaign that is sending, or one that starts within the horizon."""
    soon = sa.and_(Campaign.state.in_(COMING), Campaign.start_at <= now + dt.timedelta(hours=HOURS))
    return connection.execute(sa.select(Campaign.id).where(sa.or_(Campaign.state == "sending", soon)).limit(1)).first() is not None


def read(connection: Connection, now: dt.datetime, horizon_seconds: int, retry_seconds: int) -> tuple[list[Job], list[Demand]]:
    """What is sent, and what is scheduled to start within `horizon_seconds`. Campaigns that are held or paused do not count; what goes to a provider at which
    their domain is stopped does from then on, when that ends.
    """
    second = int(now.timestamp())
    sending = _jobs(connection, Campaign.state == "sending")
    counts = _waiting(connection, list(sending))
    windowed = _windowed(connection, list(sending))
    demands = []
    for (campaign_id, provider), by_state in sorted(counts.items()):
        job = sending[campaign_id]
        if campaign_id in windowed:
            rows = by_state.get(State.PENDING, 0) + by_state.get(State.DEFERRED, 0)
            demands += _in_windows(windowed[campaign_id], job, provider, rows, second, second + horizon_seconds)
            continue
        # What is claimed is on its way, and what of it is deferred will be counted then.
        if (pending := by_state.get(State.PENDING, 0)) > 0:
            demands.append(Demand(job, provider, pending))
        if (deferred := by_state.get(State.DEFERRED, 0)) > 0:
            demands.append(Demand(job, provider, deferred, second + retry_seconds))
    soon = now + dt.timedelta(seconds=horizon_seconds)
    scheduled = _jobs(connection, Campaign.state.in_(COMING), Campaign.start_at <= soon)
    known, expected = sizes.expected(connection, list(scheduled)), _expected_spans(connection, scheduled, second + horizon_seconds)
    jobs = [job for job in sending.values() if any(demand.job.id == job.id for demand in demands)]
    for job in scheduled.values():
        size = known.get(job.id)
        coming = Job(job.id, job.key, job.priority, job.pool_id, job.overflow_pool_id, job.start_at, job.finish_by, expected=True, sized=size is not None)
        jobs.append(coming)
        demands += [Demand(coming, provider, rows, job.start_at, expected.get(job.id)) for provider, rows in sorted((size or {}).items())]
    # A trial is no room to plan with: its few messages are granted by the rule of every tick.
    again = {pair: _second(breaker.until) or 0 for pair, breaker in domain_breakers.stopped(connection).items()}
    return jobs, [
        replace(one, release=max(one.release, again[pair]), stopped=True) if (pair := (one.job.id, one.provider)) in again else one for one in demands
    ]


@dataclass(frozen=True)
class _Waiting:
    """The spans of a campaign, and by provider, zone and opening the rows that were put off until then, or are there in it."""

    spans: Windows
    rows: Mapping[str, Mapping[tuple[str, int], int]]


def _windowed(connection: Connection, campaign_ids: list[int]) -> dict[int, _Waiting]:
    """What is known of campaigns with a send window."""
    chosen = sa.select(Campaign.id).where(Campaign.id.in_(campaign_ids), Campaign.send_window.is_not(None))
    ids = list(connection.execute(chosen).scalars())
    waiting: defaultdict[int, dict[str, Mapping[tuple[str, int], int]]] = defaultdict(dict)
    for (campaign_id, provider), rows in windows.waiting(connection, ids, 0).items():
        waiting[campaign_id][provider] = rows
    zones = {number: {zone for rows in waiting[number].values() for zone, _ in rows} for number in ids}
    return {number: _Waiting(windows.read(connection, number, zones[number]), waiting[number]) for number in ids}


def _in_windows(known: _Waiting, job: Job, provider: str, rows: int, second: int, end: int) -> list[Demand]:
    """The rows of a campaign by the spans in which they may be sent, those whose windows close first before the others."""
    mine = known.rows.get(provider, {})
    found: Counter[tuple[Span, ...]] = Counter()
    open_now: Counter[tuple[Span, ...]] = Counter()
    # Whose window has just closed, and who have not been put off yet.
    shut: Counter[tuple[Span, ...]] = Counter()
    for (zone, opening), count in sorted(mine.items()):
        spans = tuple((opens, closes) for opens, closes in known.spans.spans.get(zone, ()) if closes > max(second, opening) and opens < end and closes > opens)
        if opening > second:
            rows -= count
            # What has no opening before the campaign's end will never be sent.
            if known.spans.reason(zone, opening) == windows.WAITS:
                found[spans] += count
        elif opening == known.spans.opened(zone, second):
            (open_now if known.spans.next_opening(zone, second, second) is None else shut)[spans] += count
    if not (open_now or shut):
        # Nothing was counted, as where a provider has only rows that came from another one.
        own = known.spans.spans.get(windows.OWN, ())
        shut[tuple(span for span in own if span[1] > second and span[0] < min(end, span[1]))] = 1
    weights = open_now or shut
    weight, given, share = sum(weights.values()), 0, 0
    for spans, count in sorted(weights.items()):
        # Each prefix rounded, so that the sum stays.
        share += count
        part = max(0, rows) * share // weight - given
        given += part
        found[spans] += part
    return [Demand(job, provider, count, spans=spans) for spans, count in sorted(found.items(), key=_first_end) if count > 0]


def _first_end(found: tuple[tuple[Span, ...], int]) -> int:
    spans, _ = found
    return spans[0][1] if spans else 0


def _expected_spans(connection: Connection, jobs: Mapping[int, Job], end: int) -> dict[int, tuple[Span, ...]]:
    """When scheduled campaigns with a send window may be sent by their own zone: who will be in the audience is not known."""
    found = {}
    columns = (Campaign.id, Campaign.send_window, Campaign.start_at, Campaign.expire_at)
    for row in connection.execute(sa.select(*columns).where(Campaign.id.in_(list(jobs)), Campaign.send_window.is_not(None))):
        window = SendWindow.from_document(row.send_window)
        until = int((row.expire_at or row.start_at + EXPIRES_AFTER).timestamp())
        found[row.id] = tuple(window.spans(window.zone, jobs[row.id].start_at, min(until, end)))
    return found


def _jobs(connection: Connection, *conditions: sa.ColumnElement[bool]) -> dict[int, Job]:
    columns = (Campaign.id, Campaign.key, Campaign.priority, Campaign.pool_id, Campaign.overflow_pool_id, Campaign.start_at, Campaign.finish_by)
    query = sa.select(*columns).where(*conditions, ~holds.over_campaigns()).order_by(Campaign.id)
    return {
        row.id: Job(row.id, row.key, row.priority, row.pool_id, row.overflow_pool_id, _second(row.start_at) or 0, _second(row.finish_by))
        for row in connection.execute(query)
    }


def _second(moment: dt.datetime | None) -> int | None:
    return None if moment is None else int(moment.timestamp())


def _waiting(connection: Connection, campaign_ids: list[int]) -> Mapping[tuple[int, str], Mapping[State, int]]:
    by = (CampaignCounter.campaign_id, CampaignCounter.provider, CampaignCounter.state)
    found: defaultdict[tuple[int, str], dict[State, int]] = defaultdict(dict)
    states = [int(State.PENDING), int(State.DEFERRED)]
    query = sa.select(*by, sa.func.sum(CampaignCounter.count)).where(CampaignCounter.campaign_id.in_(campaign_ids), CampaignCounter.state.in_(states))
    for campaign_id, provider, state, count in connection.execute(query.group_by(*by)) if campaign_ids else ():
        found[campaign_id, provider][State(state)] = int(count)
    return found
