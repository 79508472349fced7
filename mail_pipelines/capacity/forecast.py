"""What a near plan means for people: when each campaign ends, what holds it up, what comes too late, and how many servers would change that.

What belongs here: reading a plan. What does not: making one (`near`), and the words around the numbers (commands, assets).
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from mail_pipelines.capacity.demand import Demand, Job
from mail_pipelines.capacity.horizon import DAY, HOUR
from mail_pipelines.capacity.lines import Counts, Line
from mail_pipelines.capacity.near import NearPlan, ProviderPlan, near_plan, urgency

# No more warm servers than this are looked for to save a deadline.
MOST_SERVERS = 64
# Campaigns of which no audience has been made and none to the same segments either.
UNSIZED = "its size is known when its audience is made"


@dataclass(frozen=True)
class Forecast:
    """A campaign's course by the plan. Times are ISO 8601 in UTC; `finish_at` is None if it does not end within the horizon.

    `late` messages come after `finish_by`; `unmet` ones not within the horizon, and then `earliest` says when they could be out at the speed of the last
    day (None: never, as things are). `bottleneck` names the provider that ends last, and what holds it up.
    """

    campaign: str
    priority: int
    messages: int
    expected: bool
    finish_at: str | None
    finish_by: str | None
    late: int
    unmet: int
    earliest: str | None
    bottleneck: str


@dataclass(frozen=True)
class Order:
    """Servers that would let a campaign end in time, if they were there and warm."""

    campaign: str
    servers: int
    why: str


def forecasts(plan: NearPlan) -> list[Forecast]:
    """All campaigns of a plan, the most urgent first."""
    return [_forecast(plan, job) for job in sorted(plan.jobs, key=lambda job: (-job.priority, job.start_at, job.id))]


def _forecast(plan: NearPlan, job: Job) -> Forecast:
    parts = list(plan.of_job(job.id))
    finish = plan.finish(job.id) if job.sized else None
    late = 0
    for part, number in parts:
        by_slot = part.placed[number].sum(axis=1)
        if job.finish_by is not None and ((ended := part.finish(number)) is None or ended > job.finish_by):
            late += sum(int(count) for slot, count in zip(plan.horizon.slots, by_slot, strict=True) if slot.end > job.finish_by) + int(part.unmet[number])
    last = max(parts, key=lambda found: _ending(*found), default=None)
    unmet = sum(int(part.unmet[number]) for part, number in parts)
    earliest = [_earliest(part, number) for part, number in parts]
    return Forecast(
        campaign=job.key,
        priority=job.priority,
        messages=sum(part.demands[number].rows for part, number in parts),
        expected=job.expected,
        finish_at=_iso(finish),
        finish_by=_iso(job.finish_by),
        late=late,
        unmet=unmet,
        earliest=_iso(None if None in earliest else max((moment for moment in earliest if moment is not None), default=None)) if unmet else None,
        bottleneck=UNSIZED if not job.sized else "" if last is None else bottleneck(*last),
    )


def _ending(part: ProviderPlan, number: int) -> float:
    ended = part.finish(number)
    return float("inf") if ended is None else ended


def _earliest(part: ProviderPlan, number: int) -> float | None:
    """When the messages that the horizon leaves would be out, after those of more urgent campaigns, at the speed that all servers have in its last day on
    which the campaign may be sent. A send window is taken to open on each day after that as it did last.
    """
    horizon, job = part.rooms.horizon, part.demands[number].job
    unmet = sum(int(count) for count, demand in zip(part.unmet, part.demands, strict=True) if urgency(demand.job) <= urgency(job))
    if not part.unmet[number]:
        return part.finish(number)
    opened = part.open_parts(job.id)
    able = part.rooms.of_lines(part.able[number]).opened(opened).soonest
    first = horizon.first_from(horizon.end - DAY) if able[horizon.first_from(horizon.end - DAY) :].any() else 0
    if not able[first:].any():
        return None
    open_seconds = opened * np.array([horizon.usable(slot) for slot in horizon.slots])
    seconds = unmet * open_seconds[first:].sum() / able[first:].sum()
    last = [demand.spans[-1] for demand in part.demands if demand.job.id == job.id and demand.spans]
    if not last:
        return float(horizon.end + seconds)
    opens, closes = min(span[0] for span in last), max(span[1] for span in last)
    if seconds <= closes - horizon.end:
        return float(horizon.end + seconds)
    days, rest = divmod(seconds - max(0, closes - horizon.end) - 1, min(DAY, closes - opens))
    return float(opens + (days + 1) * DAY + rest + 1)


def bottleneck(part: ProviderPlan, number: int) -> str:
    """What keeps a demand from ending sooner: its provider, and whatever costs most of the messages that the servers' rate would have allowed by its end."""
    able = part.able[number]
    if not len(able):
        return f"{part.provider}: no server may send"
    slots = np.flatnonzero(part.placed[number].sum(axis=1))
    last = len(part.rooms.horizon.slots) if part.unmet[number] or not len(slots) else int(slots[-1]) + 1
    first = part.rooms.horizon.first_from(part.demands[number].release)
    rooms = part.rooms.of_lines(able)
    spans = part.demands[number].spans
    # While its window is closed nothing else holds it up.
    opened = np.ones(last - first) if spans is None else np.array(part.rooms.horizon.open_parts(spans)[first:last])
    closed = float((rooms.slot[:, first:last] * (1 - opened)).sum())
    rate = (rooms.slot[:, first:last] * opened).astype(np.int64)
    in_hours, in_days = _under(rate, rooms.hour, rooms.hour_of[first:last]), _under(rate, rooms.day, rooms.day_of[first:last])
    flow = np.array([part.lines[line].flow for line in able])
    together = part.placed[:, first:last][:, opened > 0]
    others = int(together[:, :, able].sum() - together[number][:, able].sum())
    warming = sum(part.lines[line].warming for line in able)
    words = f"{len(able)} server{'s' if len(able) > 1 else ''}"
    causes: dict[str, float] = {
        "the send window": closed,
        f"other campaigns on {words}": others,
        f"the hourly limits of {words}": rate.sum() - in_hours,
        f"{'the warm-up' if warming else 'the daily limits'} of {warming or len(able)} server{'s' if (warming or len(able)) > 1 else ''}": rate.sum() - in_days,
        f"deferrals on {words}": float((rate.sum(axis=1) / flow - rate.sum(axis=1)).sum()),
        f"breakers of {words}": _closed(part, able, first, last),
        f"the rate of {words}": float(part.placed[number].sum()),
    }
    cause = max(causes, key=lambda name: causes[name])
    return f"{part.provider}: {cause}"


