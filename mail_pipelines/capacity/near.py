"""The near plan: who sends how much to which provider from which server in which slot of the next 48 hours.

A function of plain values, without database and clock: `supply` and `demand` read what it plans with, `planning` writes what comes of it.
"""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mail_pipelines.capacity import aggregate
from mail_pipelines.capacity.aggregate import Item, PlanningFailed
from mail_pipelines.capacity.demand import Demand, Job
from mail_pipelines.capacity.horizon import Horizon
from mail_pipelines.capacity.lines import Counts, Line, Rooms
from mail_pipelines.capacity.placing import Grants, place

# A plan of 100 servers, 50 providers and 20 campaigns takes about two seconds of a core, which others may use too. Whatever is not planned by then the
# simple rule plans.
SECONDS = 60.0
# Campaign, server, provider, start of the slot.
Grant = tuple[int, int, str, int]


@dataclass(frozen=True)
class ProviderPlan:
    """The plan for one provider. `placed` is messages by demand, slot and line: I × S × V; `failure` is why the simple rule made it, if it did."""

    provider: str
    demands: tuple[Demand, ...]
    lines: tuple[Line, ...]
    rooms: Rooms
    # The lines that may serve each demand.
    able: tuple[Counts, ...]
    placed: Grants
    failure: str = ""

    @property
    def unmet(self) -> Counts:
        """Messages of each demand for which there is no room within the horizon: I."""
        rows = np.array([demand.rows for demand in self.demands], dtype=np.int64)
        unmet: Counts = rows - self.placed.sum(axis=(1, 2))
        return unmet

    def open_parts(self, job_id: int) -> NDArray[np.float64]:
        """Of each slot the part in which any messages of a campaign may be sent: S."""
        horizon = self.rooms.horizon
        spans = [demand.spans for demand in self.demands if demand.job.id == job_id]
        parts = [[1.0] * len(horizon.slots) if one is None else horizon.open_parts(one) for one in spans]
        return np.array(parts).max(axis=0)  # type: ignore[no-any-return]

    def finish(self, number: int) -> float | None:
        """When a demand is sent (epoch seconds); None if not within the horizon."""
        if self.unmet[number]:
            return None
        slots = np.flatnonzero(self.placed[number].sum(axis=1))
        if not len(slots):
            return float(self.rooms.horizon.now)
        last = int(slots[-1])
        horizon, slot, spans = self.rooms.horizon, self.rooms.horizon.slots[last], self.demands[number].spans
        mine = np.flatnonzero(self.placed[number, last])
        # All campaigns of a slot are sent side by side, so each ends when its servers have sent all that they have to send in it.
        used, room = self.placed[:, last, mine].sum(), self.rooms.effective[mine, last].sum()
        seconds = horizon.usable(slot) * min(1.0, float(used / room))
        if spans is None:
            return slot.end - horizon.usable(slot) + seconds
        # Within the part of the slot in which its window is open.
        opened = horizon.within(slot, spans)
        return min(opened[0][0] + seconds, float(opened[-1][1]))


@dataclass(frozen=True)
class NearPlan:
    """A plan for all providers."""

    horizon: Horizon
    jobs: tuple[Job, ...]
    providers: tuple[ProviderPlan, ...]
    seconds: float

    def grants(self, slots: int) -> dict[Grant, int]:
        """What is to be granted in the first `slots` slots."""
        found: Counter[Grant] = Counter()
        for part in self.providers:
            for number, slot, line in np.argwhere(part.placed[:, :slots]).tolist():
                server, start = part.lines[line].server_id, self.horizon.slots[slot].start
                found[part.demands[number].job.id, server, part.provider, start] += int(part.placed[number, slot, line])
        return dict(found)

    def sent_within(self, slots: int) -> set[tuple[int, str]]:
        """The campaigns of which everything for a provider is sent in the first `slots` slots."""
        pairs = {(demand.job.id, part.provider) for part in self.providers for demand in part.demands}
        later = {
            (demand.job.id, part.provider)
            for part in self.providers
            for number, demand in enumerate(part.demands)
            if part.unmet[number] or part.placed[number, slots:].any()
        }
        return pairs - later

    def of_job(self, job_id: int) -> Iterator[tuple[ProviderPlan, int]]:
        """The demands of a campaign: the provider's plan, and the number of the demand in it."""
        for part in self.providers:
            for number, demand in enumerate(part.demands):
                if demand.job.id == job_id:
                    yield part, number

    def finish(self, job_id: int) -> float | None:
        """When the last message of a campaign goes out (epoch seconds); None if not within the horizon."""
        finishes = [part.finish(number) for part, number in self.of_job(job_id)]
        return None if None in finishes else max((finish for finish in finishes if finish is not None), default=float(self.horizon.now))


