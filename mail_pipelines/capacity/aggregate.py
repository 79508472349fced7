"""The first stage of the near plan: how many messages of which campaign go to one provider in which slot, as linear programs over whole pools.

Providers share no limit, so each has its own programs: one for each class of priority, the highest first, in the room that the ones before left. Within a
class what would come after its deadline counts most, then the time at which messages go out, then change against the plan before.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import highspy
import numpy as np
from numpy.typing import NDArray

from mail_pipelines.capacity.horizon import HOUR
from mail_pipelines.capacity.lines import Rooms

Amounts = NDArray[np.float64]
# In hours of delay that a message is worth: late, not within the horizon at all, otherwise than planned before, by another pool than its own.
_LATE, _UNMET, _KEPT, _OVERFLOW = 1_000.0, 5_000.0, 0.02, 0.001
# By how much the cost of delay differs from one campaign to the next of the same class, so that they end one after the other, by deadline.
_ORDER = 0.01
# The part of all room that a campaign gets whatever is more urgent, and that all such parts together may take.
FLOOR_SHARE, FLOORS_SHARE = 0.02, 0.2
# The ends of slots at which it is looked whether a campaign had its part.
_CHECKED = (*range(1, 13), *range(16, 100, 4))
# The current slot and the next one begin within 15 minutes.
FROZEN_SLOTS = 2


class PlanningFailed(Exception):
    """The solver gave no optimum in its time."""


@dataclass(frozen=True)
class Item:
    """Rows of one campaign that wait for the provider. `first` is the slot from which they may be sent, `late` the first that ends after the deadline.

    `pools` are the numbers of the pools that may send them, its own first; `rank` is its place among all campaigns, the most urgent first.
    `parts` is how much of each slot its send window is open, from 0 to 1.
    """

    campaign_id: int
    priority: int
    rows: int
    pools: tuple[int, ...]
    first: int
    late: int
    rank: int
    parts: tuple[float, ...] | None = None

    def opens(self, slots: int) -> Amounts:
        """Which part of each of so many slots it may be sent in."""
        parts: Amounts = np.ones(slots) if self.parts is None else np.array(self.parts)
        parts[: self.first] = 0.0
        return parts


def solve(
    items: Sequence[Item], pools: Sequence[Rooms], previous: Mapping[tuple[int, int], int], until: float = float("inf")
) -> dict[tuple[int, int], Amounts]:
    """Messages by (item, pool) and slot (array S, whole up to rounding). `previous`: (campaign, slot) → messages planned before.

    Slots that begin within 15 minutes are frozen: what a campaign was to send there may only fall. `until` is the monotonic time by which the answer has to
    be there. Raises `PlanningFailed`.
    """
    left = [_Left.of(rooms) for rooms in pools]
    share = min(FLOOR_SHARE, FLOORS_SHARE / len(items)) if len(items) > 1 else 0.0
    floors: dict[int, Amounts] = {}
    frozen: dict[tuple[int, int], float] = {place: count for place, count in previous.items() if place[1] < FROZEN_SLOTS}
    windows = Counter(item.campaign_id for item in items if item.parts is not None)
    for number, item in enumerate(items):
        # Of a campaign with a send window there is an item for each of its openings.
        floors[number] = floor = _floor(item, left[item.pools[0]], share / max(1, windows[item.campaign_id]), frozen)
        left[item.pools[0]].taken += floor
        # What was planned before is the campaign's, whose rows that come back are an item of their own.
        for slot in range(min(FROZEN_SLOTS, len(floor))):
            if (item.campaign_id, slot) in frozen:
                frozen[item.campaign_id, slot] -= floor[slot]
    found: dict[tuple[int, int], Amounts] = {}
    for priority in sorted({item.priority for item in items}, reverse=True):
        chosen = [number for number, item in enumerate(items) if item.priority == priority]
        for number in chosen:
            left[items[number].pools[0]].taken -= floors[number]
        amounts = _class(items, chosen, floors, left, slots_hours(pools[0]), previous, until)
        for (_, pool), amount in amounts.items():
            left[pool].taken += amount
        found |= amounts
    return found


def slots_hours(rooms: Rooms) -> Amounts:
    """The middle of each slot, in hours from now."""
    return np.array([((max(slot.start, rooms.horizon.now) + slot.end) / 2 - rooms.horizon.now) / HOUR for slot in rooms.horizon.slots])


@dataclass
class _Left:
    """The limits of a pool (`Rooms.intervals`: L), and what was taken of them by slot (S)."""

    first: NDArray[np.int64]
    last: NDArray[np.int64]
    full: Amounts
    taken: Amounts

    @classmethod
    def of(cls, rooms: Rooms) -> _Left:
        table = np.array(rooms.intervals, dtype=np.int64)
        return cls(table[:, 0], table[:, 1], table[:, 2].astype(float), np.zeros(rooms.slot.shape[1]))

    def most(self, parts: Amounts) -> Amounts:
        """What an item may send in each slot (S) that is open to it in these parts; no limit of its own where all of the slot is."""
        # The first limits are those of each slot alone.
        return np.where(parts < 1.0, parts * self.full[: len(parts)], np.inf)

    @property
    def cap(self) -> Amounts:
        sums = np.concatenate([[0.0], np.cumsum(self.taken)])
        cap: Amounts = np.maximum(0.0, self.full - (sums[self.last] - sums[self.first]))
        return cap


def _floor(item: Item, pool: _Left, share: float, frozen: Mapping[tuple[int, int], float]) -> Amounts:
    """The share of a pool that an item gets in any case, as early as that share allows, but not more of a `frozen` slot than is left of what was planned."""
    slots = len(pool.taken)
    caps = pool.full * share
    amounts = np.zeros(slots)
    left = float(item.rows)
    parts = item.opens(slots)
    for slot in np.flatnonzero(parts).tolist():
        within = (pool.first <= slot) & (pool.last > slot)
        amounts[slot] = min(left, frozen.get((item.campaign_id, slot), np.inf), caps[within].min(), pool.most(parts)[slot])
        caps[within] -= amounts[slot]
        left -= amounts[slot]
        if left <= 0:
            break
    return amounts


def _class(
    items: Sequence[Item],
    chosen: Sequence[int],
    floors: Mapping[int, Amounts],
    left: Sequence[_Left],
    hours: Amounts,
    previous: Mapping[tuple[int, int], int],
    until: float,
) -> dict[tuple[int, int], Amounts]:
    """The program of one class: columns are (item, pool, slot), some twice, and what of each item is not met."""
    slots = len(hours)
    column_of: list[tuple[int, int, NDArray[np.int64]]] = []
    costs, uppers, numbers, pools, times = [], [], [], [], []
    for place, number in enumerate(chosen):
        item = items[number]
        slope = 1 + _ORDER * (len(items) - item.rank)
        parts = item.opens(slots)
        for position, pool in enumerate(item.pools):
            when = np.flatnonzero(parts)
            most = left[pool].most(parts)[when]
            cost = hours[when] * slope + _LATE * (when >= item.late) + _OVERFLOW * position
            before = np.array([previous.get((item.campaign_id, int(slot)), 0) for slot in when], dtype=float)
            # What was planned before is a little cheaper, up to that much.
            kept = np.flatnonzero((before > 0) & np.isinf(most))
            for index, upper, price in ((np.arange(len(when)), most, cost), (kept, before[kept], cost[kept] - _KEPT)):
                costs.append(price)
                uppers.append(upper)
                times.append(when[index])
                numbers.append(np.full(len(index), place))
                pools.append(np.full(len(index), pool))
            column_of.append((number, pool, when))
    unmet = len(chosen)
    cost, upper = np.concatenate([*costs, np.full(unmet, _UNMET)]), np.concatenate([*uppers, np.full(unmet, np.inf)])
    number_of, pool_of, slot_of = np.concatenate(numbers), np.concatenate(pools), np.concatenate(times)
    columns = len(number_of)
    rows: list[NDArray[np.int64]] = []
    lower_bounds, upper_bounds = [], []
    for place, number in enumerate(chosen):
        mine = number_of == place
        rows.append(np.append(np.flatnonzero(mine), columns + place))
        lower_bounds.append(float(items[number].rows))
        upper_bounds.append(float(items[number].rows))
        # By these moments an item has at least what its share would have sent.
        for end in (end for end in _CHECKED if end <= slots):
            if (least := floors[number][:end].sum()) > 0:
                rows.append(np.flatnonzero(mine & (slot_of < end)))
                lower_bounds.append(least * (1 - 1e-9) - 1e-6)
                upper_bounds.append(np.inf)
    for pool, limits in enumerate(left):
        here = pool_of == pool
        for first, last, cap in zip(limits.first, limits.last, limits.cap, strict=True):
            if len(index := np.flatnonzero(here & (slot_of >= first) & (slot_of < last))):
                rows.append(index)
                lower_bounds.append(-np.inf)
                upper_bounds.append(cap)
    for campaign_id in {items[number].campaign_id for number in chosen}:
        places = [place for place, number in enumerate(chosen) if items[number].campaign_id == campaign_id]
        for slot in range(min(FROZEN_SLOTS, slots)):
            if (campaign_id, slot) in previous and len(index := np.flatnonzero(np.isin(number_of, places) & (slot_of == slot))):
                rows.append(index)
                lower_bounds.append(-np.inf)
                upper_bounds.append(previous[campaign_id, slot])
    solution = _solved(cost, upper, rows, np.array(lower_bounds), np.array(upper_bounds), until)
    found = {}
    for number, pool, _ in column_of:
        mine = (number_of == chosen.index(number)) & (pool_of == pool)
        found[number, pool] = np.bincount(slot_of[mine], weights=solution[:columns][mine], minlength=slots).astype(float)
    return found


class _Solver(highspy.Highs):
    """A solver that prints nothing, not even who it is as it is made, for what commands print is read by programs."""

    def enableCallbacks(self) -> None:
        self.setOptionValue("output_flag", False)
        super().enableCallbacks()  # type: ignore[no-untyped-call]


def _solved(cost: Amounts, upper: Amounts, rows: Sequence[NDArray[np.int64]], lower_bounds: Amounts, upper_bounds: Amounts, until: float) -> Amounts:
    seconds = until - time.monotonic()
    if seconds <= 0:
        raise PlanningFailed("the time for planning is over")
    program = highspy.HighsLp()
    program.num_col_, program.num_row_ = len(cost), len(rows)
    program.col_cost_, program.col_lower_, program.col_upper_ = cost, np.zeros(len(cost)), upper
    program.row_lower_, program.row_upper_ = lower_bounds, upper_bounds
    matrix = program.a_matrix_
    matrix.format_ = highspy.MatrixFormat.kRowwise
    matrix.num_col_, matrix.num_row_ = len(cost), len(rows)
    matrix.start_ = np.concatenate([[0], np.cumsum([len(row) for row in rows])])
    matrix.index_ = np.concatenate(rows)
    matrix.value_ = np.ones(sum(len(row) for row in rows))
    solver = _Solver()  # type: ignore[no-untyped-call]
    solver.setOptionValue("threads", 1)
    if np.isfinite(seconds):
        solver.setOptionValue("time_limit", seconds)
    solver.passModel(program)
    solver.run()
    status = solver.getModelStatus()
    if status != highspy.HighsModelStatus.kOptimal:
        raise PlanningFailed(f"the solver ended with {solver.modelStatusToString(status)}")
    return np.asarray(solver.getSolution().col_value)
