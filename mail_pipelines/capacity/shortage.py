"""How many servers to ask for now, by pool: what the plan in force lacks, less what is on its way already.

What belongs here: reading that off the plan. What does not: the plans (`far`, `forecast`), and what becomes of a shortage (`provisioning.proposals`).
"""

from __future__ import annotations

from collections import defaultdict

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from mail_pipelines.capacity import far, planning
from mail_pipelines.capacity.planning import Kept
from mail_pipelines.database.models import DEFAULT_POOL, Campaign
from mail_pipelines.dispatch import pools
from mail_pipelines.provisioning import store
from mail_pipelines.provisioning.proposals import Wanted
from mail_pipelines.provisioning.states import IN_SERVICE, MAKING


def wanted(connection: Connection, *, warm: bool) -> list[Wanted]:
    """Orders of the far plan that are due; if new servers are `warm`, also what would let the campaigns of the near one end in time."""
    kept = planning.in_force(connection)
    if kept is None:
        return []
    default = pools.keys(connection)[DEFAULT_POOL]
    found = _far(kept)
    for pool, lack in (_near(connection, kept) if warm else {}).items():
        if pool not in found or found[pool].servers < lack.servers:
            found[pool] = lack
    # A pool that is asked for by no name is the default one.
    return [Wanted(lack.servers, lack.why, lack.effect, None if pool == default else pool, kept.made_at) for pool, lack in sorted(found.items())]


def _far(kept: Kept) -> dict[str, Wanted]:
    """The far plan counts servers on order as there."""
    due: defaultdict[str, list[far.FarOrder]] = defaultdict(list)
    for values in kept.document["far"]:
        if (order := far.from_document(values)).due:
            due[order.pool].append(order)
    found = {}
    for pool, orders in due.items():
        effect = f"{sum(order.short for order in orders):,} messages would be late without them, {sum(order.left for order in orders):,} with them"
        found[pool] = Wanted(sum(order.servers for order in orders), orders[0].why, effect)
    return found


def _near(connection: Connection, kept: Kept) -> dict[str, Wanted]:
    """The near plan knows only the servers that could send when it was made. One number of servers serves all campaigns of a pool."""
    keys = pools.keys(connection)
    orders = {order["campaign"]: order for order in kept.document["orders"]}
    found: dict[str, Wanted] = {}
    for key, pool_id in connection.execute(sa.select(Campaign.key, Campaign.pool_id).where(Campaign.key.in_(orders))).tuples():
        pool, order = keys[pool_id], orders[key]
        coming = sum(
            one.pool in (pool, None if pool_id == DEFAULT_POOL else pool)
            and one.requested_at <= kept.made_at
            and (one.state in MAKING or (one.state in IN_SERVICE and one.state_at > kept.made_at))
            for one in store.all_provisions(connection)
        )
        if (servers := order["servers"] - coming) > (found[pool].servers if pool in found else 0):
            found[pool] = Wanted(servers, f"campaign {key}: {order['why']}", f"campaign {key} ends in time with {servers} more warm servers")
    return found
