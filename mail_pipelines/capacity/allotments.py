"""Grants: what the plan in force means for each campaign, and at once a share of what it leaves for everybody with open rows.

A slot is 15 minutes. A server's room for a provider in a slot is the least its limits allow. Of that each campaign has what was planned for it; the rest is
shared among all campaigns by the weight of their priority. So nobody waits for the next plan: not a campaign that has just begun, nor rows that come back
early, and where nothing is planned all is shared. A campaign that the plan does not know has its share of the whole room: until the next plan, a few minutes
later, grants may then add up to more than the room, which pacers and usage windows keep as they always do.

Here grants only ever rise within a slot, so that no session is cut short; a plan lowers what it planned otherwise, and a breaker that opens takes all away.
Where a server is warmed up, what is unspent in a slot follows what is left of the day, down as well as up: or sessions would be started for grants that no
claim gets anything for.

Servers of a campaign's overflow pool are granted a provider only where no server of its own pool can send to it: is active, speaking and not held,
with its breaker not open, and has limits left in this slot, hour and day.
"""

from __future__ import annotations

import datetime as dt
import functools
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine

from mail_pipelines.capacity import breakers
from mail_pipelines.capacity.fleet import Fleet
from mail_pipelines.database.engine import database_now, is_mysql, transact
from mail_pipelines.database.models import Allotment, Campaign, CampaignCounter, State
from mail_pipelines.delivery.breakers import provider_rules
from mail_pipelines.delivery.recording import SLOT_SECONDS, slot_at
from mail_pipelines.dispatch import holds

# Weight of priority low, normal, high, urgent.
PRIORITY_WEIGHTS = (1, 4, 16, 64)
# So much of what is left of the day of a server that is warmed up may be unspent before grants are lowered.
_SLACK = 1.1
_WAITING = (State.PENDING, State.DEFERRED)
# Campaign, server, provider, start of the slot.
Place = tuple[int, int, str, int]


@dataclass(frozen=True)
class Grant:
    """A row of `allotments`."""

    granted: int
    used: int = 0
    planned: int = 0


@dataclass(frozen=True)
class _Campaign:
    """A campaign with rows waiting for a provider: its weight, and the pools that may send it."""

    id: int
    weight: int
    pool_id: int
    overflow_pool_id: int | None


def fill(engine: Engine, heartbeat_seconds: float, now: dt.datetime | None = None) -> int:
    """Grant the current and the next slot to all sending campaigns; returns how many grants were changed."""

    def work(connection: Connection) -> int:
        moment = now or database_now(connection)
        slots = slots_at(moment, 2)
        present = read(connection, slots)
        planned = {place: grant.planned for place, grant in present.items() if grant.planned}
        fleet = Fleet.read(connection, moment, heartbeat_seconds)
        wanted = shares(connection, fleet, slots, planned, present)
        raised = {place: granted for place, granted in wanted.items() if place not in present or granted > present[place].granted}
        lowered = _lowered(fleet, wanted, present)
        _upsert(connection, [_row(place, granted) for place, granted in sorted(raised.items())], lowers=False)
        _upsert(connection, [_row(place, granted) for place, granted in sorted(lowered.items())], lowers=True)
        return len(raised) + len(lowered)

    return transact(engine, work)


def slots_at(moment: dt.datetime, count: int) -> list[int]:
    """The starts of the current slot and of those after it, `count` in all."""
    return [slot_at(moment) + number * SLOT_SECONDS for number in range(count)]


def read(connection: Connection, slots: Sequence[int]) -> dict[Place, Grant]:
    """All grants of these slots."""
    columns = (Allotment.campaign_id, Allotment.server_id, Allotment.provider, Allotment.slot_start, Allotment.granted, Allotment.used, Allotment.planned)
    rows = connection.execute(sa.select(*columns).where(Allotment.slot_start.in_(slots))).tuples()
    return {(campaign, server, provider, start): Grant(granted, used, planned) for campaign, server, provider, start, granted, used, planned in rows}


