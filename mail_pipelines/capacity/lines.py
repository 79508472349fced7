"""Lines: what one server may send to one provider, as plain values, and what that comes to in the slots of a horizon, as arrays.

What belongs here: arithmetic of limits. What does not: where the numbers come from (`supply`), and who gets the room (`aggregate`, `placing`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from mail_pipelines.capacity.horizon import DAY, HOUR, Horizon
from mail_pipelines.delivery.recording import SLOT_SECONDS

Counts = NDArray[np.int64]
_UNLIMITED = 1 << 40


@dataclass(frozen=True)
class Line:
    """What one server may send to one provider. None is no limit.

    `per_day` are the caps of today (UTC), tomorrow and so on, the last one standing for all days after; `used_*` is what the current windows have debited.
    `flow` is the part of the messages that was taken rather than deferred in the last hours. Nothing is sent before `opens_at` (epoch seconds).
    """

    server_id: int
    pool_id: int
    provider: str
    per_second: float
    per_hour: int | None = None
    per_day: tuple[int | None, ...] = (None,)
    used_slot: int = 0
    used_hour: int = 0
    used_day: int = 0
    flow: float = 1.0
    opens_at: int = 0
    warming: bool = False


@dataclass(frozen=True)
class Rooms:
    """Room of the lines of one provider (V) in the slots (S), hours (H) and days (D) of a horizon: all three hold at once.

    `slot` is V × S, `hour` V × H, `day` V × D, in messages; `hour_of` and `day_of` (S) say in which hour and day a slot lies.
    """

    horizon: Horizon
    slot: Counts
    hour: Counts
    day: Counts
    hour_of: Counts = field(repr=False)
    day_of: Counts = field(repr=False)

    @classmethod
    def of(cls, lines: Sequence[Line], horizon: Horizon) -> Rooms:
        hours, days = list(horizon.runs(HOUR)), list(horizon.runs(DAY))
        seconds = np.array([horizon.usable(slot) for slot in horizon.slots])
        starts = np.array([max(slot.start, horizon.now) for slot in horizon.slots])
        slot = np.zeros((len(lines), len(horizon.slots)), dtype=np.int64)
        hour = np.zeros((len(lines), len(hours)), dtype=np.int64)
        day = np.zeros((len(lines), len(days)), dtype=np.int64)
        for number, line in enumerate(lines):
            slot[number] = np.floor(line.per_second * line.flow * seconds + 1e-9)
            slot[number, 0] = max(0, min(slot[number, 0], int(line.per_second * line.flow * SLOT_SECONDS) - line.used_slot))
            slot[number, starts < line.opens_at] = 0
            hour[number] = _UNLIMITED if line.per_hour is None else int(line.per_hour * line.flow)
            caps = [line.per_day[min(index, len(line.per_day) - 1)] for index in range(len(days))]
            day[number] = [_UNLIMITED if cap is None else int(cap * line.flow) for cap in caps]
            hour[number, 0] = max(0, hour[number, 0] - line.used_hour)
            day[number, 0] = max(0, day[number, 0] - line.used_day)
        return cls(horizon, slot, hour, day, _numbers(hours), _numbers(days))

    def of_lines(self, chosen: Counts) -> Rooms:
        """The same for some of the lines, by their numbers."""
        return Rooms(self.horizon, self.slot[chosen], self.hour[chosen], self.day[chosen], self.hour_of, self.day_of)

    def opened(self, parts: NDArray[np.float64]) -> Rooms:
        """The same if only these parts of the slots, from 0 to 1 (S), may be used."""
        return replace(self, slot=np.floor(self.slot * parts + 1e-9).astype(np.int64))

    @cached_property
    def effective(self) -> Counts:
        """What each line could send in a slot if it sent in no other: V × S."""
        return np.minimum(self.slot, np.minimum(self.hour[:, self.hour_of], self.day[:, self.day_of]))

    @cached_property
    def intervals(self) -> list[tuple[int, int, int]]:
        """What all lines together may send in runs of slots: (first, one past the last, messages), where that is less than the runs within allow.

        Beside each slot these are the beginnings of an hour and of a day: of two lines one may be at its hour's limit before the other, so that the sum of
        their limits alone would promise too much.
        """
        found = [(number, number + 1, int(total)) for number, total in enumerate(self.effective.sum(axis=0))]
        hours = list(self.horizon.runs(HOUR))
        in_hour = np.zeros((len(self.slot), len(hours)), dtype=np.int64)
        for number, (first, last) in enumerate(hours):
            sums = np.minimum(np.cumsum(self.effective[:, first:last], axis=1), self.hour[:, [number]])
            in_hour[:, number] = sums[:, -1]
            found += _binding(first, sums.sum(axis=0), [total for _, _, total in found[first:last]], range(first + 1, last + 1))
        totals = in_hour.sum(axis=0)
        for number, (first, last) in enumerate(self.horizon.runs(DAY)):
            begin, end = self.hour_of[first], self.hour_of[last - 1] + 1
            sums = np.minimum(np.cumsum(in_hour[:, begin:end], axis=1), self.day[:, [number]])
            found += _binding(first, sums.sum(axis=0), totals[begin:end], [hours[index][1] for index in range(begin, end)])
        return found

    @property
    def soonest(self) -> Counts:
        """What all lines together send in each slot if they always send as much as they may: S."""
        hour, day = self.hour.copy(), self.day.copy()
        sent = np.zeros(self.slot.shape[1], dtype=np.int64)
        for number in range(len(sent)):
            room = np.minimum(self.slot[:, number], np.minimum(hour[:, self.hour_of[number]], day[:, self.day_of[number]]))
            hour[:, self.hour_of[number]] -= room
            day[:, self.day_of[number]] -= room
            sent[number] = room.sum()
        return sent


def _binding(first: int, sums: Counts, parts: Sequence[int] | Counts, ends: Sequence[int]) -> list[tuple[int, int, int]]:
    """The runs from `first` up to each of `ends` whose sum is less than that of the run before and the part that was added."""
    found = []
    before = 0
    for total, part, end in zip(sums.tolist(), parts, ends, strict=True):
        if end > first + 1 and total < before + part:
            found.append((first, end, total))
        before = total
    return found


def _numbers(runs: Sequence[tuple[int, int]]) -> Counts:
    return np.repeat(np.arange(len(runs)), [last - first for first, last in runs])
