"""A campaign with results in the database, and the same results as plain tuples for a slow count."""

from __future__ import annotations

import datetime as dt
import random
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import sqlalchemy as sa

from mail_pipelines.campaigns.campaign import Campaign
from mail_pipelines.database import models
from mail_pipelines.database.engine import transact
from mail_pipelines.database.models import Claim, Contact, Delivery, EngagementEvent, Link, Server, State
from mail_pipelines.delivery import counters
from tests.campaigns.parts import contact_rows, load, make_campaign

START = dt.datetime(2026, 3, 2, 9, 0, tzinfo=dt.UTC)
SERVERS = {1: "alpha", 2: "beta"}
SHARDS = 4
REASONS = {
    State.DELIVERED: ("",),
    State.BOUNCED: ("invalid_recipient", "spam_content"),
    State.SUPPRESSED: ("unsubscribed",),
    State.EXPIRED: ("",),
    State.DEFERRED: ("rate_limited", "transient"),
}


@dataclass(frozen=True)
class Outcome:
    """One answer to one offer, or the end of a row without one (`server_id` 0, the centre)."""

    contact_id: int
    shard: int
    provider: str
    server_id: int
    state: State
    reason: str
    at: dt.datetime


def some_outcomes(recipients: int, *, seed: int = 5) -> list[Outcome]:
    """For each recipient up to two deferrals and then, but for a few that are left pending or deferred, an end, over 40 minutes."""
    chance = random.Random(seed)
    found = []
    for contact in contact_rows(range(1, recipients + 1)):
        at = START + dt.timedelta(seconds=chance.uniform(0, 1800))
        ends = chance.choices([State.DELIVERED, State.BOUNCED, State.SUPPRESSED, State.EXPIRED, None], [80, 4, 3, 3, 10])
        for state in [State.DEFERRED] * chance.choices([0, 1, 2], [80, 15, 5])[0] + [end for end in ends if end]:
            server = 0 if state is State.EXPIRED else chance.choice(list(SERVERS))
            found.append(Outcome(contact["id"], contact["id"] % SHARDS, contact["provider"], server, state, chance.choice(REASONS[state]), at))
            at += dt.timedelta(seconds=chance.uniform(1, 300))
    return found


def make_results(
    engine: sa.Engine, recipients: int, outcomes: Sequence[Outcome], *, excluded: dict[str, int] | None = None, state: str = "finished"
) -> Campaign:
    """Contacts, ledger, counters and minutes of the campaign `spring-sale`, as if its servers had written them."""
    excluded = excluded or {}
    counts = {"matched": recipients + sum(excluded.values()), "audience": recipients, "excluded": excluded}
    campaign = make_campaign(engine, "Spring sale", state=state, shards=SHARDS, audience_counts=counts, started_at=START)
    contacts = contact_rows(range(1, recipients + 1))
    last = {outcome.contact_id: outcome for outcome in outcomes}
    rows = [
        {
            "campaign_id": campaign.id,
            "contact_id": contact["id"],
            "address_hash": contact["address_hash"],
            "shard": contact["id"] % SHARDS,
            "provider": contact["provider"],
            "state": int(outcome.state) if outcome else int(State.PENDING),
            "sort_key": int(outcome.at.timestamp()) if outcome else 0,
            "attempt": 0,
            "variant": 0,
            "server_id": outcome.server_id if outcome else None,
            "reason": outcome.reason or None if outcome else None,
        }
        for contact in contacts
        for outcome in [last.get(contact["id"])]
    ]

    def work(connection: sa.Connection) -> None:
        connection.execute(
            sa.insert(Server),
            [{"id": number, "key": key, "kind": "catcher", "state": "active", "host": "h", "port": 1, "created_at": START} for number, key in SERVERS.items()],
        )
        if not rows:
            return
        connection.execute(sa.insert(Contact), contacts)
        connection.execute(sa.insert(Delivery), rows)
        arrived = Counter((row["shard"], row["provider"], State.PENDING, "") for row in rows)
        counters.add(connection, campaign.id, counters.CENTRE, arrived, START)
        before: dict[int, State] = {}
        moves: dict[tuple[int, dt.datetime], Counter[counters.Place]] = {}
        for outcome in outcomes:
            moved = moves.setdefault((outcome.server_id, outcome.at.replace(second=0, microsecond=0)), Counter())
            moved[outcome.shard, outcome.provider, before.get(outcome.contact_id, State.PENDING), ""] -= 1
            moved[outcome.shard, outcome.provider, outcome.state, outcome.reason] += 1
            before[outcome.contact_id] = outcome.state
        for (server_id, minute), places in moves.items():
            counters.add(connection, campaign.id, server_id, places, minute)

    transact(engine, work)
    return load(engine, campaign.key)


