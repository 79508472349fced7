"""Servers that would help: proposing them, and acting on it.

What belongs here: what is asked for when capacity runs short, and when again. What does not: how many are wanted, which the capacity plan says, and making them
(`making`).
"""

from __future__ import annotations

import datetime as dt
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from mail_pipelines.config import ProvisioningSettings
from mail_pipelines.database import models
from mail_pipelines.database.engine import database_now
from mail_pipelines.errors import nearest
from mail_pipelines.provisioning import budget, store
from mail_pipelines.provisioning.interfaces import HostSource, Parts, ProvisioningError
from mail_pipelines.provisioning.states import IN_SERVICE, MAKING
from mail_pipelines.provisioning.store import Provision

OPEN, ACCEPTED, SUPERSEDED, LAPSED = "open", "accepted", "superseded", "lapsed"
_LONGEST = 500
_T = models.ProvisionProposal


@dataclass(frozen=True)
class Wanted:
    """So many more servers of a pool (None: the default one); why, and what they would do for the campaigns.

    What was asked for until `as_of` is counted already. Without a time nothing is: then all that are being made are subtracted.
    """

    servers: int
    why: str
    effect: str = ""
    pool: str | None = None
    as_of: dt.datetime | None = None


@dataclass(frozen=True)
class Proposal:
    id: int
    state: str
    servers: int
    pool: str | None
    why: str
    effect: str
    cost_per_month: float
    made_at: dt.datetime
    decided_at: dt.datetime | None


_COLUMNS = [getattr(_T, name) for name in Proposal.__dataclass_fields__]


def all_proposals(connection: Connection, *, last: int = 20) -> list[Proposal]:
    """The newest first."""
    return _found(connection, sa.select(*_COLUMNS).order_by(_T.id.desc()).limit(last))


def undecided(connection: Connection) -> list[Proposal]:
    """Those that are open, one at most for each pool."""
    return _found(connection, sa.select(*_COLUMNS).where(_T.state == OPEN).order_by(_T.id))


def _found(connection: Connection, query: sa.Select[Any]) -> list[Proposal]:
    return [Proposal(**row._mapping) for row in connection.execute(query)]


def find(connection: Connection, proposal_id: int) -> Proposal:
    for proposal in all_proposals(connection, last=1000):
        if proposal.id == proposal_id:
            return proposal
    raise ProvisioningError(f"there is no proposal {proposal_id}; {nearest(proposal_id, (str(known.id) for known in all_proposals(connection)))}")


def propose(connection: Connection, parts: Parts, wanted: Wanted) -> Proposal:
    """Store a proposal; it takes the place of one for the same pool that nobody has decided."""
    now = database_now(connection)
    connection.execute(sa.update(_T).where(_T.state == OPEN, _T.pool.is_not_distinct_from(wanted.pool)).values(state=SUPERSEDED, decided_at=now))
    cost = _cost_per_month(connection, parts, wanted)
    texts = {"why": wanted.why[:_LONGEST], "effect": wanted.effect[:_LONGEST]}
    result = connection.execute(sa.insert(_T).values(state=OPEN, servers=wanted.servers, pool=wanted.pool, cost_per_month=cost, made_at=now, **texts))
    assert result.inserted_primary_key is not None
    return find(connection, result.inserted_primary_key[0])


def next_cost(connection: Connection, parts: Parts) -> float:
    """What a server of the first source costs that is not set aside."""
    following = next_source(connection, parts.sources)
    return 0.0 if following is None else following.cost_per_hour


def next_source(connection: Connection, sources: Sequence[HostSource]) -> HostSource | None:
    """The first that is not set aside."""
    aside = store.set_aside(connection)
    return next((source for source in sources if source.name not in aside), None)


def accept(connection: Connection, settings: ProvisioningSettings, proposal_id: int) -> list[Provision]:
    """Ask for the servers of a proposal. Raises `ProvisioningError` if it was decided already."""
    proposal = find(connection, proposal_id)
    swap = sa.update(_T).where(_T.id == proposal_id, _T.state == OPEN).values(state=ACCEPTED, decided_at=database_now(connection))
    if connection.execute(swap).rowcount != 1:
        raise ProvisioningError(f"proposal {proposal_id} is {proposal.state}; `mail-pipelines server proposals` has the open one")
    return [store.request(connection, settings, proposal.why, proposal_id=proposal_id, pool=proposal.pool) for _ in range(proposal.servers)]


