"""Grants: what the plan in force means for each campaign, and at once a share of what it leaves for everybody with open rows.

A slot is 15 minutes. A server's room for a provider in a slot is the least its limits allow. Of that each campaign has what was planned for it; the rest is
shared among all campaigns by the weight of their priority (`shares`). So nobody waits for the next plan: not a campaign that has just begun, nor rows that come
back early, and where nothing is planned all is shared. A campaign that the plan has not looked at has its share of the whole room: until the next plan, a few
minutes later, grants may then add up to more than the room, which pacers and usage windows keep as they always do.

Here grants only rise within a slot, so that no session is cut short; a plan lowers what it planned otherwise, and a breaker that opens takes all away. Two
kinds fall as well, or sessions would be started for grants that no claim gets anything for: where a server is warmed up, what is unspent in a slot follows what
is left of the day; and where a limit of the slot, hour or day is used up, nothing stays unspent.

A tick looks only at providers for which something has changed since the last one, and else at servers that are warmed up: the grants of a large fleet are some
hundred thousand rows.

Servers of a campaign's overflow pool are granted a provider only where no server of its own pool can send to it: is active, speaking and not held,
with its breaker not open, and has limits left in this slot, hour and day.
"""

from __future__ import annotations

import datetime as dt
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine

from mail_pipelines.capacity import breakers, domain_breakers, grants, in_force
from mail_pipelines.capacity.fleet import Fleet
from mail_pipelines.capacity.grants import Grant, Place
from mail_pipelines.capacity.shares import Wants, lowered, open_to, shares, signature
from mail_pipelines.database.engine import database_now, reading, transact
from mail_pipelines.database.models import Allotment, Campaign, CampaignCounter, State, SyncState
from mail_pipelines.database.upsert import put
from mail_pipelines.delivery.breakers import domain_rules
from mail_pipelines.delivery.recording import SLOT_SECONDS, slot_at
from mail_pipelines.dispatch import holds, windows

# Weight of priority low, normal, high, urgent.
PRIORITY_WEIGHTS = (1, 4, 16, 64)
_WAITING = (State.PENDING, State.DEFERRED)
# A tick grants so many slots: this one and the next.
_FILLED = 2
_SOURCE, _KEY = "capacity", "filled"


def fill(engine: Engine, heartbeat_seconds: float, now: dt.datetime | None = None) -> int:
    """Grant the current and the next slot to all sending campaigns; returns how many grants were changed."""
    with reading(engine) as connection:
        moment = now or database_now(connection)
        slots = grants.slots_at(moment, _FILLED)
        kept = in_force.read(connection)
        epoch = 0 if kept is None else kept.epoch
        # Before any grant is read.
        portions = in_force.portions(connection)
        fleet = Fleet.read(connection, moment, heartbeat_seconds)
        campaigns_of = _demand(connection, slots[-1] + SLOT_SECONDS)
        lines_of = {provider: open_to(fleet, provider, slots) for provider in campaigns_of if not fleet.held.over_provider(provider)}
        signatures = {provider: signature(slots, epoch, campaigns_of[provider], lines) for provider, lines in lines_of.items()}
        before = _filled(connection)
        changed = {provider for provider, found in signatures.items() if before.get(provider) != found}
        warming = {line.server.id for provider, lines in lines_of.items() if provider not in changed for line in lines if line.warms}
        present = grants.read(connection, slots, epoch, changed) if changed else {}
        if warming:
            present |= grants.read(connection, slots, epoch, lines_of.keys() - changed, warming)
    planned = {place: grant.planned for place, grant in present.items() if grant.planned}
    planned_for = None if kept is None else kept.planned_for
    wanted = shares(fleet, slots, campaigns_of, lines_of, planned, planned_for, present, lines_of.keys() - changed)
    up = {place: Grant(granted) for place, granted in wanted.items() if place not in present or granted > present[place].granted}
    down = {place: Grant(granted) for place, granted in lowered(fleet, wanted, present).items()}
    written = grants.write(engine, up, fleet, epoch, lowers=False, beside=portions) + grants.write(engine, down, fleet, epoch, lowers=True, beside=portions)
    # What was left out, because something changed meanwhile, is looked at by the next tick.
    if signatures != before and written == len(up) + len(down):
        _keep(engine, signatures, epoch, moment)
    return written


def _filled(connection: Connection) -> Mapping[str, str]:
    """The signatures of the providers as they were when their grants were written last."""
    query = sa.select(SyncState.value).where(SyncState.source == _SOURCE, SyncState.key == _KEY)
    return connection.execute(query).scalar_one_or_none() or {}


