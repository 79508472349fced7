"""What people refused, as events for a source: subscriptions that ended, and suppressed addresses.

An open is told to who knows the person at that time. A refusal holds for whoever learns of the person later, too: a source that brings somebody is told what
that person refused before (`of_newcomers`), in the transaction that links the two, so that nobody looks for it afterwards.

What belongs here: which refusals there are, and their numbers as events. What does not: from where they are read on (`feeds`).
"""

from __future__ import annotations

import dataclasses
import datetime as dt
import hashlib
from collections.abc import Callable, Collection
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from mail_pipelines.contacts.sets import slices
from mail_pipelines.database.models import Brand, Contact, ContactList, Subscription, Suppression
from mail_pipelines.sources import outbox
from mail_pipelines.sources.declaration import Told, WriteBack
from mail_pipelines.sources.links import GONE_SOURCE
from mail_pipelines.sources.outbox import Item

People = sa.Select[*tuple[Any, ...]]


def unsubscribes(people: People, since: dt.datetime) -> People:
    """Subscriptions of `people` (a query with `Contact` in it) that ended by their act or somebody's here. Where a record was gone, nobody left."""
    ended = Subscription
    columns = people.with_only_columns(ended.contact_id, ended.list_id, ended.changed_at, ContactList.key)
    found = columns.join(ended, ended.contact_id == Contact.id).join(ContactList, ContactList.id == ended.list_id)
    return found.where(sa.not_(ended.subscribed), ended.source != GONE_SOURCE, ended.changed_at >= since)


def unsubscribe(row: Any) -> Item:
    """The event of a row of `unsubscribes`."""
    return Item("unsubscribe", _number(row.contact_id, row.list_id, row.changed_at), row.contact_id, row.changed_at, row.changed_at, {"list": row.key})


def _number(contact_id: int, list_id: int, changed_at: dt.datetime) -> int:
    """The number of the end of a subscription, which has none: by whose, of which list and when."""
    text = f"{contact_id}:{list_id}:{changed_at.isoformat()}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big", signed=True)


def suppressions(people: People, since: dt.datetime) -> People:
    """Suppressed addresses of `people`; a domain, or an address that nobody has, is nobody's."""
    said = Suppression
    list_key, brand_key = ContactList.key.label("list_key"), Brand.key.label("brand_key")
    columns = people.with_only_columns(said.id, Contact.id.label("contact_id"), said.created_at, said.reason, said.scope_kind, list_key, brand_key)
    found = (
        columns.join(said, said.address_hash == Contact.address_hash)
        .outerjoin(ContactList, sa.and_(said.scope_kind == "list", ContactList.id == said.scope_id))
        .outerjoin(Brand, sa.and_(said.scope_kind == "brand", Brand.id == said.scope_id))
    )
    return found.where(said.created_at >= since)


def suppression(row: Any) -> Item:
    """The event of a row of `suppressions`."""
    name = row.list_key or row.brand_key
    scope = f"{row.scope_kind} {name}" if name else row.scope_kind
    return Item("suppression", row.id, row.contact_id, row.created_at, row.created_at, {"reason": row.reason, "scope": scope, "list": row.list_key})


KINDS: dict[Told, tuple[Callable[[People, dt.datetime], People], Callable[[Any], Item]]] = {
    "unsubscribes": (unsubscribes, unsubscribe),
    "suppressions": (suppressions, suppression),
}


def of_newcomers(connection: Connection, source: str, wanted: WriteBack, own: str | None, newcomers: People, now: dt.datetime) -> None:
    """Take up what those refused whom the source did not know until `now` (`links.Links.newcomers`). `own` as in `of_list`."""
    if connection.execute(newcomers.limit(1)).first() is None:
        return
    for told, (query, item) in KINDS.items():
        if told in wanted.what:
            items = [dataclasses.replace(item(row), recorded_at=now) for row in connection.execute(query(newcomers, wanted.begin))]
            outbox.add(connection, source, of_list(items, own))


def of_list(items: Collection[Item], own: str | None) -> list[Item]:
    """Of events those that are of no list, or of the one with the key `own`; all if it is None."""
    return [item for item in items if own is None or item.facts.get("list") in (None, own)]


def learned(connection: Connection, source: str, address_hashes: Collection[bytes], now: dt.datetime) -> None:
    """What the source itself has said just now (suppressions of these addresses, and subscriptions that ended by them) it need not be told."""
    for some in slices(address_hashes):
        suppressed = sa.select(Suppression.id).where(Suppression.address_hash.in_(some), Suppression.created_at == now)
        items = [Item("suppression", number, outbox.NOBODY, now, now, {}) for number in connection.execute(suppressed).scalars()]
        ended = (
            sa.select(Subscription.contact_id, Subscription.list_id, Subscription.changed_at)
            .join(Contact, Contact.id == Subscription.contact_id)
            .where(Contact.address_hash.in_(some), sa.not_(Subscription.subscribed), Subscription.changed_at == now)
        )
        rows = connection.execute(ended).tuples().all()
        items += [Item("unsubscribe", _number(contact_id, list_id, at), contact_id, at, at, {}) for contact_id, list_id, at in rows]
        outbox.add(connection, source, items, outbox.TOLD)
