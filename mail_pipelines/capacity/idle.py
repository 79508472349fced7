"""Servers made here that are not needed: each is judged with every plan, and at most one of all is to go.

What belongs here: reading what `retiring` judges by, and what the near plan has to say. What does not: the rule (`retiring`), and giving a server back.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from sqlalchemy.engine import Connection

from mail_pipelines.capacity import forecast, health, in_force, outlook, retiring, shortage, verdicts
from mail_pipelines.capacity.far import FarOrder, InFlight, Outlook
from mail_pipelines.capacity.fleet import Fleet
from mail_pipelines.capacity.health_rules import Record
from mail_pipelines.capacity.near import NearPlan, near_plan
from mail_pipelines.capacity.new_servers import HostSources
from mail_pipelines.capacity.retiring import Candidate, Offer
from mail_pipelines.capacity.verdicts import Verdict
from mail_pipelines.config import Settings
from mail_pipelines.database.models import DEFAULT_POOL
from mail_pipelines.dispatch import pools
from mail_pipelines.provisioning import budget, proposals, store
from mail_pipelines.provisioning.states import IN_SERVICE
from mail_pipelines.provisioning.store import Provision


@dataclass(frozen=True)
class Idleness:
    """What was read for the verdicts. `restless` are pools of which a server was taken out of service in whose place no other is yet."""

    candidates: Sequence[Candidate]
    restless: frozenset[str]
    previous: Sequence[Verdict]


def read(connection: Connection, settings: Settings, fleet: Fleet) -> Idleness:
    default, names = pools.keys(connection)[DEFAULT_POOL], pools.keys(connection)
    members = {member.id: member for member in fleet.members}
    known = store.all_provisions(connection)
    candidates = [
        Candidate(
            one.key, one.server_id, names[members[one.server_id].pool_id], one.cost_per_hour or 0.0, (), budget.may_be_given_back_at(one, settings.provisioning)
        )
        for one in known
        if one.state in IN_SERVICE and one.server_id is not None and one.server_id in members
    ]
    kept = in_force.read(connection)
    previous = [verdicts.from_document(values) for values in kept.document.get("idle", ())] if kept else []
    return Idleness(candidates, restless(known, health.drained(connection), default), previous)


def restless(known: Sequence[Provision], drained: Mapping[str, Record], default: str) -> frozenset[str]:
    """The pools for which a server is still to be asked for in the place of another."""
    return frozenset(pool for pool, lack in shortage.in_the_place(known, drained, default).items() if proposals.lacking(lack, known) > 0)


def judge(
    known: Idleness,
    plan: NearPlan,
    fleet: Fleet,
    outlooks: Sequence[Outlook],
    flights: Sequence[InFlight],
    orders: Sequence[FarOrder],
    sources: HostSources,
    now: dt.datetime,
) -> list[Verdict]:
    """The verdict on each server made here that sends, by its name."""
    by_pool = {one.pool: one for one in outlooks}
    short = {order.pool for order in orders}
    found = []
    for one in sorted(known.candidates, key=lambda one: one.server):
        if one.pool in known.restless:
            found.append(Verdict(one.server, one.pool, True, "another of its pool was taken out of service"))
        elif one.pool in short:
            found.append(Verdict(one.server, one.pool, True, "the plan of the next eight weeks orders more for its pool"))
        else:
            pool = by_pool.get(one.pool, Outlook(one.pool, {}, {}, {}))
            offer = Offer(one.cost_per_hour if sources.next is None else sources.next.cost_per_hour, sources.new_server)
            coming = [flight for flight in flights if flight.pool == one.pool]
            found.append(retiring.judge(pool, replace(one, able=outlook.able(pool, fleet, one.server_id)), coming, offer, now))
    chosen = retiring.choose(found, known.previous, now.date())
    ids = {one.server: one.server_id for one in known.candidates}
    return [one if one.keep or _spared(plan, ids[one.server]) else Verdict(one.server, one.pool, True, "the next 48 hours need it") for one in chosen]


def _spared(plan: NearPlan, server_id: int) -> bool:
    """Whether the campaigns of the near plan would be in time without this server as with it, and are now."""
    late = sum(found.late + found.unmet for found in forecast.forecasts(plan))
    if late or not plan.providers:
        return not late
    demands = [demand for part in plan.providers for demand in part.demands]
    lines = [line for part in plan.providers for line in part.lines if line.server_id != server_id]
    without = near_plan(plan.jobs, demands, lines, plan.horizon.now)
    return not sum(found.late + found.unmet for found in forecast.forecasts(without))
