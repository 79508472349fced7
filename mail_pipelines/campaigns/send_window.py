"""The send window of a campaign: at which hours of which days of the recipient's own clock it may be sent.

    window: {from: "09:00", until: "18:00", days: [mon, tue, wed, thu, fri], zone: Europe/Berlin}

What belongs here: the value, its form as a document, and the spans of time in which it is open in a time zone. Changes to and from daylight-saving
time are right by definition: a moment is inside if the clock of that zone shows it. What does not: who waits for which span (`dispatch.windows`).
"""

from __future__ import annotations

import datetime as dt
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any
from zoneinfo import ZoneInfo

from mail_pipelines.contacts import time_zones
from mail_pipelines.errors import MailPipelinesError, nearest

DAYS = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
_DAY_MINUTES, _DAY_SECONDS = 1_440, 86_400
_KEYS = ("from", "until", "days", "zone")
_TIME = re.compile(r"(\d{1,2}):(\d{2})", re.ASCII)
# 1970-01-01, the epoch's first day.
_THURSDAY = 3


class WindowError(MailPipelinesError):
    """A document that is no send window; the message begins with the key."""


@dataclass(frozen=True)
class SendWindow:
    """From minute `begin` of a day up to minute `until`, of the next day if that is not later; on `days` (0 is Monday), by the day on which it opens.

    `zone` is the clock that counts for contacts whose time zone is not known.
    """

    begin: int
    until: int
    days: tuple[int, ...]
    zone: str

    @classmethod
    def from_document(cls, tree: object) -> SendWindow:
        """Raises `WindowError`."""
        if not isinstance(tree, Mapping):
            raise WindowError(f"expected a mapping of {', '.join(_KEYS)}")
        for key in tree:
            if key not in _KEYS:
                raise WindowError(f"{key}: unknown key; {nearest(str(key), _KEYS)}")
        begin, until = _minute(tree, "from"), _minute(tree, "until")
        if begin in (until, _DAY_MINUTES):
            raise WindowError('until: the window is empty; a whole day is from "00:00" until "24:00"')
        zone = tree.get("zone")
        name = time_zones.normal(zone) if isinstance(zone, str) else None
        if name is None:
            raise WindowError(f"zone: expected the time zone of contacts who have none, as in Europe/Berlin, got {zone!r}")
        return cls(begin, until, _days(tree.get("days", list(DAYS))), name)

    def to_document(self) -> dict[str, Any]:
        """`from_document` gives the same window back."""
        return {"from": _clock(self.begin), "until": _clock(self.until), "days": [DAYS[day] for day in self.days], "zone": self.zone}

    def __str__(self) -> str:
        days = "" if len(self.days) == len(DAYS) else f" on {', '.join(DAYS[day] for day in self.days)}"
        return f"{_clock(self.begin)} to {_clock(self.until)}{days} by the recipient's clock ({self.zone} where none is known)"

    def spans(self, zone: str, begin: int, end: int) -> list[tuple[int, int]]:
        """When it is open in a zone between two moments (epoch seconds), in order: (opens, closes). Spans that touch are one."""
        length = (self.until - self.begin) % _DAY_MINUTES or _DAY_MINUTES
        found: list[tuple[int, int]] = []
        for first, last, offset in _offsets(ZoneInfo(zone), begin, end):
            # Days by the zone's clock; the one before may reach over midnight.
            for day in range((first + offset) // _DAY_SECONDS - 1, (last + offset) // _DAY_SECONDS + 1):
                if (day + _THURSDAY) % len(DAYS) not in self.days:
                    continue
                opens = day * _DAY_SECONDS + self.begin * 60 - offset
                opens, closes = max(opens, first), min(opens + length * 60, last)
                if opens >= closes:
                    continue
                if found and opens <= found[-1][1]:
                    found[-1] = found[-1][0], max(closes, found[-1][1])
                else:
                    found.append((opens, closes))
        return found


def _offsets(zone: ZoneInfo, begin: int, end: int) -> Iterator[tuple[int, int, int]]:
    """The time from `begin` to `end` in pieces of one offset from UTC (s): (first, end, offset). No zone changes its own twice within a day."""
    first, offset = begin, _offset(zone, begin)
    before = begin
    while before < end:
        moment = min(before + _DAY_SECONDS, end)
        if (after := _offset(zone, moment)) != offset:
            low, high = before, moment
            while high - low > 1:
                middle = (low + high) // 2
                low, high = (middle, high) if _offset(zone, middle) == offset else (low, middle)
            yield first, high, offset
            first, offset = high, after
        before = moment
    if first < end:
        yield first, end, offset


def _offset(zone: ZoneInfo, second: int) -> int:
    found = dt.datetime.fromtimestamp(second, zone).utcoffset()
    assert found is not None
    return int(found.total_seconds())


def _minute(tree: Mapping[str, Any], key: str) -> int:
    """A time of day. YAML reads 18:00 without quotes as a number to the base of 60, which is the minute of the day."""
    value = tree.get(key)
    if isinstance(value, str) and (match := _TIME.fullmatch(value)) and int(match[2]) < 60:
        value = int(match[1]) * 60 + int(match[2])
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= _DAY_MINUTES:
        raise WindowError(f'{key}: expected a time of day, as in "09:00", got {value!r}')
    return value


def _days(value: object) -> tuple[int, ...]:
    if not isinstance(value, list) or not value:
        raise WindowError(f"days: expected a list of {', '.join(DAYS)}, got {value!r}")
    for number, name in enumerate(value):
        if name not in DAYS:
            raise WindowError(f"days[{number}]: expected one of {', '.join(DAYS)}, got {name!r}")
    return tuple(sorted({DAYS.index(name) for name in value}))


def _clock(minute: int) -> str:
    return f"{minute // 60:02}:{minute % 60:02}"
