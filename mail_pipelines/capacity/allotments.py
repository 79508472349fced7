"""The simple rule that fills allotments from limits until planning does it: every sending campaign with open rows gets its share.

A slot is 15 minutes. A server's room for a provider in a slot is the least its limits allow; it is shared among the
campaigns by the weight of their priority. Grants only ever rise within a slot here, so no session is cut short; only a breaker that opens
takes them away, and gets no new ones. Where a server is warmed up, what is unspent in a slot follows what is left of the day, down as well as up: or
sessions would be started for grants that no claim gets anything for.

Servers of a campaign's overflow pool are granted a provider only where no server of its own pool can send to it: is active, speaking and not held,
with its breaker not open, and has limits left in this slot, hour and day.
"""

from __future__ import annotations

import datetime as dt
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine

from mail_pipelines.capacity import breakers, warm_up
from mail_pipelines.capacity.warm_up_days import DAY
from mail_pipelines.database.engine import database_now, is_mysql, transact
from mail_pipelines.database.models import Allotment, Campaign, CampaignCounter, ProviderLimit, ProviderUsage, State
from mail_pipelines.delivery.breakers import provider_rules
from mail_pipelines.delivery.recording import SLOT_SECONDS, slot_at, windows_at
from mail_pipelines.dispatch import holds, servers

# Weight of priority low, normal, high, urgent.
PRIORITY_WEIGHTS = (1, 4, 16, 64)
_WAITING = (State.PENDING, State.DEFERRED)
_LIMITS = (ProviderLimit.server_id, ProviderLimit.provider, ProviderLimit.per_second, ProviderLimit.per_hour, ProviderLimit.per_day)


@dataclass(frozen=True)
class _Server:
    """A server that may send and is not held. `speaks`: its heartbeat is young."""

    id: int
    pool_id: int
    speaks: bool


@dataclass(frozen=True)
class _Campaign:
    """A campaign with rows waiting for a provider: its weight, and the pools that may send it."""

    id: int
    weight: int
    pool_id: int
    overflow_pool_id: int | None


def fill(engine: Engine, heartbeat_seconds: float, now: dt.datetime | None = None) -> int:
    """Grant the current and the next slot to all sending campaigns; returns how many grants were made or changed."""

    def work(connection: Connection) -> int:
        moment = now or database_now(connection)
        grants = _grants(connection, moment, heartbeat_seconds)
        slot, following = slot_at(moment), slot_at(moment) + SLOT_SECONDS
        # Whether the next slot needs the overflow pools will be seen when it comes, and what a warm-up allows on another day when that has begun.
        changed = _raise(connection, _rows(slot, grants.own | grants.overflow) + _rows(following, grants.own))
        changed += _raise(connection, _rows(slot, grants.left), unspent=True)
        return changed + (_raise(connection, _rows(following, grants.left), unspent=True) if following % DAY else 0)

    return transact(engine, work)


# (campaign, server, provider) → messages
_Grants = dict[tuple[int, int, str], int]


@dataclass(frozen=True)
class _Granted:
    """Messages a slot of the campaigns' own pools and of their overflow pools; `left`: what servers that are warmed up, of both, are still to send in it."""

    own: _Grants = field(default_factory=dict)
    overflow: _Grants = field(default_factory=dict)
    left: _Grants = field(default_factory=dict)


def _rows(slot: int, grants: _Grants) -> list[dict[str, object]]:
    return [
        {"campaign_id": campaign, "server_id": server, "provider": provider, "slot_start": slot, "granted": granted, "used": 0}
        for (campaign, server, provider), granted in sorted(grants.items())
    ]


