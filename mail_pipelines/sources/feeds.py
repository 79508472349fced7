"""What a source can be told, read from our own append-only events: one feed a kind, from where the reading before ended.

Rows get their time before they are committed, so one may become visible after later ones were read. Each reading therefore goes back over `OVERLAP` before
the one before it; whatever was read then is still in the outbox, and is not taken twice. What people refused stays there for good.

Bounces have no time of their own recording (the send path writes them), so they are found by campaign: where the counter of bounced rows has moved, all
bounces of the campaign are read again.
"""

from __future__ import annotations

import datetime as dt
import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection
from sqlalchemy.orm import InstrumentedAttribute

from mail_pipelines.database.engine import database_now
from mail_pipelines.database.models import (
    Brand,
    Campaign,
    CampaignCounter,
    Contact,
    ContactChange,
    ContactList,
    DeliveryEvent,
    EngagementEvent,
    Link,
    State,
    Subscription,
    Suppression,
)
from mail_pipelines.delivery import events
from mail_pipelines.sources.declaration import Told
from mail_pipelines.sources.links import GONE_SOURCE

OVERLAP = dt.timedelta(minutes=15)
# So long are bounces remembered as told; one that is read again later goes out once more, with the same key.
BOUNCES_KEPT = dt.timedelta(days=60)
_CHUNK = 5_000
_BOUNCES = (events.BOUNCED, events.BOUNCE_REPORT, events.LATE_REFUSAL)


@dataclass(frozen=True)
class Item:
    """One event; see `SyncOutbox`."""

    kind: str
    event_id: int
    contact_id: int
    occurred_at: dt.datetime
    recorded_at: dt.datetime
    facts: dict[str, Any]


@dataclass(frozen=True)
class Position:
    """Where a feed was read to: when (database time), the highest number of a suppression, and how many bounced rows each campaign had."""

    read_at: dt.datetime | None = None
    last: int = 0
    bounced: dict[int, int] = field(default_factory=dict)


def here(connection: Connection) -> Position:
    """Where a reading that begins now will have read to; whatever comes meanwhile is for the next one."""
    last = connection.execute(sa.select(sa.func.coalesce(sa.func.max(Suppression.id), 0))).scalar_one()
    return Position(database_now(connection), last, bounced(connection))


Feed = Callable[[Connection, Position, dt.datetime], Iterator[list[Item]]]


def subscription_event(contact_id: int, list_id: int, changed_at: dt.datetime) -> int:
    """The number of the end of a subscription, which has none: by whose, of which list and when."""
    text = f"{contact_id}:{list_id}:{changed_at.isoformat()}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big", signed=True)


def bounced(connection: Connection) -> dict[int, int]:
    """How many rows of each campaign bounced."""
    total = sa.func.sum(CampaignCounter.count).cast(sa.BigInteger)
    query = sa.select(CampaignCounter.campaign_id, total).where(CampaignCounter.state == State.BOUNCED).group_by(CampaignCounter.campaign_id)
    return {campaign_id: count for campaign_id, count in connection.execute(query).tuples() if count}


def _again(time: InstrumentedAttribute[dt.datetime], position: Position, since: dt.datetime) -> sa.ColumnElement[bool]:
    return time >= (since if position.read_at is None else max(since, position.read_at - OVERLAP))


def _stream(connection: Connection, query: sa.Select[*tuple[Any, ...]], item: Callable[[Any], Item]) -> Iterator[list[Item]]:
    for rows in connection.execution_options(stream_results=True, yield_per=_CHUNK).execute(query).partitions():
        yield [item(row) for row in rows]


