"""What people refused, as events for a source: subscriptions that ended, and suppressed addresses.

An open is told to who knows the person at that time. A refusal holds for whoever learns of the person later, too: a source that brings somebody is told what
that person refused before (`of_newcomers`), in the transaction that links the two, so that nobody looks for it afterwards.

What belongs here: which refusals there are, and their numbers as events. What does not: from where they are read on (`feeds`).
"""

from __future__ import annotations

import datetime as dt
import hashlib
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from mail_pipelines.contacts.sets import slices
from mail_pipelines.database.models import Brand, Contact, ContactList, Subscription, Suppression
from mail_pipelines.sources import outbox
from mail_pipelines.sources.declaration import Told, WriteBack
from mail_pipelines.sources.links import GONE_SOURCE
from mail_pipelines.sources.outbox import Event

People = sa.Select[*tuple[Any, ...]]


def unsubscribes(people: People, since: dt.datetime, own: str | None) -> People:
    """Subscriptions of `people` (a query with `Contact` in it) that ended by their act or somebody's here: events with the list for a number.

    With `own` only those to the list of that key. Where a record was gone, nobody left.
    """
    ended, at = Subscription, Subscription.changed_at
    columns = people.with_only_columns(ended.list_id, ended.contact_id, at, at.label("recorded_at"), outbox.facts(list=ContactList.key))
    found = columns.join(ended, ended.contact_id == Contact.id).join(ContactList, ContactList.id == ended.list_id)
    return found.where(sa.not_(ended.subscribed), ended.source != GONE_SOURCE, at >= since, _of_list(own))


def unsubscribe(list_id: int, contact_id: int, changed_at: dt.datetime, recorded_at: dt.datetime, facts: str = "{}") -> Event:
    """The event of a row of `unsubscribes`. It has no number there: its own is made of whose, of which list and when."""
    text = f"{contact_id}:{list_id}:{changed_at.isoformat()}"
    number = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big", signed=True)
    return Event(number, contact_id, changed_at, recorded_at, facts)


def suppressions(people: People, since: dt.datetime, own: str | None) -> People:
    """Suppressed addresses of `people`; a domain, or an address that nobody has, is nobody's. With `own` only those of no list, or of that one."""
    said, at = Suppression, Suppression.created_at
    name = sa.func.coalesce(ContactList.key, Brand.key)
    scope = sa.case((name.is_(None), said.scope_kind), else_=said.scope_kind + " " + name)
    facts = outbox.facts(reason=said.reason, scope=scope, list=ContactList.key)
    found = (
        people.with_only_columns(said.id, Contact.id.label("contact_id"), at, at.label("recorded_at"), facts)
        .join(said, said.address_hash == Contact.address_hash)
        .outerjoin(ContactList, sa.and_(said.scope_kind == "list", ContactList.id == said.scope_id))
        .outerjoin(Brand, sa.and_(said.scope_kind == "brand", Brand.id == said.scope_id))
    )
    return found.where(at >= since, sa.or_(ContactList.key.is_(None), _of_list(own)))


def _of_list(own: str | None) -> sa.ColumnElement[bool]:
    return sa.true() if own is None else ContactList.key == own


@dataclass(frozen=True)
class Refusal:
    """A kind of events: the query of those of some people since a time (`own` as in `unsubscribes`), and what makes an event of its row."""

    kind: str
    query: Callable[[People, dt.datetime, str | None], People]
    event: Callable[..., Event] = Event


KINDS: dict[Told, Refusal] = {
    "unsubscribes": Refusal("unsubscribe", unsubscribes, unsubscribe),
    "suppressions": Refusal("suppression", suppressions),
}


def of_newcomers(connection: Connection, source: str, wanted: WriteBack, own: str | None, newcomers: People, now: dt.datetime) -> None:
    """Take up what those refused whom the source did not know until `now` (`links.Links.newcomers`). `own` is the list whose ends alone are told, if any."""
    if connection.execute(newcomers.limit(1)).first() is None:
        return
    for told, refusal in KINDS.items():
        if told in wanted.what:
            rows = connection.execute(refusal.query(newcomers, wanted.begin, own)).tuples()
            events = [refusal.event(*row)._replace(recorded_at=now) for row in rows]
            outbox.add(connection, source, refusal.kind, events)


def learned(connection: Connection, source: str, address_hashes: Collection[bytes], now: dt.datetime) -> None:
    """What the source itself has said just now (suppressions of these addresses, and subscriptions that ended by them) it need not be told."""
    for some in slices(address_hashes):
        suppressed = sa.select(Suppression.id).where(Suppression.address_hash.in_(some), Suppression.created_at == now)
        events = [Event(number, outbox.NOBODY, now, now) for number in connection.execute(suppressed).scalars()]
        outbox.add(connection, source, "suppression", events, outbox.TOLD)
        ended = (
            sa.select(Subscription.list_id, Subscription.contact_id, Subscription.changed_at)
            .join(Contact, Contact.id == Subscription.contact_id)
            .where(Contact.address_hash.in_(some), sa.not_(Subscription.subscribed), Subscription.changed_at == now)
        )
        ends = [unsubscribe(list_id, contact_id, at, at) for list_id, contact_id, at in connection.execute(ended).tuples()]
        outbox.add(connection, source, "unsubscribe", ends, outbox.TOLD)
