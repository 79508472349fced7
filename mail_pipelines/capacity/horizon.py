"""The time a near plan looks ahead, cut into slots: quarters of an hour at first, as grants are, then full hours.

Slots lie on the epoch's quarters and hours, so that each is within one window of every limit (an hour, a day of UTC).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from mail_pipelines.delivery.recording import SLOT_SECONDS

HOUR, DAY = 3600, 86400
HOURS = 48
# The far plan looks this far ahead.
DAYS = 56
# So many hours in quarters: grants are made for the first three quarters, and finish times are wanted finely while they are near.
FINE_HOURS = 4


@dataclass(frozen=True)
class Slot:
    """From `start` up to `end`, in epoch seconds."""

    start: int
    end: int


@dataclass(frozen=True)
class Horizon:
    """The slots from `now` (epoch seconds) on. The first has begun already; nothing can be sent in the part of it that is over."""

    now: int
    slots: tuple[Slot, ...]

    @classmethod
    def of(cls, now: int, hours: int = HOURS) -> Horizon:
        fine_until = (now // HOUR + 1 + min(FINE_HOURS, hours)) * HOUR
        start = now // SLOT_SECONDS * SLOT_SECONDS
        fine = [Slot(begin, begin + SLOT_SECONDS) for begin in range(start, fine_until, SLOT_SECONDS)]
        coarse = [Slot(begin, begin + HOUR) for begin in range(fine_until, (now // HOUR + hours) * HOUR, HOUR)]
        return cls(now, (*fine, *coarse))

    @property
    def end(self) -> int:
        return self.slots[-1].end

    def usable(self, slot: Slot) -> int:
        """Seconds of a slot that are not over."""
        return slot.end - max(slot.start, self.now)

    def first_from(self, moment: int) -> int:
        """The number of the first slot that begins no earlier than `moment`; the current one counts as beginning now."""
        return next((number for number, slot in enumerate(self.slots) if max(slot.start, self.now) >= moment), len(self.slots))

    def open_parts(self, spans: Sequence[tuple[int, int]]) -> list[float]:
        """Of each slot the part of what is not over that lies within spans (epoch seconds, in order, apart)."""
        return [sum(end - begin for begin, end in self.within(slot, spans)) / self.usable(slot) for slot in self.slots]

    def within(self, slot: Slot, spans: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
        """What of a slot lies within spans, as far as it is not over."""
        first = max(slot.start, self.now)
        return [(max(begin, first), min(end, slot.end)) for begin, end in spans if begin < slot.end and end > first]

    def runs(self, seconds: int) -> Iterator[tuple[int, int]]:
        """Which slots lie in the same window of `seconds`: (first, one past the last), in order."""
        first = 0
        for number in range(1, len(self.slots) + 1):
            if number == len(self.slots) or self.slots[number].start // seconds != self.slots[first].start // seconds:
                yield first, number
                first = number
