"""What an operator has to know of the capacity plan: deadlines in danger, and servers that are wanted while nobody proposes or orders them.

What belongs here: what of the plan in force is worth an alert of its own. What does not: proposals (`causes`), whose alert tells what they are for.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Collection, Iterator, Mapping

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from mail_pipelines.alerts.cause import Cause
from mail_pipelines.capacity import demand, in_force
from mail_pipelines.capacity.in_force import Kept
from mail_pipelines.capacity.reports import ending, minute
from mail_pipelines.config import ProvisioningSettings
from mail_pipelines.database.models import DEFAULT_POOL, Campaign
from mail_pipelines.dispatch import pools
from mail_pipelines.provisioning import proposals, store

# Two plans have to say it: what slows servers down for some minutes is no danger.
IN_DANGER_FOR = dt.timedelta(minutes=6)
# An older plan says nothing of a campaign: one is made every five minutes while any is planned for.
_FRESH = dt.timedelta(hours=1)
# Beside the cool-down, after which a proposal or an order follows by itself.
_UNANSWERED_FOR = dt.timedelta(minutes=10)
# Why nobody asks for servers that are wanted, by `provisioning.mode`; with the other one there is a proposal.
_NOBODY = {"off": "provisioning.mode is off", "auto": "provisioning.budget and provisioning.most allow no more"}


def causes(connection: Connection, settings: ProvisioningSettings, now: dt.datetime) -> Iterator[Cause]:
    """By the plan in force."""
    names = pools.keys(connection)
    default = names[DEFAULT_POOL]
    proposed = {one.pool or default for one in proposals.undecided(connection)}
    kept = in_force.read(connection)
    if kept is not None and now - kept.made_at < _FRESH:
        making = {one.pool or default for one in store.making(connection)}
        yield from _deadlines(connection, kept, names, making | proposed, now)
    if settings.mode in _NOBODY:
        yield from _unanswered(connection, settings, proposed, default)


def _deadlines(connection: Connection, kept: Kept, names: Mapping[int, str], answered: Collection[str], now: dt.datetime) -> Iterator[Cause]:
    """Campaigns that will be late by the plan, but for those of pools for which servers are proposed, or being made, that are in time for them."""
    late = {found["campaign"]: found for found in kept.document["campaigns"] if found["late"]}
    warm = {order["campaign"]: order["servers"] for order in kept.document["orders"]}
    offered = {order["campaign"]: order["servers"] for order in kept.document.get("offer", {}).get("orders", ())}
    # Of one that is late already another alert tells.
    living = sa.select(Campaign.key, Campaign.pool_id).where(Campaign.key.in_(late), Campaign.state.in_(demand.PLANNED), Campaign.finish_by > now)
    for key, pool_id in connection.execute(living.order_by(Campaign.id)).tuples():
        if key in offered and names[pool_id] in answered:
            continue
        found = late[key]
        course = f"{found['late']:,} messages come too late, the last {ending(found)} ({found['bottleneck']})"
        remedy = f"{warm[key]} more warm servers would save it" if key in warm else "no number of servers would save it"
        text = f"campaign {key} will miss its finish_by, {minute(found['finish_by'])} UTC: {course}; {remedy}"
        pool = None if pool_id == DEFAULT_POOL else names[pool_id]
        command = _provision(offered[key], pool) if key in offered else f"mail-pipelines plan what-if --campaign {key}"
        yield Cause("campaign-in-danger", key, text, command, IN_DANGER_FOR)


def _unanswered(connection: Connection, settings: ProvisioningSettings, proposed: Collection[str], default: str) -> Iterator[Cause]:
    """Servers that the next weeks want, or that are wanted in the place of others, and of which there is neither a proposal nor an order."""
    # It loads numpy, and every worker loads this module.
    from mail_pipelines.capacity import shortage

    known = store.all_provisions(connection)
    after = dt.timedelta(minutes=settings.cool_down_minutes) + _UNANSWERED_FOR
    for lack in shortage.wanted(connection, curve=None):
        servers, pool = proposals.lacking(lack, known), lack.pool or default
        if servers <= 0 or pool in proposed:
            continue
        effect = f" ({lack.effect})" if lack.effect else ""
        text = f"{servers} more servers of pool {pool} are wanted, but {_NOBODY[settings.mode]}: {lack.why}{effect}"
        command = _provision(servers, lack.pool) if settings.mode == "off" else "mail-pipelines server provisions"
        yield Cause("servers-wanted", pool, text, command, after)


def _provision(servers: int, pool: str | None) -> str:
    return f"mail-pipelines server provision --count {servers}{f' --pool {pool}' if pool else ''}"
