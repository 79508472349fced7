"""The fleet as grants see it: who may send at all now, under which limits, and what the current windows have used of them.

What belongs here: one reading of servers, holds, breakers, limits, usage and warm-up, for the rule of every tick (`allotments`) and for the plan (`supply`).
"""

from __future__ import annotations

import datetime as dt
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from mail_pipelines.capacity import breakers, warm_up
from mail_pipelines.capacity.breakers import Breaker
from mail_pipelines.capacity.horizon import DAY, DAYS, HOUR
from mail_pipelines.database.models import ProviderLimit, ProviderUsage
from mail_pipelines.delivery.recording import SLOT_SECONDS, slot_at, windows_at
from mail_pipelines.dispatch import holds, servers

Pair = tuple[int, str]
_LIMITS = (ProviderLimit.server_id, ProviderLimit.provider, ProviderLimit.per_second, ProviderLimit.per_hour, ProviderLimit.per_day)


def _warm_up_caps(connection: Connection, now: dt.datetime) -> Mapping[Pair, tuple[int | None, ...]]:
    """The caps of servers that are warmed up: of today (UTC), and of the days after if all of them are good; None where there is none."""
    today = warm_up.caps(connection, now)
    return {pair: (today[pair], *days[1:]) for pair, days in warm_up.day_caps(connection, DAYS).items()}


@dataclass(frozen=True)
class Member:
    """A server that may send and is not held. `speaks`: its heartbeat is young."""

    id: int
    pool_id: int
    speaks: bool


@dataclass(frozen=True)
class Limits:
    """What a server may send to a provider; None is no limit. `per_day` are the caps of today and the days after."""

    per_second: float
    per_hour: int | None
    per_day: tuple[int | None, ...]
    warming: bool = False

    def left(self, slot: int, used: Mapping[int, int], at: int) -> int:
        """Messages that may still be sent in a slot (its start), if so many were in the windows of slot `at`, by their length: of what was used only those
        windows count in which the slot lies, too. An hour's or a day's limit may be spent in one slot.
        """
        caps = ((SLOT_SECONDS, int(self.per_second * SLOT_SECONDS)), (HOUR, self.per_hour), (DAY, self.per_day[0]))
        rest = [cap - (used.get(length, 0) if slot // length == at // length else 0) for length, cap in caps if cap is not None]
        return max(0, min(rest))

    @property
    def per_slot(self) -> int:
        """Messages in one slot if nothing else was sent."""
        return self.left(0, {}, 0)


@dataclass(frozen=True)
class Fleet:
    """All members at one moment. `used`: (server, provider) → length of the window that is running → messages debited in it."""

    members: list[Member]
    held: holds.InForce
    stopped: Mapping[Pair, Breaker]
    used: Mapping[Pair, Mapping[int, int]]
    _limits: Mapping[Pair, Limits]
    _warming: Mapping[Pair, tuple[int | None, ...]]
    _slot: int

    @classmethod
    def read(cls, connection: Connection, now: dt.datetime, heartbeat_seconds: float) -> Fleet:
        held = holds.in_force(connection)
        members = [
            Member(server.id, server.pool_id, not server.is_silent(now, heartbeat_seconds))
            for server in servers.all_servers(connection)
            if server.sends and held.over_server(server.id, server.pool_id) is None
        ]
        stopped = {(one.server_id, one.provider): one for one in breakers.all_breakers(connection) if one.state != breakers.CLOSED}
        limits = {(row.server_id, row.provider): Limits(row.per_second, row.per_hour, (row.per_day,)) for row in connection.execute(sa.select(*_LIMITS))}
        return cls(members, held, stopped, _used(connection, now), limits, _warm_up_caps(connection, now), slot_at(now))

    def limits(self, server_id: int, provider: str) -> Limits | None:
        """The limits that fit best, as in a claim: the server's own before those of all, the provider's before those of any. Lower, while it warms up."""
        places = ((server_id, provider), (server_id, "*"), (0, provider), (0, "*"))
        found = next((self._limits[place] for place in places if place in self._limits), None)
        caps = self._warming.get((server_id, provider), self._warming.get((server_id, warm_up.ANY)))
        if found is None or caps is None:
            return found
        own = found.per_day[0]
        least = caps if own is None else tuple(own if warm is None else min(own, warm) for warm in caps)
        return Limits(found.per_second, found.per_hour, least, warming=caps[0] is not None)

    def warms(self, server_id: int, provider: str) -> bool:
        found = self.limits(server_id, provider)
        return found is not None and found.warming

    def left(self, server_id: int, provider: str, slot: int) -> int:
        """Messages that a server may still send to a provider in the current slot, or in one that is to come, by what is used now; none on another day."""
        found = self.limits(server_id, provider)
        if found is None or slot // DAY != self._slot // DAY:
            return 0
        return found.left(slot, self.used.get((server_id, provider), {}), self._slot)

    def spent(self, server_id: int, provider: str, slot: int) -> bool:
        """Whether the limit of the slot, or of the hour or day in which it lies, is used up by now."""
        found = self.limits(server_id, provider)
        return found is not None and not found.left(slot, self.used.get((server_id, provider), {}), self._slot)

    def breaker(self, server_id: int, provider: str) -> str:
        breaker = self.stopped.get((server_id, provider))
        return breakers.CLOSED if breaker is None else breaker.state


def _used(connection: Connection, now: dt.datetime) -> Mapping[Pair, Mapping[int, int]]:
    used: defaultdict[Pair, dict[int, int]] = defaultdict(dict)
    windows = sa.or_(*(sa.and_(ProviderUsage.window_seconds == length, ProviderUsage.window_start == start) for length, start in windows_at(now)))
    for row in connection.execute(sa.select(ProviderUsage.server_id, ProviderUsage.provider, ProviderUsage.window_seconds, ProviderUsage.used).where(windows)):
        used[row.server_id, row.provider][row.window_seconds] = row.used
    return used
