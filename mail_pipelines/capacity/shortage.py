"""How many servers to ask for now, by pool: what the plan in force lacks, less what is on its way already, and no fewer than were taken out of service.

What belongs here: reading that off the plan and off what `health` has decided. What does not: the plans (`far`, `forecast`), and what becomes of a shortage
(`provisioning.proposals`).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from mail_pipelines.capacity import demand, far, health, in_force
from mail_pipelines.capacity.health_rules import Record
from mail_pipelines.capacity.in_force import Kept
from mail_pipelines.capacity.reports import minute
from mail_pipelines.database.models import DEFAULT_POOL, Campaign
from mail_pipelines.dispatch import pools
from mail_pipelines.provisioning import proposals, store
from mail_pipelines.provisioning.proposals import Wanted
from mail_pipelines.provisioning.states import IN_SERVICE, MAKING
from mail_pipelines.provisioning.store import Provision


def wanted(connection: Connection, *, curve: str | None) -> list[Wanted]:
    """Orders of the far plan that are due; also what would let the campaigns of the near one end in time, if servers of the next source's `curve` do ("": its
    addresses are warm; None: there is no source). And those in the place of servers that were taken out of service.
    """
    kept = in_force.read(connection)
    default = pools.keys(connection)[DEFAULT_POOL]
    found: dict[str, Wanted] = {}
    if kept is not None:
        found = _far(kept)
        for pool, lack in _near(connection, kept, curve).items():
            if pool not in found or found[pool].servers < lack.servers:
                found[pool] = lack
        found = {pool: replace(lack, as_of=kept.made_at) for pool, lack in found.items()}
    # A pool that is asked for by no name is the default one.
    known = store.all_provisions(connection)
    found = {pool: replace(lack, pool=None if pool == default else pool) for pool, lack in found.items()}
    for pool, lack in in_the_place(known, health.drained(connection), default).items():
        # What came in the place of the one is no answer to the other.
        if pool not in found or proposals.lacking(found[pool], known) < proposals.lacking(lack, known):
            found[pool] = lack
    return [lack for _, lack in sorted(found.items())]


def in_the_place(known: Sequence[Provision], drained: Mapping[str, Record], default: str) -> dict[str, Wanted]:
    """For each server made here that was drained by itself, or lost, another one. What was asked for since it was decided is in its place."""
    gone: defaultdict[str, list[str]] = defaultdict(list)
    for one in known:
        if one.key in drained and one.state in IN_SERVICE:
            gone[one.pool or default].append(one.key)
    found = {}
    for pool, keys in gone.items():
        why = "; ".join(f"in the place of {key}: {drained[key].why}" for key in keys)
        since = min(drained[key].at for key in keys)
        found[pool] = Wanted(len(keys), why, "the pool is as large as before", None if pool == default else pool, as_of=since)
    return found


def _far(kept: Kept) -> dict[str, Wanted]:
    """The far plan counts servers on order as there."""
    due: defaultdict[str, list[far.FarOrder]] = defaultdict(list)
    for values in kept.document["far"]:
        if (order := far.from_document(values)).due:
            due[order.pool].append(order)
    found = {}
    for pool, orders in due.items():
        effect = far.effect(sum(order.short for order in orders), sum(order.left for order in orders))
        found[pool] = Wanted(sum(order.servers for order in orders), orders[0].why, effect)
    return found


def _near(connection: Connection, kept: Kept, curve: str | None) -> dict[str, Wanted]:
    """The near plan knows only the servers that could send when it was made. One number of servers serves all campaigns of a pool.

    It stays in force when all that it is for is over: then nothing is planned, and its orders are void.
    """
    keys = pools.keys(connection)
    offer = kept.document.get("offer")
    if offer is None or offer["curve"] != curve:
        # Without the offer of a source the plan knows only what servers would do that are warm and there.
        offer = {"orders": kept.document["orders"] if curve == "" else []}
    orders = {order["campaign"]: order for order in offer["orders"]}
    known = store.all_provisions(connection)
    found: dict[str, Wanted] = {}
    late = sa.select(Campaign.key, Campaign.pool_id).where(Campaign.key.in_(orders), Campaign.state.in_(demand.PLANNED))
    for key, pool_id in connection.execute(late).tuples():
        pool, order = keys[pool_id], orders[key]
        coming = sum(
            one.pool in (pool, None if pool_id == DEFAULT_POOL else pool)
            and one.requested_at <= kept.made_at
            and (one.state in MAKING or (one.state in IN_SERVICE and one.state_at > kept.made_at))
            for one in known
        )
        if (servers := order["servers"] - coming) > (found[pool].servers if pool in found else 0):
            found[pool] = Wanted(servers, f"campaign {key}: {order['why']}", _effect(key, order, servers))
    return found


def _effect(campaign: str, order: Mapping[str, Any], servers: int) -> str:
    """What so many more servers do for a campaign: in time, and when, if the plan in force says it."""
    without, with_them = (minute(order.get(name)) for name in ("finish_at", "finish_with"))
    times = f", at {with_them} UTC instead of {without or 'after more than 48 hours'}" if with_them else ""
    return f"campaign {campaign} ends in time with {servers} more servers{times}"