def _keep(engine: Engine, signatures: Mapping[str, str], epoch: int, now: dt.datetime) -> None:
    row = {"source": _SOURCE, "key": _KEY, "value": signatures, "version": epoch, "changed_at": now}
    transact(engine, lambda connection: put(connection, SyncState, [row]))


def write_plan(
    engine: Engine,
    heartbeat_seconds: float,
    present: Mapping[Place, Grant],
    planned: Mapping[Place, int],
    planned_for: Collection[tuple[int, str]],
    slots: Sequence[int],
    epoch: int,
    now: dt.datetime,
) -> int:
    """Make grants what the plan means that has come into force as `epoch`, with shares of what it leaves; returns how many changed.

    `present` are the grants that the plan began with: what was used since stays granted. What a breaker has taken away or granted for a trial is left alone.
    """
    with reading(engine) as connection:
        # A breaker may have opened, or a hold begun, while the plan was made.
        fleet = Fleet.read(connection, now, heartbeat_seconds)
        campaigns_of = _demand(connection, slots[-1] + SLOT_SECONDS)
    lines_of = {provider: open_to(fleet, provider, slots) for provider in campaigns_of if not fleet.held.over_provider(provider)}
    wanted = shares(fleet, slots, campaigns_of, lines_of, planned, planned_for, present)
    changed: dict[Place, Grant] = {}
    for place in wanted.keys() | present.keys():
        _, server_id, provider, _ = place
        if fleet.breaker(server_id, provider) != breakers.CLOSED:
            continue
        before = present.get(place, Grant(-1))
        # A campaign without rows that wait keeps its grant, for they may come back; so does an overflow pool that is no longer needed.
        after = Grant(max(before.used, wanted.get(place, before.granted)), before.used, planned.get(place, 0))
        # What is planned as before is stamped anew all the same: it is this plan's now.
        if after != before or after.planned:
            changed[place] = after
    written = grants.write(engine, changed, fleet, epoch, lowers=True)
    if written == len(changed):
        # The next tick has nothing to add but where a breaker is on trial, whose grants are not the plan's.
        done = {provider: lines for provider, lines in lines_of.items() if all(line.breaker == breakers.CLOSED for line in lines)}
        first = {provider: [replace(line, spent=line.spent[:_FILLED]) for line in lines] for provider, lines in done.items()}
        _keep(engine, {name: signature(slots[:_FILLED], epoch, campaigns_of[name], lines) for name, lines in first.items()}, epoch, now)
    return written


def take_back(connection: Connection, server_id: int) -> int:
    """Take from a server what it was granted and has not used, from the current slot on; returns how many grants. It must not be one that claims."""
    unspent = (Allotment.server_id == server_id, Allotment.slot_start >= slot_at(database_now(connection)), Allotment.granted > Allotment.used)
    return connection.execute(sa.update(Allotment).where(*unspent).values(granted=Allotment.used)).rowcount


def _demand(connection: Connection, until: int) -> dict[str, list[Wants]]:
    """Campaigns with rows waiting, by provider; not those of which all wait for a send window that opens no earlier than at `until`, nor those whose domain is
    stopped there.
    """
    columns = (Campaign.id, CampaignCounter.provider, Campaign.priority, Campaign.pool_id, Campaign.overflow_pool_id)
    rows = sa.func.sum(CampaignCounter.count).label("rows")
    waiting = connection.execute(
        sa.select(*columns, Campaign.send_window.is_not(None).label("windowed"), rows)
        .join_from(CampaignCounter, Campaign, Campaign.id == CampaignCounter.campaign_id)
        .where(Campaign.state == "sending", ~holds.over_campaigns(), CampaignCounter.state.in_([int(state) for state in _WAITING]))
        .group_by(*columns)
        .having(rows > 0)
        .order_by(CampaignCounter.provider, Campaign.id)
    ).all()
    later = windows.waiting(connection, {row.id for row in waiting if row.windowed}, until - 1)
    stopped = domain_breakers.stopped(connection)
    demand: defaultdict[str, list[Wants]] = defaultdict(list)
    for row in waiting:
        breaker = stopped.get((row.id, row.provider))
        if breaker is not None and breaker.state == domain_breakers.OPEN:
            continue
        most = None if breaker is None else domain_rules().trial_messages
        if row.rows > sum(later.get((row.id, row.provider), {}).values()):
            demand[row.provider].append(Wants(row.id, PRIORITY_WEIGHTS[row.priority], row.pool_id, row.overflow_pool_id, most))
    return dict(demand)
