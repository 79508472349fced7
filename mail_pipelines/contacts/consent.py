"""Who must not be mailed: suppressions, unsubscribing, erasure, and the test for them that every freeze and claim makes.

Consent is decided by the database at the time of use, never by a snapshot. Nothing here lifts a suppression or subscribes
anybody: that takes the contact's own act. A suppression keeps the address's hash only, so it outlives the contact.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from mail_pipelines.contacts import changes
from mail_pipelines.contacts.addresses import normal_domain
from mail_pipelines.contacts.sets import insert_if_absent, slices
from mail_pipelines.database.models import Contact, ContactList, SourceContact, Subscription, Suppression, SyncDeadLetter, SyncOutbox
from mail_pipelines.errors import MailPipelinesError

ScopeKind = Literal["all", "brand", "list"]
# From weak to strong: an address suppressed twice in a scope keeps the stronger reason, so that lifting a bounce never lifts an opt-out.
REASONS = ("bounce", "manual", "unsubscribe", "complaint", "erased")
# Those that the person has said.
OWN_WORD = ("unsubscribe", "complaint")


class ConsentError(MailPipelinesError):
    """A suppression or unsubscription that cannot be recorded as given."""


@dataclass(frozen=True)
class Scope:
    """What a suppression covers: everything, one brand or one list. `id` is 0 for all."""

    kind: ScopeKind = "all"
    id: int = 0

    def __post_init__(self) -> None:
        if self.kind not in ("all", "brand", "list") or (self.kind == "all") != (self.id == 0):
            raise ConsentError(f"scope {self.kind!r} with id {self.id}: expected 'all' with 0, or 'brand' or 'list' with the id of one")


ALL = Scope()


def campaign_scopes(brand_id: int, list_id: int | None) -> list[Scope]:
    """The scopes whose suppressions count for a campaign of this brand (and list, if its unsubscribe link ends one)."""
    return [ALL, Scope("brand", brand_id), *([Scope("list", list_id)] if list_id else [])]


def suppressed_clause(address_hash: sa.ColumnElement[Any] | Any, domain: sa.ColumnElement[Any] | Any, scopes: Sequence[Scope]) -> sa.ColumnElement[bool]:
    """True for a row whose address or exact domain is suppressed in one of the scopes.

    `address_hash` and `domain` are columns of the outer query. Each test is one look-up in a unique index of `suppressions`
    per row, for 500 rows as for a million.
    """
    in_scope = sa.or_(*(sa.and_(Suppression.scope_kind == scope.kind, Suppression.scope_id == scope.id) for scope in scopes))
    by_address = sa.select(sa.literal(1)).select_from(Suppression).where(Suppression.address_hash == address_hash, in_scope)
    by_domain = sa.select(sa.literal(1)).select_from(Suppression).where(Suppression.domain == domain, in_scope)
    return sa.or_(by_address.exists(), by_domain.exists())


def suppress(
    connection: Connection,
    address_hashes: Iterable[bytes] | Mapping[bytes, dt.datetime],
    *,
    reason: str,
    scope_kind: ScopeKind = "all",
    scope_id: int = 0,
    now: dt.datetime,
) -> int:
    """Suppress addresses by hash; returns how many were not suppressed in this scope before. Doing it again changes nothing.

    A mapping says since when each has been suppressed elsewhere; of the others it is since `now`.
    """
    since = address_hashes if isinstance(address_hashes, Mapping) else dict.fromkeys(address_hashes, now)
    return _suppress(connection, "address_hash", since, reason, Scope(scope_kind, scope_id))


def suppress_domain(connection: Connection, domain: str, *, reason: str, scope_kind: ScopeKind = "all", scope_id: int = 0, now: dt.datetime) -> bool:
    """Suppress every address of exactly this domain; false if it was already. Raises `ConsentError` if it is no domain."""
    try:
        normal = normal_domain(domain.strip())
    except ValueError as error:
        raise ConsentError(f"{domain!r} is no domain: {error}") from None
    return _suppress(connection, "domain", {normal: now}, reason, Scope(scope_kind, scope_id)) == 1


def _suppress(connection: Connection, column: str, since: Mapping[Any, dt.datetime], reason: str, scope: Scope) -> int:
    if reason not in REASONS:
        raise ConsentError(f"reason {reason!r} is not known; expected one of {', '.join(REASONS)}")
    weaker = REASONS[: REASONS.index(reason)]
    target = Suppression.__table__.c[column]
    added = 0
    for chosen in slices(since):
        rows = [{column: value, "scope_kind": scope.kind, "scope_id": scope.id, "reason": reason, "created_at": since[value]} for value in chosen]
        added += connection.execute(insert_if_absent(Suppression), rows).rowcount
        if weaker:
            connection.execute(
                sa.update(Suppression)
                .where(target.in_(chosen), Suppression.scope_kind == scope.kind, Suppression.scope_id == scope.id, Suppression.reason.in_(weaker))
                .values(reason=reason)
            )
    return added


def unsubscribe(connection: Connection, contact_ids: Collection[int], *, scope: ScopeKind, scope_id: int = 0, now: dt.datetime) -> int:
    """End the contacts' subscriptions in the scope and suppress their addresses there; returns how many of the contacts exist.

    The suppression keeps a person who was not on the list, or whose contact is made anew, from being mailed in its name.
    """
    ended = Scope(scope, scope_id)
    found = 0
    for chosen in slices(contact_ids):
        contacts = connection.execute(sa.select(Contact.id, Contact.address_hash).where(Contact.id.in_(chosen))).all()
        if ended.kind == "list":
            # So that a later import finds the refusal, even if the contact never was on the list.
            refusal = sa.select(
                Contact.id,
                sa.literal(ended.id),
                sa.literal(False),
                sa.literal("unsubscribe"),
                sa.literal(now, Subscription.changed_at.type),
            ).where(Contact.id.in_(chosen))
            connection.execute(insert_if_absent(Subscription).from_select(["contact_id", "list_id", "subscribed", "source", "changed_at"], refusal))
        connection.execute(
            sa.update(Subscription)
            .where(Subscription.contact_id.in_(chosen), Subscription.subscribed, *_lists_in(ended))
            .values(subscribed=False, source="unsubscribe", changed_at=now)
        )
        suppress(connection, [row.address_hash for row in contacts], reason="unsubscribe", scope_kind=ended.kind, scope_id=ended.id, now=now)
        changes.record(connection, [row.id for row in contacts], "upsert", now=now)
        found += len(contacts)
    return found


def _lists_in(scope: Scope) -> list[sa.ColumnElement[bool]]:
    if scope.kind == "list":
        return [Subscription.list_id == scope.id]
    if scope.kind == "brand":
        return [Subscription.list_id.in_(sa.select(ContactList.id).where(ContactList.brand_id == scope.id))]
    return []


def erase(connection: Connection, contact_id: int, *, now: dt.datetime) -> bool:
    """Forget a person: the contact, its subscriptions and what ties it to external sources go, the suppression of the address stays.

    False if there is no such contact.

    The ledger, the events and their sums keep the number of the contact, which then names nobody.
    """
    address_hash = connection.execute(sa.select(Contact.address_hash).where(Contact.id == contact_id).with_for_update()).scalar_one_or_none()
    if address_hash is None:
        return False
    suppress(connection, [address_hash], reason="erased", now=now)
    for tied in (Subscription, SourceContact, SyncOutbox, SyncDeadLetter):
        connection.execute(sa.delete(tied).where(tied.contact_id == contact_id))
    connection.execute(sa.delete(Contact).where(Contact.id == contact_id))
    changes.record(connection, [contact_id], "delete", now=now)
    return True
