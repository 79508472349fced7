"""How people stand in a list there, applied to how they stand in it here. Nobody who left, there or here, is subscribed.

It is done in the transaction that made the contacts, so no moment exists in which somebody who left could be mailed. Doing it again changes nothing.
"""

from __future__ import annotations

import datetime as dt
import json
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from mail_pipelines.contacts import changes, consent, merging
from mail_pipelines.contacts.lists import MailingList
from mail_pipelines.contacts.sets import slices
from mail_pipelines.database.models import Contact, Subscription, Suppression
from mail_pipelines.database.types import LongText, UtcDateTime, ascii_string
from mail_pipelines.migration.source import State

Here = Literal["subscribed", "unconfirmed", "left", "disabled", "erased"]
IMPORTED = "import"
UNCONFIRMED = "unconfirmed"


class Place(NamedTuple):
    """A subscription here: whether it lasts, and by what it came to be so."""

    subscribed: bool
    source: str


# Bounced and blocked people are subscribed and suppressed, so that lifting the suppression is enough.
PLACES: Mapping[State, Place] = {
    "active": Place(True, IMPORTED),
    "bounced": Place(True, IMPORTED),
    "blocked": Place(True, IMPORTED),
    "unconfirmed": Place(False, UNCONFIRMED),
    "disabled": Place(False, "disabled"),
    "left": Place(False, "unsubscribe"),
}
_temporary = sa.MetaData()
_OPTIONS: dict[str, Any] = {"prefixes": ["TEMPORARY"]} | {
    f"{name}_{option}": value for name in ("mysql", "mariadb") for option, value in (("engine", "InnoDB"), ("charset", "utf8mb4"))
}
_MOVED = sa.Table(
    "staged_subscriptions",
    _temporary,
    sa.Column("contact_id", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("subscribed", sa.Boolean, nullable=False),
    sa.Column("source", ascii_string(32), nullable=False),
    sa.Column("changed_at", UtcDateTime, nullable=False),
    **_OPTIONS,
)
_PROVED = sa.Table(
    "staged_consents",
    _temporary,
    sa.Column("contact_id", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("consent", LongText, nullable=False),
    **_OPTIONS,
)
_BY_SOURCE: Mapping[str, Here] = {UNCONFIRMED: "unconfirmed", "disabled": "disabled"}


@dataclass(frozen=True)
class Standing:
    """One address of a page. `repeated` says that an earlier row of the list was the same one."""

    address_hash: bytes
    state: State
    since: dt.datetime | None
    blocked: str | None
    evidence: Mapping[str, Any]
    repeated: bool = False


@dataclass(frozen=True)
class Found:
    """A subscription as the import left it: `is_new` if that made it; `refused` if the person has left everything here, or this list."""

    place: Place
    changed_at: dt.datetime
    is_new: bool
    refused: bool


def decide(found: Found, state: State, since: dt.datetime | None) -> Place | None:
    """What a subscription becomes; None if it stays. What a person did here after leaving there counts, what an import did does not."""
    wanted = PLACES[state]
    if found.is_new:
        return Place(False, "unsubscribe") if found.refused and wanted.subscribed else wanted
    if found.place.subscribed and not wanted.subscribed and state != "unconfirmed":
        by_person = found.place.source != IMPORTED
        return None if by_person and (since is None or since < found.changed_at) else wanted
    if wanted.subscribed and found.place == PLACES["unconfirmed"] and not found.refused:
        return wanted
    return None


def apply(connection: Connection, standings: Sequence[Standing], target: MailingList, system: str, now: dt.datetime) -> Counter[tuple[State, Here]]:
    """Subscriptions, consent evidence and suppressions of contacts that were merged into the list at `now`; returns what became of the rows."""
    _block(connection, standings, now)
    by_hash = {standing.address_hash: standing for standing in standings}
    moved: dict[int, tuple[Place, dt.datetime]] = {}
    proved: dict[int, str] = {}
    for row in _rows(connection, by_hash, target, with_consent=True):
        standing = by_hash[row.address_hash]
        place = Place(row.subscribed, row.source)
        found = Found(place, row.changed_at, row.changed_at == now and row.source == IMPORTED and not standing.repeated, row.refused)
        decided = decide(found, standing.state, standing.since)
        if decided is not None:
            since = standing.since if decided == PLACES[standing.state] else None
            moved[row.id] = decided, since or now
        known = row.consent or {}
        if standing.evidence and target.key not in known:
            proved[row.id] = json.dumps(known | {target.key: {"system": system, **standing.evidence}}, ensure_ascii=False)
    _write(connection, moved, proved, target, now)
    return _outcome(connection, by_hash, target, now)


def _write(connection: Connection, moved: Mapping[int, tuple[Place, dt.datetime]], proved: Mapping[int, str], target: MailingList, now: dt.datetime) -> None:
    import pyarrow as pa

    if moved:
        places, times = zip(*moved.values(), strict=True)
        rows = {
            "contact_id": pa.array(list(moved), pa.int64()),
            "subscribed": pa.array([place.subscribed for place in places], pa.bool_()),
            "source": pa.array([place.source for place in places], pa.string()),
            "changed_at": pa.array(times, pa.timestamp("us")),
        }
        merging.stage(connection, _MOVED, pa.table(rows))
        where = sa.and_(Subscription.contact_id == _MOVED.c.contact_id, Subscription.list_id == target.id)
        connection.execute(sa.update(Subscription).where(where).values({name: _MOVED.c[name] for name in ("subscribed", "source", "changed_at")}))
    if proved:
        rows = {"contact_id": pa.array(list(proved), pa.int64()), "consent": pa.array(list(proved.values()), pa.string())}
        merging.stage(connection, _PROVED, pa.table(rows))
        known = sa.type_coerce(_PROVED.c.consent, sa.JSON)
        connection.execute(sa.update(Contact).where(Contact.id == _PROVED.c.contact_id).values(consent=known, updated_at=now))
    changes.record(connection, sorted({*moved, *proved}), "upsert", now=now)


def _block(connection: Connection, standings: Sequence[Standing], now: dt.datetime) -> None:
    by_reason: defaultdict[str, dict[bytes, dt.datetime]] = defaultdict(dict)
    for standing in standings:
        if standing.blocked:
            by_reason[standing.blocked][standing.address_hash] = standing.since or now
    for reason, hashes in by_reason.items():
        consent.suppress(connection, hashes, reason=reason, now=now)


def _outcome(connection: Connection, by_hash: Mapping[bytes, Standing], target: MailingList, now: dt.datetime) -> Counter[tuple[State, Here]]:
    """What the database says now; whoever has left the list gets its suppression, as by `consent.unsubscribe`."""
    here: dict[bytes, Here] = dict.fromkeys(by_hash, "erased")
    left: dict[bytes, dt.datetime] = {}
    for row in _rows(connection, by_hash, target):
        here[row.address_hash] = "subscribed" if row.subscribed else _BY_SOURCE.get(row.source, "left")
        if by_hash[row.address_hash].state == "left" and not row.subscribed:
            left[row.address_hash] = by_hash[row.address_hash].since or now
    consent.suppress(connection, left, reason="unsubscribe", scope_kind="list", scope_id=target.id, now=now)
    return Counter((by_hash[hash_].state, place) for hash_, place in here.items() if not by_hash[hash_].repeated)


def _rows(connection: Connection, by_hash: Mapping[bytes, Standing], target: MailingList, *, with_consent: bool = False) -> list[sa.Row[Any]]:
    """The contacts of these addresses with their subscription to the list."""
    scopes = consent.campaign_scopes(target.brand_id, target.id)
    refused = sa.exists().where(
        Suppression.address_hash == Contact.address_hash,
        Suppression.reason.in_(("unsubscribe", "complaint")),
        sa.or_(*(sa.and_(Suppression.scope_kind == scope.kind, Suppression.scope_id == scope.id) for scope in scopes)),
    )
    columns: list[Any] = [Contact.id, Contact.address_hash, Subscription.subscribed, Subscription.source, Subscription.changed_at]
    if with_consent:
        columns += [refused.label("refused"), Contact.consent]
    subscribed = sa.and_(Subscription.contact_id == Contact.id, Subscription.list_id == target.id)
    query = sa.select(*columns).join(Subscription, subscribed)
    return [row for chosen in slices(by_hash) for row in connection.execute(query.where(Contact.address_hash.in_(chosen)))]