def near_plan(
    jobs: Sequence[Job],
    demands: Iterable[Demand],
    lines: Iterable[Line],
    now: int,
    previous: Mapping[tuple[int, str, int], int] | None = None,
    seconds: float = SECONDS,
) -> NearPlan:
    """Plan from `now` (epoch seconds). `previous`: (campaign, provider, start of slot) → messages of the plan before that are still to be sent.

    After `seconds` the rest is planned by the simple rule.
    """
    begin = time.monotonic()
    horizon = Horizon.of(now)
    by_provider: defaultdict[str, list[Demand]] = defaultdict(list)
    for demand in demands:
        by_provider[demand.provider].append(demand)
    lines_of: defaultdict[str, list[Line]] = defaultdict(list)
    for line in lines:
        lines_of[line.provider].append(line)
    ranks = {job.id: rank for rank, job in enumerate(sorted(jobs, key=urgency))}
    before: defaultdict[str, dict[tuple[int, int], int]] = defaultdict(dict)
    numbers = {slot.start: number for number, slot in enumerate(horizon.slots)}
    for (campaign_id, provider, start), count in (previous or {}).items():
        if start in numbers:
            before[provider][campaign_id, numbers[start]] = count
    parts = [
        _provider(provider, tuple(wanted), tuple(lines_of[provider]), horizon, ranks, before[provider], begin + seconds)
        for provider, wanted in sorted(by_provider.items())
    ]
    return NearPlan(horizon, tuple(jobs), tuple(parts), time.monotonic() - begin)


def urgency(job: Job) -> tuple[float, ...]:
    """What campaigns are sorted by, the most urgent first."""
    return -job.priority, float("inf") if job.finish_by is None else job.finish_by, job.start_at, job.id


def _provider(
    provider: str,
    demands: tuple[Demand, ...],
    lines: tuple[Line, ...],
    horizon: Horizon,
    ranks: Mapping[int, int],
    previous: Mapping[tuple[int, int], int],
    until: float,
) -> ProviderPlan:
    rooms = Rooms.of(lines, horizon)
    pools: dict[int, int] = {}
    for line in lines:
        pools.setdefault(line.pool_id, len(pools))
    pool_lines = [np.array([number for number, line in enumerate(lines) if line.pool_id == pool], dtype=np.int64) for pool in pools]
    able, items = [], []
    for demand in demands:
        mine = _pools(demand.job, lines, pools, horizon.now)
        able.append(np.sort(np.concatenate([pool_lines[pool] for pool in mine])) if mine else np.empty(0, dtype=np.int64))
        deadline = demand.job.finish_by
        late = len(horizon.slots) if deadline is None else sum(slot.end <= deadline for slot in horizon.slots)
        parts = None if demand.spans is None else tuple(horizon.open_parts(demand.spans))
        items.append(Item(demand.job.id, demand.job.priority, demand.rows, mine, horizon.first_from(demand.release), late, ranks[demand.job.id], parts))
    # Nobody plans for those whom no server may send.
    chosen = [number for number, item in enumerate(items) if item.pools and item.opens(len(horizon.slots)).any()]
    placed = np.zeros((len(items), len(horizon.slots), len(lines)), dtype=np.int64)
    failure = ""
    if chosen:
        amounts = None
        try:
            amounts = aggregate.solve([items[number] for number in chosen], [rooms.of_lines(index) for index in pool_lines], previous, until)
        except PlanningFailed as error:
            failure = str(error)
        placed[chosen] = place([items[number] for number in chosen], rooms, pool_lines, amounts)
    return ProviderPlan(provider, demands, lines, rooms, tuple(able), placed, failure)


def _pools(job: Job, lines: Sequence[Line], pools: Mapping[int, int], now: int) -> tuple[int, ...]:
    """The pools that may send a campaign to a provider: its own, and its overflow pool where no server of its own can."""
    own = [line for line in lines if line.pool_id == job.pool_id]
    found = [pools[job.pool_id]] if own else []
    helps = job.overflow_pool_id is not None and job.overflow_pool_id != job.pool_id and job.overflow_pool_id in pools
    if helps and not any(line.opens_at <= now and line.per_second > 0 for line in own):
        found.append(pools[job.overflow_pool_id])  # type: ignore[index]
    return tuple(found)