def add_claims(
    engine: sa.Engine, campaign_id: int, claims: Iterable[tuple[int, float, float]], *, lease_seconds: float = 120, state: str = "closed"
) -> list[int]:
    """Claims (server, begin, end; seconds after the start) of one row each; returns their ids."""
    rows = [
        {
            "id": 1_000 + number,
            "campaign_id": campaign_id,
            "shard": 0,
            "provider": "other",
            "server_id": server,
            "run_id": "r",
            "size": 1,
            "state": state,
            "incarnation": "i",
            "boot_id": "b",
            "journal_inode": 0,
            "journal_offset": 0,
            "opened_at": START + dt.timedelta(seconds=begin),
            "lease_until": START + dt.timedelta(seconds=begin + lease_seconds),
            "closed_at": START + dt.timedelta(seconds=end) if state == "closed" else None,
        }
        for number, (server, begin, end) in enumerate(claims)
    ]
    transact(engine, lambda connection: connection.execute(sa.insert(Claim), rows))
    return [int(str(row["id"])) for row in rows]


@dataclass(frozen=True)
class Reaction:
    contact_id: int
    kind: str
    at: dt.datetime
    link_id: int | None
    machine: bool


def add_reactions(engine: sa.Engine, campaign_id: int, recipients: int, *, seed: int = 6) -> list[Reaction]:
    """Opens, clicks on three links (1, 2 and 3), unsubscribes and complaints of recipients, over two days; other campaigns get some too."""
    chance = random.Random(seed)
    reactions = []
    for contact_id in range(1, recipients + 1):
        for kind in chance.choices(("open", "click", "unsubscribe", "complaint"), [60, 30, 7, 3], k=chance.randint(0, 4)):
            at = START + dt.timedelta(hours=chance.expovariate(0.2))
            link_id = chance.choice((1, 2, 3)) if kind == "click" else None
            reactions.append(Reaction(contact_id, kind, at, link_id, kind in ("open", "click") and chance.random() < 0.3))
    rows = [
        {
            "month": reaction.at.year * 100 + reaction.at.month,
            "id": number,
            "occurred_at": reaction.at,
            "recorded_at": reaction.at,
            "campaign_id": campaign_id,
            "contact_id": reaction.contact_id,
            "kind": reaction.kind,
            "link_id": reaction.link_id,
            "machine": reaction.machine,
        }
        for number, reaction in enumerate(reactions)
    ]
    others = [row | {"id": len(rows) + number, "campaign_id": campaign_id + 1} for number, row in enumerate(rows[:50])]
    links = [{"id": number, "campaign_id": campaign_id, "url": f"https://shop.test/{number}", "url_sha256": str(number)} for number in (1, 2, 3)]

    def work(connection: sa.Connection) -> None:
        connection.execute(sa.insert(Link), links)
        connection.execute(sa.insert(EngagementEvent), rows + others)

    transact(engine, work)
    return reactions


def set_campaign(engine: sa.Engine, campaign: Campaign, **values: object) -> Campaign:
    transact(engine, lambda connection: connection.execute(sa.update(models.Campaign).where(models.Campaign.id == campaign.id).values(**values)))
    return load(engine, campaign.key)