def _grants(connection: Connection, now: dt.datetime, heartbeat_seconds: float) -> _Granted:
    held = holds.in_force(connection)
    fleet = [
        _Server(server.id, server.pool_id, not server.is_silent(now, heartbeat_seconds))
        for server in servers.all_servers(connection)
        if server.sends and held.over_server(server.id, server.pool_id) is None
    ]
    stopped = breakers.not_closed(connection)
    caps = {(row.server_id, row.provider): row for row in connection.execute(sa.select(*_LIMITS))}
    used = _used(connection, now)
    warming = warm_up.caps(connection, now)
    found = _Granted()
    for provider, campaigns in _demand(connection).items():
        if held.over_provider(provider):
            continue
        # The limits that fit best: as in a claim.
        limits = {
            server.id: next((caps[place] for place in ((server.id, provider), (server.id, "*"), (0, provider), (0, "*")) if place in caps), None)
            for server in fleet
        }
        open_to = [server for server in fleet if stopped.get((server.id, provider)) != breakers.OPEN]
        days = {server.id: warm_up.cap_of(warming, server.id, provider) for server in fleet}
        able = {server.pool_id for server in open_to if server.speaks and _has_room(limits[server.id], days[server.id], used[server.id, provider])}
        for server in open_to:
            row, day = limits[server.id], days[server.id]
            room = 0 if row is None else _per_slot(row.per_second, row.per_hour, row.per_day)
            if day is not None:
                spent = used[server.id, provider]
                room = max(0, min(room - spent.get(SLOT_SECONDS, 0), day - spent.get(DAY, 0)))
            ours = [campaign for campaign in campaigns if campaign.pool_id == server.pool_id]
            theirs = [campaign for campaign in campaigns if campaign.overflow_pool_id == server.pool_id and campaign.pool_id not in able | {server.pool_id}]
            total = sum(campaign.weight for campaign in (*ours, *theirs))
            trial = (server.id, provider) in stopped
            rest = room
            for grants, campaigns_of in ((found.own, ours), (found.overflow, theirs)):
                for campaign in campaigns_of:
                    share = max(1, room * campaign.weight // total) if room else 0
                    if trial:
                        grants[campaign.id, server.id, provider] = min(share, provider_rules().trial_messages)
                    elif day is not None:
                        share = min(rest, -(-room * campaign.weight // total))
                        found.left[campaign.id, server.id, provider] = share
                        rest -= share
                    else:
                        grants[campaign.id, server.id, provider] = share
    return found


def _demand(connection: Connection) -> dict[str, list[_Campaign]]:
    """Campaigns with rows waiting, by provider."""
    columns = (Campaign.id, CampaignCounter.provider, Campaign.priority, Campaign.pool_id, Campaign.overflow_pool_id)
    waiting = connection.execute(
        sa.select(*columns)
        .join_from(CampaignCounter, Campaign, Campaign.id == CampaignCounter.campaign_id)
        .where(Campaign.state == "sending", ~holds.over_campaigns(), CampaignCounter.state.in_([int(state) for state in _WAITING]))
        .group_by(*columns)
        .having(sa.func.sum(CampaignCounter.count) > 0)
    )
    demand: defaultdict[str, list[_Campaign]] = defaultdict(list)
    for row in waiting:
        demand[row.provider].append(_Campaign(row.id, PRIORITY_WEIGHTS[row.priority], row.pool_id, row.overflow_pool_id))
    return demand


def _used(connection: Connection, now: dt.datetime) -> defaultdict[tuple[int, str], dict[int, int]]:
    """Messages debited in the windows of this moment: (server, provider) → length of the window → messages."""
    used: defaultdict[tuple[int, str], dict[int, int]] = defaultdict(dict)
    windows = sa.or_(*(sa.and_(ProviderUsage.window_seconds == length, ProviderUsage.window_start == start) for length, start in windows_at(now)))
    for row in connection.execute(sa.select(ProviderUsage.server_id, ProviderUsage.provider, ProviderUsage.window_seconds, ProviderUsage.used).where(windows)):
        used[row.server_id, row.provider][row.window_seconds] = row.used
    return used


def _has_room(limits: Any, day: int | None, used: Mapping[int, int]) -> bool:
    """Whether a server may send another message to a provider in this slot, hour and day; `limits` as in `provider_limits`, `day` the cap of its warm-up."""
    if limits is None:
        return False
    caps = ((SLOT_SECONDS, int(limits.per_second * SLOT_SECONDS)), (3600, limits.per_hour), (DAY, limits.per_day), (DAY, day))
    return all(cap is None or used.get(length, 0) < cap for length, cap in caps)


def _per_slot(per_second: float, per_hour: int | None, per_day: int | None) -> int:
    caps = [int(per_second * SLOT_SECONDS)]
    # A day's or an hour's limit may be spent in one slot if nothing else was: the usage windows keep the sum.
    caps += [cap for cap in (per_hour, per_day) if cap is not None]
    return max(0, min(caps))


def _raise(connection: Connection, rows: list[dict[str, object]], *, unspent: bool = False) -> int:
    """Insert grants, or raise those that are lower; or, with `unspent`, let just so much be left of each. `used` is the claims' column and stays."""
    if not rows:
        return 0
    table = Allotment.__table__
    assert isinstance(table, sa.Table)
    if is_mysql(connection):
        from sqlalchemy.dialects import mysql

        insert = mysql.insert(table)
        new = sa.func.values(sa.column("granted"))
        statement: sa.Insert = insert.on_duplicate_key_update(granted=table.c.used + new if unspent else sa.func.greatest(table.c.granted, new))
    else:
        from sqlalchemy.dialects import sqlite

        upsert = sqlite.insert(table)
        granted = table.c.used + upsert.excluded.granted if unspent else sa.func.max(table.c.granted, upsert.excluded.granted)
        statement = upsert.on_conflict_do_update(index_elements=list(table.primary_key), set_={"granted": granted})
    connection.execute(statement, rows)
    return len(rows)
