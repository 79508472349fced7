"""Campaigns, contacts and ledgers that tests start from, written in bulk."""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import sqlalchemy as sa

from mail_pipelines.campaigns import states, store
from mail_pipelines.campaigns.campaign import Campaign, Definition
from mail_pipelines.campaigns.shards import shard_of, shards_for
from mail_pipelines.config import Settings
from mail_pipelines.contacts import changes
from mail_pipelines.contacts.addresses import parse
from mail_pipelines.contacts.providers import provider_of
from mail_pipelines.database import models
from mail_pipelines.database.engine import reading, transact
from mail_pipelines.database.models import Contact, Delivery, State
from mail_pipelines.delivery import counters
from mail_pipelines.segments import saved
from mail_pipelines.segments.snapshots import refresh_contacts, refresh_engagement

NOW = dt.datetime(2026, 3, 2, 9, 0, tzinfo=dt.UTC)
DOMAINS = ("gmail.com", "outlook.com", "yahoo.com", "web.de", "example.net")


def make_campaign(
    engine: sa.Engine, name: str = "Spring sale", *, state: str = "draft", now: dt.datetime = NOW, held: str | None = None, **changes: Any
) -> Campaign:
    """A campaign in any state, without the work that leads there. `changes` are fields of the definition, or columns of the row; `held` is why it is."""
    fields = {field: value for field, value in changes.items() if field in Definition.__dataclass_fields__}
    columns = {field: value for field, value in changes.items() if field not in fields}
    definition = replace(Definition(name=name, key=name.lower().replace(" ", "-"), include=("everybody",)), **fields)

    def work(connection: sa.Connection) -> Campaign:
        store.create(connection, definition, now)
        connection.execute(sa.update(models.Campaign).where(models.Campaign.key == definition.key).values(state=state, **columns))
        if held is not None:
            assert states.hold(connection, store.load(connection, definition.key).id, held, now)
        return store.load(connection, definition.key)

    return transact(engine, work)


def load(engine: sa.Engine, key: str = "spring-sale") -> Campaign:
    with reading(engine) as connection:
        return store.load(connection, key)


def contact_rows(numbers: Iterable[int]) -> list[dict[str, Any]]:
    rows = []
    for number in numbers:
        address = parse(f"person{number}@{DOMAINS[number % len(DOMAINS)]}")
        rows.append(
            {
                "id": number,
                "email": address.email,
                "address": address.address,
                "address_hash": address.hash,
                "domain": address.domain,
                "provider": provider_of(address.domain),
                "attributes": {"number": number},
                "created_at": NOW,
                "updated_at": NOW,
            }
        )
    return rows


def add_contacts(engine: sa.Engine, first: int, last: int) -> None:
    """Contacts `first` to `last`, each with the field `number`; the next refresh of the snapshot sees them."""
    rows = contact_rows(range(first, last + 1))

    def work(connection: sa.Connection) -> None:
        connection.execute(sa.insert(Contact), rows)
        changes.record(connection, [row["id"] for row in rows], "upsert", now=NOW)

    transact(engine, work)


def fill_ledger(engine: sa.Engine, campaign_id: int, counts: dict[State, int], *, sort_key: int = 0, now: dt.datetime = NOW) -> None:
    """A ledger with so many rows in each state, with its counters; recipients need not exist."""
    total = sum(counts.values())
    shards = shards_for(total)
    states = [state for state, count in counts.items() for _ in range(count)]
    rows, moves = [], {}
    for contact_id, state in enumerate(states, start=1):
        place = (shard_of(contact_id, shards), ("google", "other", "yahoo")[contact_id % 3], state, "")
        moves[place] = moves.get(place, 0) + 1
        rows.append(
            {
                "campaign_id": campaign_id,
                "contact_id": contact_id,
                "address_hash": contact_id.to_bytes(16, "big"),
                "shard": place[0],
                "provider": place[1],
                "state": int(state),
                "sort_key": sort_key,
                "attempt": 0,
            }
        )

    def work(connection: sa.Connection) -> None:
        if rows:
            connection.execute(sa.insert(Delivery), rows)
        counters.add(connection, campaign_id, 3, moves, now)
        counts = {"matched": total, "audience": total, "excluded": {}}
        connection.execute(sa.update(models.Campaign).where(models.Campaign.id == campaign_id).values(audience_counts=counts, shards=shards))

    transact(engine, work)


def ledger_states(engine: sa.Engine, campaign_id: int) -> dict[State, int]:
    """Rows in each state, counted in the ledger."""
    query = sa.select(Delivery.state, sa.func.count()).where(Delivery.campaign_id == campaign_id).group_by(Delivery.state)
    with reading(engine) as connection:
        return {State(state): count for state, count in connection.execute(query)}


def counters_equal_ledger(engine: sa.Engine, campaign_id: int) -> bool:
    """Whether the counters say what a count of the ledger says, by shard, provider and state."""
    by = (Delivery.shard, Delivery.provider, Delivery.state)
    counter = models.CampaignCounter
    keys = (counter.shard, counter.provider, counter.state)
    with reading(engine) as connection:
        counted = {
            tuple(row[:3]): row[3] for row in connection.execute(sa.select(*by, sa.func.count()).where(Delivery.campaign_id == campaign_id).group_by(*by))
        }
        summed = connection.execute(sa.select(*keys, sa.func.sum(counter.count)).where(counter.campaign_id == campaign_id).group_by(*keys))
        return counted == {tuple(row[:3]): int(row[3]) for row in summed if row[3]}


def save_segment(engine: sa.Engine, key: str, criteria: Any) -> None:
    saved.save(engine, saved.SavedSegment(key, key, criteria), now=NOW)


def refresh_snapshots(engine: sa.Engine, settings: Settings, now: dt.datetime = NOW) -> None:
    refresh_contacts(engine, settings.snapshot_folder, now=now)
    refresh_engagement(engine, settings.snapshot_folder, now=now)


def make_people(engine: sa.Engine, settings: Settings, count: int) -> None:
    """Contacts with the field `number`, the segment `everybody`, and snapshots of both."""
    field = {"key": "number", "label": "Number", "type": "number", "created_at": NOW}
    transact(engine, lambda connection: connection.execute(sa.insert(models.Field).values(field)))
    add_contacts(engine, 1, count)
    save_segment(engine, "everybody", {"all": []})
    refresh_snapshots(engine, settings)