def short(connection: Connection, parts: Parts, wanted: Wanted) -> str:
    """Act on a shortage as `provisioning.mode` says, unless that was done lately or is being done; what was done, in words, or why nothing."""
    settings, now = parts.settings.provisioning, database_now(connection)
    # All that act on a shortage wait for each other here.
    provisions = store.all_provisions(connection, since=budget.month_of(now)[0], lock=True)
    servers, said = missing(wanted, provisions, last_action(connection, wanted.pool), next_cost(connection, parts), settings, now)
    if not servers:
        return said
    if settings.mode == "propose" and (standing := _same(connection, parts, replace(wanted, servers=servers))) is not None:
        return f"proposal {standing.id} is open: {standing.servers} servers, {standing.cost_per_month:.2f} a month: {standing.why}"
    proposal = propose(connection, parts, replace(wanted, servers=servers))
    if settings.mode == "propose":
        return f"proposal {proposal.id}: {servers} servers, {proposal.cost_per_month:.2f} a month: {wanted.why}"
    ordered = accept(connection, settings, proposal.id)
    return f"{', '.join(one.key for one in ordered)} are asked for: {wanted.why}"


def lapse(connection: Connection, wanted: Collection[str | None], settings: ProvisioningSettings) -> list[str]:
    """End the proposals for pools for which none is `wanted` any more, when their cool-down is over: nobody is to order what has no use. Says what was done."""
    now = database_now(connection)
    over = [one for one in undecided(connection) if one.pool not in wanted and now - one.made_at >= dt.timedelta(minutes=settings.cool_down_minutes)]
    for one in over:
        connection.execute(sa.update(_T).where(_T.id == one.id, _T.state == OPEN).values(state=LAPSED, decided_at=now))
    return [f"proposal {one.id} has lapsed: its {one.servers} servers are not wanted any more" for one in over]


def _same(connection: Connection, parts: Parts, wanted: Wanted) -> Proposal | None:
    """The open proposal that says what one for these would say: so many servers of this pool at this price. What it says of the reason is as of its day."""
    cost = _cost_per_month(connection, parts, wanted)
    of_pool = [one for one in undecided(connection) if one.pool == wanted.pool]
    return next((one for one in of_pool if one.servers == wanted.servers and math.isclose(one.cost_per_month, cost, abs_tol=0.005)), None)


def _cost_per_month(connection: Connection, parts: Parts, wanted: Wanted) -> float:
    return wanted.servers * budget.HOURS_PER_MONTH * next_cost(connection, parts)


def missing(
    wanted: Wanted, provisions: Sequence[Provision], last: dt.datetime | None, cost_per_hour: float, settings: ProvisioningSettings, now: dt.datetime
) -> tuple[int, str]:
    """How many servers are to be proposed or ordered now, or 0 and why none. `last` is when that was done for this pool before.

    No more are ordered than may be made: those that are refused would be missing at once again, and be ordered after each cool-down.
    """
    if settings.mode == "off":
        return 0, "provisioning.mode is off"
    if wanted.servers <= 0:
        return 0, "no servers are wanted"
    servers = lacking(wanted, provisions)
    if servers <= 0:
        return 0, f"{wanted.servers} servers are wanted, and {wanted.servers - servers} are coming"
    if last is not None and now - last < dt.timedelta(minutes=settings.cool_down_minutes):
        return 0, f"{servers} more servers are wanted; the last proposal or order was at {last:%H:%M:%S} UTC, and provisioning.cool_down_minutes is not over"
    if settings.mode == "auto" and (most := budget.allowed(provisions, cost_per_hour, settings, now)) < servers:
        return most, "" if most else f"{servers} more servers are wanted, and provisioning.budget and provisioning.most allow none"
    return servers, ""


def lacking(wanted: Wanted, provisions: Sequence[Provision]) -> int:
    """How many of those that are wanted are not on their way; negative if there are more."""
    return wanted.servers - sum(_counts(one, wanted) for one in provisions)


def _counts(one: Provision, wanted: Wanted) -> bool:
    """Whether this server is one of those that are wanted, and on its way."""
    if one.pool != wanted.pool:
        return False
    if wanted.as_of is None:
        return one.state in MAKING
    return one.state in MAKING | IN_SERVICE and one.requested_at > wanted.as_of


def last_action(connection: Connection, pool: str | None) -> dt.datetime | None:
    """When servers of a pool were last proposed, or asked for."""
    asked = models.Provision
    moments = [
        connection.execute(sa.select(sa.func.max(_T.made_at)).where(_T.pool.is_not_distinct_from(pool))).scalar_one(),
        connection.execute(sa.select(sa.func.max(asked.requested_at)).where(asked.pool.is_not_distinct_from(pool))).scalar_one(),
    ]
    return max((moment for moment in moments if moment is not None), default=None)