def shares(connection: Connection, fleet: Fleet, slots: Sequence[int], planned: Mapping[Place, int], present: Mapping[Place, Grant]) -> dict[Place, int]:
    """What each campaign is to be granted in these slots, the current one first, if so much is `planned` there; `present` are their grants."""
    campaigns_of = _demand(connection)
    known = {(campaign, provider) for campaign, _, provider, _ in planned}
    planned_slots = {(provider, start) for _, _, provider, start in planned}
    wanted: dict[Place, int] = {}
    for provider, campaigns in campaigns_of.items():
        if fleet.held.over_provider(provider):
            continue
        limits = {server.id: fleet.limits(server.id, provider) for server in fleet.members}
        open_to = [server for server in fleet.members if fleet.breaker(server.id, provider) != breakers.OPEN]
        able = {
            server.pool_id
            for server in open_to
            if server.speaks and (found := limits[server.id]) is not None and found.allow_more(fleet.used.get((server.id, provider), {}))
        }
        for server in open_to:
            found = limits[server.id]
            room = 0 if found is None else found.per_slot
            ours = [campaign for campaign in campaigns if campaign.pool_id == server.pool_id]
            theirs = [campaign for campaign in campaigns if campaign.overflow_pool_id == server.pool_id and campaign.pool_id not in able | {server.pool_id}]
            both = [*ours, *theirs]
            total = sum(campaign.weight for campaign in both)
            most = provider_rules().trial_messages if (server.id, provider) in fleet.stopped else room
            for start in slots:
                if found is not None and found.warming and (server.id, provider) not in fleet.stopped:
                    places = {(campaign.id, server.id, provider, start): campaign.weight for campaign in (both if start == slots[0] else ours)}
                    wanted |= _of_the_day(places, fleet.left(server.id, provider, start), planned, present)
                    continue
                left = max(0, room - sum(planned.get((campaign.id, server.id, provider, start), 0) for campaign in both))
                # Whether a later slot needs the overflow pools will be seen when it comes.
                for campaign in both if start == slots[0] else ours:
                    place = campaign.id, server.id, provider, start
                    share = planned.get(place, 0) + left * campaign.weight // total
                    if (provider, start) in planned_slots and (campaign.id, provider) not in known:
                        share = max(share, room * campaign.weight // total)
                    wanted[place] = min(max(1, share), most) if room else 0
    return wanted


def _of_the_day(weights: Mapping[Place, int], left: int, planned: Mapping[Place, int], present: Mapping[Place, Grant]) -> dict[Place, int]:
    """What campaigns are to be granted of what a server that is warmed up has `left`: together no more than that beside what they have used.

    If it is less than a message for each, the most urgent have it.
    """
    weights = dict(sorted(weights.items(), key=lambda item: -item[1]))
    used = {place: present[place].used if place in present else 0 for place in weights}
    wanted = dict(used)
    for place in weights:
        mine = min(left, max(0, planned.get(place, 0) - used[place]))
        wanted[place] += mine
        left -= mine
    spare, total = left, sum(weights.values())
    for place, weight in weights.items():
        share = min(left, -(-spare * weight // total))
        wanted[place] += share
        left -= share
    return wanted


def _lowered(fleet: Fleet, wanted: Mapping[Place, int], present: Mapping[Place, Grant]) -> dict[Place, int]:
    """The grants that are too high where servers are warmed up, together by so much that it matters: they are written while claims wait for them."""
    places_of: defaultdict[tuple[int, str, int], list[Place]] = defaultdict(list)
    warms = functools.cache(lambda server, provider: fleet.warms(server, provider) and fleet.breaker(server, provider) == breakers.CLOSED)
    for place in wanted:
        if place in present and warms(*place[1:3]):
            places_of[place[1:]].append(place)
    lowered: dict[Place, int] = {}
    for (server, provider, start), places in places_of.items():
        unspent = sum(max(wanted[place], present[place].granted) - present[place].used for place in places)
        if unspent > _SLACK * fleet.left(server, provider, start):
            lowered |= {place: wanted[place] for place in places if wanted[place] < present[place].granted}
    return lowered


def write_plan(connection: Connection, fleet: Fleet, present: Mapping[Place, Grant], planned: Mapping[Place, int], slots: Sequence[int], epoch: int) -> int:
    """Make grants what a plan means, with shares of what it leaves; returns how many changed. In the transaction in which the plan came into force.

    `present` are the grants that the plan began with: what was used since stays granted. What a breaker has taken away or granted for a trial is left alone.
    """
    wanted = shares(connection, fleet, slots, planned, present)
    rows = []
    for place in sorted(wanted.keys() | present.keys()):
        before = present.get(place, Grant(-1))
        _, server_id, provider, _ = place
        if fleet.breaker(server_id, provider) != breakers.CLOSED:
            continue
        # A campaign without rows that wait keeps its grant, for they may come back; so does an overflow pool that is no longer needed.
        after = Grant(max(before.used, wanted.get(place, before.granted)), before.used, planned.get(place, 0))
        if after != before:
            rows.append(_row(place, after.granted) | {"planned": after.planned, "plan_epoch": epoch})
    _upsert(connection, rows, lowers=True, stamps=("planned", "plan_epoch"))
    return len(rows)


def take_back(connection: Connection, server_id: int) -> int:
    """Take from a server what it was granted and has not used, from the current slot on; returns how many grants. It must not be one that claims."""
    unspent = (Allotment.server_id == server_id, Allotment.slot_start >= slot_at(database_now(connection)), Allotment.granted > Allotment.used)
    return connection.execute(sa.update(Allotment).where(*unspent).values(granted=Allotment.used)).rowcount


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


def _row(place: Place, granted: int) -> dict[str, object]:
    campaign_id, server_id, provider, start = place
    return {"campaign_id": campaign_id, "server_id": server_id, "provider": provider, "slot_start": start, "granted": granted, "used": 0}


def _upsert(connection: Connection, rows: Sequence[Mapping[str, object]], *, lowers: bool, stamps: Sequence[str] = ()) -> None:
    """Insert grants or set those that are there: not below what they are, or if this `lowers` them not below what is used. `stamps` are columns set as well."""
    if not rows:
        return
    table = Allotment.__table__
    assert isinstance(table, sa.Table)
    least = table.c.used if lowers else table.c.granted
    if is_mysql(connection):
        from sqlalchemy.dialects import mysql

        insert = mysql.insert(table)
        given = {name: sa.func.values(sa.column(name)) for name in ("granted", *stamps)}
        values: dict[str, Any] = given | {"granted": sa.func.greatest(least, given["granted"])}
        statement: sa.Insert = insert.on_duplicate_key_update(**values)
    else:
        from sqlalchemy.dialects import sqlite

        upsert = sqlite.insert(table)
        values = {name: upsert.excluded[name] for name in stamps} | {"granted": sa.func.max(least, upsert.excluded.granted)}
        statement = upsert.on_conflict_do_update(index_elements=list(table.primary_key), set_=values)
    connection.execute(statement, rows)
