"""Servers that would help: proposing them, and acting on it.

What belongs here: what is asked for when capacity runs short, and when again. What does not: how many are wanted, which the capacity plan says, and making them
(`making`).
"""

from __future__ import annotations

import datetime as dt
from dataclasses import dataclass

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from mail_pipelines.config import ProvisioningSettings
from mail_pipelines.database import models
from mail_pipelines.database.engine import database_now
from mail_pipelines.errors import nearest
from mail_pipelines.provisioning import budget, store
from mail_pipelines.provisioning.interfaces import Parts, ProvisioningError
from mail_pipelines.provisioning.states import MAKING
from mail_pipelines.provisioning.store import Provision

OPEN, ACCEPTED, SUPERSEDED = "open", "accepted", "superseded"
_LONGEST = 500
_T = models.ProvisionProposal


@dataclass(frozen=True)
class Wanted:
    """`servers` more than there are and are being made; why, and what they would do for the campaigns."""

    servers: int
    why: str
    effect: str = ""


@dataclass(frozen=True)
class Proposal:
    id: int
    state: str
    servers: int
    why: str
    effect: str
    cost_per_month: float
    made_at: dt.datetime
    decided_at: dt.datetime | None


def all_proposals(connection: Connection, *, last: int = 20) -> list[Proposal]:
    """The newest first."""
    columns = [getattr(_T, name) for name in Proposal.__dataclass_fields__]
    return [Proposal(**row._mapping) for row in connection.execute(sa.select(*columns).order_by(_T.id.desc()).limit(last))]


def find(connection: Connection, proposal_id: int) -> Proposal:
    for proposal in all_proposals(connection, last=1000):
        if proposal.id == proposal_id:
            return proposal
    raise ProvisioningError(f"there is no proposal {proposal_id}; {nearest(proposal_id, (str(known.id) for known in all_proposals(connection)))}")


def propose(connection: Connection, parts: Parts, wanted: Wanted) -> Proposal:
    """Store a proposal; it takes the place of one that nobody has decided."""
    now = database_now(connection)
    connection.execute(sa.update(_T).where(_T.state == OPEN).values(state=SUPERSEDED, decided_at=now))
    cost = wanted.servers * budget.HOURS_PER_MONTH * next_cost(connection, parts)
    texts = {"why": wanted.why[:_LONGEST], "effect": wanted.effect[:_LONGEST]}
    result = connection.execute(sa.insert(_T).values(state=OPEN, servers=wanted.servers, cost_per_month=cost, made_at=now, **texts))
    assert result.inserted_primary_key is not None
    return find(connection, result.inserted_primary_key[0])


def next_cost(connection: Connection, parts: Parts) -> float:
    """What a server of the first source costs that is not set aside."""
    aside = store.set_aside(connection)
    return next((source.cost_per_hour for source in parts.sources if source.name not in aside), 0.0)


def accept(connection: Connection, settings: ProvisioningSettings, proposal_id: int) -> list[Provision]:
    """Ask for the servers of a proposal. Raises `ProvisioningError` if it was decided already."""
    proposal = find(connection, proposal_id)
    swap = sa.update(_T).where(_T.id == proposal_id, _T.state == OPEN).values(state=ACCEPTED, decided_at=database_now(connection))
    if connection.execute(swap).rowcount != 1:
        raise ProvisioningError(f"proposal {proposal_id} is {proposal.state}; `mail-pipelines server proposals` has the open one")
    return [store.request(connection, settings, proposal.why, proposal_id=proposal_id) for _ in range(proposal.servers)]


def short(connection: Connection, parts: Parts, wanted: Wanted) -> str:
    """Act on a shortage as `provisioning.mode` says, unless that was done lately or is being done; what was done, in words, or why nothing."""
    settings, now = parts.settings.provisioning, database_now(connection)
    if settings.mode == "off":
        return "provisioning.mode is off"
    if wanted.servers <= 0:
        return "no servers are wanted"
    # All that act on a shortage wait for each other here.
    making = [one for one in store.all_provisions(connection, lock=True) if one.state in MAKING]
    servers = wanted.servers - len(making)
    if servers <= 0:
        return f"{wanted.servers} servers are wanted, and {len(making)} are being made"
    last = last_action(connection)
    if last is not None and now - last < dt.timedelta(minutes=settings.cool_down_minutes):
        return f"{servers} more servers are wanted; the last proposal or order was at {last:%H:%M:%S} UTC, and provisioning.cool_down_minutes is not over"
    proposal = propose(connection, parts, Wanted(servers, wanted.why, wanted.effect))
    if settings.mode == "propose":
        return f"proposal {proposal.id}: {servers} servers, {proposal.cost_per_month:.2f} a month: {wanted.why}"
    ordered = accept(connection, settings, proposal.id)
    return f"{', '.join(one.key for one in ordered)} are asked for: {wanted.why}"


def last_action(connection: Connection) -> dt.datetime | None:
    """When servers were last proposed, or asked for."""
    moments = [
        connection.execute(sa.select(_T.made_at).order_by(_T.id.desc()).limit(1)).scalar_one_or_none(),
        connection.execute(sa.select(models.Provision.requested_at).order_by(models.Provision.id.desc()).limit(1)).scalar_one_or_none(),
    ]
    return max((moment for moment in moments if moment is not None), default=None)
