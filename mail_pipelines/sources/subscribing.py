"""Whom a source may subscribe, on what evidence, and whose no it brings. Nobody who left is subscribed again: only what the source had ended begins again."""

from __future__ import annotations

import datetime as dt
import json
from collections.abc import Collection
from typing import TYPE_CHECKING

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from mail_pipelines.contacts import attributes, changes, consent, merging
from mail_pipelines.contacts.lists import MailingList
from mail_pipelines.contacts.sets import insert_if_absent, slices
from mail_pipelines.database.models import Contact, Subscription, Suppression
from mail_pipelines.database.types import Hash16, LongText
from mail_pipelines.sources import links, outbox

if TYPE_CHECKING:
    import pyarrow as pa

_EVIDENCE = sa.Table(
    "staged_evidence",
    sa.MetaData(),
    sa.Column("address_hash", Hash16, nullable=False),
    sa.Column("consent", LongText, nullable=False),
    prefixes=["TEMPORARY"],
    mysql_engine="InnoDB",
    mysql_charset="utf8mb4",
    mariadb_engine="InnoDB",
    mariadb_charset="utf8mb4",
)


# What stands between a person and a subscription; a bounce may end.
_REFUSALS = (*consent.OWN_WORD, "erased")


def refused(connection: Connection, target: MailingList) -> set[bytes]:
    """Of the staged records take the subscribing from those whose people do not want the list, or what comes in its brand's or our name.

    Returns their addresses.
    """
    query = links.select(links.STAGED.c.address_hash).join(Suppression, Suppression.address_hash == links.STAGED.c.address_hash)
    found = set(connection.execute(query.where(links.STAGED.c.subscribes, _in_scope(target), Suppression.reason.in_(_REFUSALS))).scalars())
    for some in slices(found):
        connection.execute(sa.update(links.STAGED).where(links.STAGED.c.address_hash.in_(some)).values(subscribes=False))
    return found


def note_refused(connection: Connection, source: str, target: MailingList, addresses: Collection[bytes], now: dt.datetime) -> None:
    """Who is `refused` by their own word, and never was on the list, has left it: at the time of that word. So it is seen, and the source is told.

    Not if the word came by the source itself.
    """
    for some in slices(addresses):
        query = (
            links.select(Contact.id.label("contact_id"), sa.func.min(Suppression.created_at).label("changed_at"))
            .join(Contact, links.same_address())
            .join(Suppression, Suppression.address_hash == links.STAGED.c.address_hash)
            .outerjoin(Subscription, sa.and_(Subscription.contact_id == Contact.id, Subscription.list_id == target.id))
            .where(links.STAGED.c.address_hash.in_(some), _in_scope(target), Suppression.reason.in_(consent.OWN_WORD), sa.not_(outbox.is_learned(source)))
            .where(sa.or_(Subscription.contact_id.is_(None), sa.and_(sa.not_(Subscription.subscribed), Subscription.source == links.GONE_SOURCE)))
            .group_by(Contact.id)
        )
        if not (left := connection.execute(query).all()):
            continue
        ended = {"list_id": target.id, "subscribed": False, "source": "unsubscribe"}
        connection.execute(insert_if_absent(Subscription), [ended | dict(row._mapping) for row in left])
        ids = [row.contact_id for row in left]
        gone = sa.update(Subscription).where(Subscription.contact_id.in_(ids), Subscription.list_id == target.id, Subscription.source == links.GONE_SOURCE)
        connection.execute(gone.where(sa.not_(Subscription.subscribed)).values(source="unsubscribe", changed_at=now))
        changes.record(connection, ids, "upsert", now=now)


def _in_scope(target: MailingList) -> sa.ColumnElement[bool]:
    """Suppressions that count for the list."""
    return sa.or_(*(sa.and_(Suppression.scope_kind == scope.kind, Suppression.scope_id == scope.id) for scope in _scopes(target)))


def _scopes(target: MailingList) -> list[consent.Scope]:
    return consent.campaign_scopes(target.brand_id, target.id)