def _engagement(kind: str) -> Feed:
    """What people did; what machines fetched tells nothing of anybody."""

    def item(row: Any) -> Item:
        return Item(kind, row.id, row.contact_id, row.occurred_at, row.recorded_at, {"campaign": row.key, "url": row.url})

    def read(connection: Connection, position: Position, since: dt.datetime) -> Iterator[list[Item]]:
        event = EngagementEvent
        query = (
            sa.select(event.id, event.contact_id, event.occurred_at, event.recorded_at, Campaign.key, Link.url)
            .outerjoin(Campaign, Campaign.id == event.campaign_id)
            .outerjoin(Link, Link.id == event.link_id)
            .where(event.kind == kind, sa.not_(event.machine), _again(event.recorded_at, position, since))
        )
        return _stream(connection, query, item)

    return read


def _bounces(connection: Connection, position: Position, since: dt.datetime) -> Iterator[list[Item]]:
    event = DeliveryEvent

    def item(row: Any) -> Item:
        facts = {"campaign": row.key, "code": row.code, "enhanced": row.enhanced, "reason": row.reason, "text": row.text}
        return Item("bounce", row.id, row.contact_id, row.occurred_at, row.occurred_at, facts)

    for campaign_id, count in bounced(connection).items():
        if position.bounced.get(campaign_id) != count:
            query = (
                sa.select(event.id, event.contact_id, event.occurred_at, Campaign.key, event.code, event.enhanced, event.reason, event.text)
                .outerjoin(Campaign, Campaign.id == event.campaign_id)
                .where(event.campaign_id == campaign_id, event.kind.in_(_BOUNCES), event.occurred_at >= since)
            )
            yield from _stream(connection, query, item)


def _unsubscribes(connection: Connection, position: Position, since: dt.datetime) -> Iterator[list[Item]]:
    """Subscriptions that ended by the person's act or somebody's here, as the change feed says. Where a record was gone, nobody left."""

    def item(row: Any) -> Item:
        number = subscription_event(row.contact_id, row.list_id, row.changed_at)
        return Item("unsubscribe", number, row.contact_id, row.changed_at, row.changed_at, {"list": row.key})

    ended = Subscription
    query = (
        sa.select(ended.contact_id, ended.list_id, ended.changed_at, ContactList.key)
        .join(ContactList, ContactList.id == ended.list_id)
        .where(sa.not_(ended.subscribed), ended.source != GONE_SOURCE, ended.changed_at >= since)
    )
    if position.read_at is not None:
        # Not by the time of the end: what comes from another system has ended long ago.
        changed = sa.select(ContactChange.contact_id).where(ContactChange.created_at >= position.read_at - OVERLAP).distinct().subquery()
        query = query.join(changed, changed.c.contact_id == ended.contact_id)
    return _stream(connection, query, item)


def _suppressions(connection: Connection, position: Position, since: dt.datetime) -> Iterator[list[Item]]:
    """Addresses of contacts; a domain, or an address that nobody has, is nobody's."""

    def item(row: Any) -> Item:
        name = row.list_key or row.brand_key
        scope = f"{row.scope_kind} {name}" if name else row.scope_kind
        return Item("suppression", row.id, row.contact_id, row.created_at, row.created_at, {"reason": row.reason, "scope": scope, "list": row.list_key})

    said = Suppression
    query = (
        sa.select(
            said.id,
            Contact.id.label("contact_id"),
            said.created_at,
            said.reason,
            said.scope_kind,
            ContactList.key.label("list_key"),
            Brand.key.label("brand_key"),
        )
        .join(Contact, Contact.address_hash == said.address_hash)
        .outerjoin(ContactList, sa.and_(said.scope_kind == "list", ContactList.id == said.scope_id))
        .outerjoin(Brand, sa.and_(said.scope_kind == "brand", Brand.id == said.scope_id))
        .where(said.created_at >= since)
    )
    if position.read_at is not None:
        # What comes from another system has a time long ago; it is found by its number.
        query = query.where(sa.or_(said.id > position.last, said.created_at >= position.read_at - OVERLAP))
    return _stream(connection, query, item)


FEEDS: dict[Told, Feed] = {
    "opens": _engagement("open"),
    "clicks": _engagement("click"),
    "bounces": _bounces,
    "unsubscribes": _unsubscribes,
    "suppressions": _suppressions,
}
