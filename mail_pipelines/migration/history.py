"""Bans and bounces there, as suppressions and events here, a page in a transaction."""

from __future__ import annotations

import datetime as dt
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from hashlib import blake2b
from typing import Any

import sqlalchemy as sa
import sqlalchemy.orm
from sqlalchemy.engine import Connection

from mail_pipelines.contacts import consent
from mail_pipelines.contacts.addresses import AddressError, normal_domain, parse
from mail_pipelines.contacts.consent import Scope
from mail_pipelines.contacts.lists import MailingList
from mail_pipelines.contacts.lookup import NO_CAMPAIGN
from mail_pipelines.contacts.sets import insert_if_absent, slices
from mail_pipelines.database.models import Contact, DeliveryEvent, Suppression
from mail_pipelines.delivery.events import mask_addresses
from mail_pipelines.migration.source import Ban, Bounce

# The kind of an event that another system recorded, which is kept under no campaign, so that nothing here counts it.
KIND = "bounced_before"
_ENHANCED = re.compile(r"\b([245]\.\d{1,3}\.\d{1,3})\b")
_CODE = re.compile(r"(?<![\d.])([45]\d\d)(?![\d.])")
Reject = Callable[[str, str], None]


def ban(connection: Connection, page: Sequence[Ban], targets: Mapping[int, MailingList], now: dt.datetime, reject: Reject) -> int:
    """Suppress what is banned there; returns how many of the bans are suppressions here now, however strong their reason."""
    addresses: defaultdict[tuple[str, Scope], dict[bytes, dt.datetime]] = defaultdict(dict)
    asked: Counter[tuple[Scope, bytes | str]] = Counter()
    for row in page:
        scope = consent.ALL
        if row.list_id is not None:
            if row.list_id not in targets:
                reject(f"list {row.list_id}", "a ban of a list that does not exist any more")
                continue
            scope = Scope("list", targets[row.list_id].id)
        local, _, domain = row.target.rpartition("@")
        try:
            if local:
                hash_ = parse(row.target).hash
                addresses[row.reason, scope].setdefault(hash_, row.since or now)
                asked[scope, hash_] += 1
            else:
                consent.suppress_domain(connection, domain, reason=row.reason, scope_kind=scope.kind, scope_id=scope.id, now=row.since or now)
                asked[scope, normal_domain(domain.strip())] += 1
        except AddressError as error:
            reject("bans", f"address: {error.reason}")
        except (consent.ConsentError, ValueError):
            reject("bans", "neither an address nor a domain")
    for (reason, scope), since in addresses.items():
        consent.suppress(connection, since, reason=reason, scope_kind=scope.kind, scope_id=scope.id, now=now)
    return sum(times for key, times in asked.items() if key in _suppressed(connection, asked))


def _suppressed(connection: Connection, asked: Mapping[tuple[Scope, bytes | str], int]) -> set[tuple[Scope, bytes | str]]:
    found: set[tuple[Scope, bytes | str]] = set()
    columns: tuple[tuple[sa.orm.InstrumentedAttribute[Any], type], ...] = ((Suppression.address_hash, bytes), (Suppression.domain, str))
    for column, type_ in columns:
        for chosen in slices({value for _, value in asked if isinstance(value, type_)}):
            rows = connection.execute(sa.select(column, Suppression.scope_kind, Suppression.scope_id).where(column.in_(chosen)))
            found |= {(Scope(row[1], row[2]), row[0]) for row in rows}
    return found


def remember(connection: Connection, page: Sequence[Bounce], system: str, now: dt.datetime, reject: Reject) -> int:
    """Keep bounces as events of their contacts, and suppress whoever complained; returns how many of them are kept here now."""
    hashes: dict[str, bytes] = {}
    for row in page:
        try:
            hashes[row.key] = parse(row.email).hash
        except AddressError as error:
            reject("bounces", f"address: {error.reason}" if row.email else "its subscriber does not exist any more")
    contacts: dict[bytes, int] = {}
    for chosen in slices(set(hashes.values())):
        contacts |= {row[0]: row[1] for row in connection.execute(sa.select(Contact.address_hash, Contact.id).where(Contact.address_hash.in_(chosen)))}
    complained = {hashes[row.key]: row.at or now for row in page if row.kind == "complaint" and row.key in hashes}
    consent.suppress(connection, complained, reason="complaint", now=now)
    events = []
    for row in page:
        if row.key not in hashes:
            continue
        if (contact_id := contacts.get(hashes[row.key])) is None:
            reject("bounces", "there is no such contact here (erased, or in no list there)")
            continue
        events.append(_event(row, contact_id, system))
    if events:
        connection.execute(insert_if_absent(DeliveryEvent), events)
    kept: set[object] = set()
    for ids in slices({event["id"] for event in events}):
        kept.update(connection.execute(sa.select(DeliveryEvent.id).where(DeliveryEvent.id.in_(ids), DeliveryEvent.campaign_id == NO_CAMPAIGN)).scalars())
    # A file may have a row twice.
    return sum(event["id"] in kept for event in events)


def _event(row: Bounce, contact_id: int, system: str) -> dict[str, object]:
    # Without a time it is of a time before everything, always the same, so that it is known again.
    at = row.at or dt.datetime(1970, 1, 1, tzinfo=dt.UTC)
    code, enhanced = _CODE.search(row.text), _ENHANCED.search(row.text)
    digest = blake2b(f"{system}|{row.key}|{contact_id}".encode(), digest_size=8).digest()
    return {
        "month": at.year * 100 + at.month,
        "id": int.from_bytes(digest, "big") >> 1,
        "occurred_at": at,
        "server_id": None,
        "campaign_id": NO_CAMPAIGN,
        "contact_id": contact_id,
        "attempt": 0,
        "kind": KIND,
        "code": int(code[1]) if code else None,
        "enhanced": enhanced[1] if enhanced else None,
        "reason": row.kind,
        "text": mask_addresses(" ".join(row.text.split()))[:500] or None,
    }