def _under(rate: Counts, caps: Counts, window_of: Counts) -> int:
    """What the rates of all lines come to if each window of a line holds no more than its cap."""
    return sum(int(np.minimum(rate[:, window_of == window].sum(axis=1), caps[:, window]).sum()) for window in np.unique(window_of))


def _closed(part: ProviderPlan, able: Counts, first: int, last: int) -> float:
    slots = part.rooms.horizon.slots[first:last]
    now = part.rooms.horizon.now
    lines = [part.lines[line] for line in able.tolist()]
    return sum((line.per_second * part.rooms.horizon.usable(slot) for line in lines for slot in slots if max(slot.start, now) < line.opens_at), 0.0)


def orders(
    plan: NearPlan, more: Callable[[int, Sequence[int], Sequence[str], int], list[Line]], lines: Sequence[Line], found: Sequence[Forecast]
) -> Iterator[Order]:
    """For each campaign that would be late, how many more warm servers of its pool would save it; none for those that no number does.

    `more(count, pools, providers, begin)` are the lines they would have, of which nothing is wanted before `begin` (epoch seconds).
    """
    jobs = {job.key: job for job in plan.jobs}
    for forecast in found:
        if not forecast.late:
            continue
        job = jobs[forecast.campaign]
        slow = {part.provider for part, number in plan.of_job(job.id) if job.finish_by is not None and _ending(part, number) > job.finish_by}
        demands = [demand for part in plan.providers if part.provider in slow for demand in part.demands]
        begin = min(demand.opens_at(plan.horizon.now) for demand in demands if demand.job.id == job.id)
        if begin >= plan.horizon.end:
            # No number of servers opens a window.
            continue
        here = [line for line in lines if line.provider in slow]

        def saves(
            count: int, job: Job = job, demands: Sequence[Demand] = demands, here: Sequence[Line] = here, slow: set[str] = slow, begin: int = int(begin)
        ) -> bool:
            tried = near_plan(plan.jobs, demands, [*here, *more(count, [job.pool_id], sorted(slow), begin)], plan.horizon.now)
            ended = tried.finish(job.id)
            return ended is not None and job.finish_by is not None and ended <= job.finish_by

        if (count := least(saves)) is not None:
            yield Order(job.key, count, f"{forecast.late:,} messages would be late; {forecast.bottleneck}")


def least(saves: Callable[[int], bool]) -> int | None:
    """The smallest number from 1 to `MOST_SERVERS` that saves, if more never harm; None if none does."""
    high = 1
    while not saves(high):
        if high >= MOST_SERVERS:
            return None
        high *= 2
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if saves(middle) else (middle, high)
    return high


def hourly(plan: NearPlan) -> list[tuple[int, int]]:
    """Messages that the plan sends in each hour: (its start in epoch seconds, messages)."""
    totals: dict[int, int] = {}
    for part in plan.providers:
        for slot, count in zip(plan.horizon.slots, part.placed.sum(axis=(0, 2)).tolist(), strict=True):
            hour = slot.start // HOUR * HOUR
            totals[hour] = totals.get(hour, 0) + count
    last = max((hour for hour, count in totals.items() if count), default=0)
    return [(hour, count) for hour, count in sorted(totals.items()) if hour <= last]


def document(plan: NearPlan, found: Sequence[Forecast], wanted: Sequence[Order]) -> Mapping[str, Any]:
    """The plan as it is kept for display: plain values, small whatever the size of fleet and campaigns."""
    failures = sorted({part.failure for part in plan.providers if part.failure})
    return {
        "made_at": _iso(plan.horizon.now),
        "until": _iso(plan.horizon.end),
        "seconds": round(plan.seconds, 3),
        "by_rule": sum(bool(part.failure) for part in plan.providers),
        "failures": failures[:5],
        "campaigns": [asdict(forecast) for forecast in found],
        "orders": [asdict(order) for order in wanted],
        "hourly": hourly(plan),
    }


def _iso(moment: float | None) -> str | None:
    return None if moment is None else dt.datetime.fromtimestamp(round(moment), dt.UTC).isoformat()
