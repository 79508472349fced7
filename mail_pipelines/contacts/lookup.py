"""Everything known of one address, for the person who asks "does she get our mail, and why not?". Reads only."""

from __future__ import annotations

import datetime as dt
from dataclasses import dataclass, field
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from mail_pipelines.contacts.addresses import mask, parse
from mail_pipelines.database.models import Brand, Campaign, Contact, ContactList, Delivery, DeliveryEvent, State, Subscription, Suppression
from mail_pipelines.errors import MailPipelinesError

RECENT_DELIVERIES = 20
# Events of no campaign of ours: bounces in another system, before the contact was moved here (`migration.history`).
NO_CAMPAIGN = 0


class UnknownContact(MailPipelinesError):
    """No contact has this address. The message masks it."""


@dataclass(frozen=True)
class ListMembership:
    list_key: str
    subscribed: bool
    source: str
    changed_at: dt.datetime


@dataclass(frozen=True)
class SuppressedAs:
    """`of` is the address or the domain, `where` is all, or the brand or list by name."""

    of: str
    where: str
    reason: str
    created_at: dt.datetime


@dataclass(frozen=True)
class PastDelivery:
    campaign_key: str
    state: State
    attempt: int
    reply: str


@dataclass(frozen=True)
class PastBounce:
    """A bounce in another system; `kind` is hard, soft or complaint."""

    kind: str
    reply: str
    occurred_at: dt.datetime


@dataclass(frozen=True)
class Profile:
    """One address: `contact_id` and what hangs on it are None or empty if only a suppression is known. Deliveries and bounces are newest first."""

    address: str
    contact_id: int | None
    provider: str | None
    time_zone: str | None
    created_at: dt.datetime | None
    attributes: dict[str, Any]
    lists: list[ListMembership]
    suppressions: list[SuppressedAs]
    deliveries: list[PastDelivery]
    bounces: list[PastBounce] = field(default_factory=list)


def contact_id_of(connection: Connection, email: str) -> int:
    """The id of the contact with this address. Raises `AddressError` or `UnknownContact`."""
    address = parse(email)
    found = connection.execute(sa.select(Contact.id).where(Contact.address_hash == address.hash)).scalar_one_or_none()
    if found is None:
        raise UnknownContact(f"there is no contact {mask(address.address)}")
    return found


def profile(connection: Connection, email: str) -> Profile:
    """What is known of an address. Raises `AddressError`, and `UnknownContact` if nothing is."""
    address = parse(email)
    suppressions = _suppressions(connection, address.hash, address.domain)
    contact = connection.execute(
        sa.select(Contact.id, Contact.provider, Contact.time_zone, Contact.created_at, Contact.attributes).where(Contact.address_hash == address.hash)
    ).one_or_none()
    if contact is None:
        if not suppressions:
            raise UnknownContact(f"nothing is known of {mask(address.address)}")
        return Profile(address.address, None, None, None, None, {}, [], suppressions, [])
    return Profile(
        address.address,
        contact.id,
        contact.provider,
        contact.time_zone,
        contact.created_at,
        contact.attributes,
        _lists(connection, contact.id),
        suppressions,
        _deliveries(connection, contact.id),
        _bounces(connection, contact.id),
    )


def _lists(connection: Connection, contact_id: int) -> list[ListMembership]:
    query = (
        sa.select(ContactList.key, Subscription.subscribed, Subscription.source, Subscription.changed_at)
        .join(ContactList, ContactList.id == Subscription.list_id)
        .where(Subscription.contact_id == contact_id)
        .order_by(ContactList.key)
    )
    return [ListMembership(*row) for row in connection.execute(query)]


def _suppressions(connection: Connection, address_hash: bytes, domain: str) -> list[SuppressedAs]:
    where = sa.case((Suppression.scope_kind == "brand", Brand.name), (Suppression.scope_kind == "list", ContactList.name), else_="")
    query = (
        sa.select(Suppression.domain, Suppression.scope_kind, where.label("name"), Suppression.reason, Suppression.created_at)
        .outerjoin(Brand, sa.and_(Suppression.scope_kind == "brand", Brand.id == Suppression.scope_id))
        .outerjoin(ContactList, sa.and_(Suppression.scope_kind == "list", ContactList.id == Suppression.scope_id))
        .where(sa.or_(Suppression.address_hash == address_hash, Suppression.domain == domain))
        .order_by(Suppression.id)
    )
    return [
        SuppressedAs(row.domain or "address", f"{row.scope_kind} {row.name or ''}".strip(), row.reason, row.created_at) for row in connection.execute(query)
    ]


def _deliveries(connection: Connection, contact_id: int) -> list[PastDelivery]:
    query = (
        sa.select(Campaign.key, Delivery.state, Delivery.attempt, Delivery.code, Delivery.enhanced, Delivery.reason)
        .join(Campaign, Campaign.id == Delivery.campaign_id)
        .where(Delivery.contact_id == contact_id)
        .order_by(Delivery.campaign_id.desc())
        .limit(RECENT_DELIVERIES)
    )
    return [
        PastDelivery(row.key, State(row.state), row.attempt, " ".join(str(part) for part in (row.code, row.enhanced, row.reason) if part))
        for row in connection.execute(query)
    ]


def _bounces(connection: Connection, contact_id: int) -> list[PastBounce]:
    event = DeliveryEvent
    query = sa.select(event.reason, event.text, event.occurred_at).where(event.contact_id == contact_id, event.campaign_id == NO_CAMPAIGN)
    rows = connection.execute(query.order_by(event.occurred_at.desc(), event.id).limit(RECENT_DELIVERIES))
    return [PastBounce(row.reason, row.text or "", row.occurred_at) for row in rows]