def refuse(connection: Connection, source: str, target: MailingList, left: Collection[bytes], withdrawn: Collection[bytes], now: dt.datetime) -> None:
    """End, for good, the subscriptions to the list of all who left, and of those whose yes the source itself had brought and takes back (addresses by hash).

    Who is not subscribed, or not known yet, cannot be subscribed by another source either.
    """
    for some in slices(left):
        own = sa.and_(Subscription.contact_id == Contact.id, Subscription.list_id == target.id)
        query = sa.select(Contact.id).outerjoin(Subscription, own).where(Contact.address_hash.in_(some))
        open_ = connection.execute(query.where(sa.or_(Subscription.contact_id.is_(None), Subscription.subscribed))).scalars().all()
        consent.unsubscribe(connection, open_, scope="list", scope_id=target.id, now=now)
    consent.suppress(connection, sorted(left), reason="unsubscribe", scope_kind="list", scope_id=target.id, now=now)
    for some in slices(withdrawn):
        brought = sa.and_(Subscription.list_id == target.id, Subscription.subscribed, Subscription.source == source)
        query = sa.select(Contact.id).join(Subscription, Subscription.contact_id == Contact.id).where(Contact.address_hash.in_(some), brought)
        consent.unsubscribe(connection, connection.execute(query).scalars().all(), scope="list", scope_id=target.id, now=now)


def evidence(source: str, words: str, consent_at: pa.Array, now: dt.datetime) -> pa.Array:
    """JSON of the evidence by which each is subscribed: `words` are the declaration's, `consent_at` is what the source says of the time."""
    import pyarrow as pa
    import pyarrow.compute as pc

    common = json.dumps({"source": source, "recorded_at": now.isoformat()} | ({"evidence": words} if words else {}))
    at, _ = attributes.encode(pc.utf8_slice_codeunits(consent_at, 0, 64), "text")
    said = pc.binary_join_element_wise(', "at": ', at, "")
    return pc.binary_join_element_wise(common[:-1], pc.coalesce(said, pa.scalar("")), "}", "")


def note_evidence(connection: Connection, people: pa.Table) -> None:
    """Keep with each contact of a staged record that subscribes, and that has no evidence yet, the one in `people` (`address_hash`, `consent`)."""
    import pyarrow as pa
    import pyarrow.compute as pc

    query = links.select(Contact.address_hash).join(Contact, links.same_address())
    without = connection.execute(query.where(links.STAGED.c.subscribes, Contact.consent.is_(None))).scalars().all()
    if without:
        chosen = people.filter(pc.is_in(people["address_hash"], value_set=pa.array(without, pa.binary(16))))
        merging.stage(connection, _EVIDENCE, chosen.select(["address_hash", "consent"]))
        said = sa.update(Contact).where(Contact.address_hash == _EVIDENCE.c.address_hash).values(consent=sa.type_coerce(_EVIDENCE.c.consent, sa.JSON))
        connection.execute(said)


def some_are_gone(connection: Connection, target: MailingList) -> bool:
    """Whether any subscription to the list ended because a record was gone."""
    gone = sa.exists().where(Subscription.list_id == target.id, sa.not_(Subscription.subscribed), Subscription.source == links.GONE_SOURCE)
    return bool(connection.execute(sa.select(gone)).scalar_one())


def begin_again(connection: Connection, source: str, target: MailingList, now: dt.datetime) -> None:
    """Of staged records that subscribe: the subscriptions that ended because the record was gone, where nobody has refused anything since."""
    scopes = _scopes(target)
    query = (
        links.select(Contact.id)
        .join(Contact, links.same_address())
        .join(Subscription, Subscription.contact_id == Contact.id)
        .where(
            links.STAGED.c.subscribes,
            Subscription.list_id == target.id,
            Subscription.source == links.GONE_SOURCE,
            sa.not_(Subscription.subscribed),
            sa.not_(consent.suppressed_clause(Contact.address_hash, Contact.domain, scopes)),
        )
    )
    back = connection.execute(query).scalars().all()
    for ids in slices(back):
        again = sa.update(Subscription).where(Subscription.contact_id.in_(ids), Subscription.list_id == target.id)
        connection.execute(again.values(subscribed=True, source=source, changed_at=now))
    changes.record(connection, back, "upsert", now=now)
