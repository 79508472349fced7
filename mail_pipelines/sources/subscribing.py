"""Whom a source may subscribe, on what evidence, and whose no it brings. Nobody who left is subscribed again: only what the source had ended begins again."""

from __future__ import annotations

import datetime as dt
import json
from collections.abc import Iterable, Sequence

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from mail_pipelines.contacts import changes, consent, merging
from mail_pipelines.contacts.lists import MailingList
from mail_pipelines.contacts.sets import slices
from mail_pipelines.database.models import Contact, Subscription, Suppression
from mail_pipelines.database.types import LongText
from mail_pipelines.sources.links import GONE_SOURCE
from mail_pipelines.sources.records import Noes, Record

_EVIDENCE = sa.Table(
    "staged_evidence",
    sa.MetaData(),
    sa.Column("contact_id", sa.BigInteger, nullable=False),
    sa.Column("consent", LongText, nullable=False),
    prefixes=["TEMPORARY"],
    mysql_engine="InnoDB",
    mysql_charset="utf8mb4",
    mariadb_engine="InnoDB",
    mariadb_charset="utf8mb4",
)


# What a person has said; a bounce may end.
_OWN_WORD = ("unsubscribe", "complaint", "erased")


def refused(connection: Connection, target: MailingList, address_hashes: Iterable[bytes]) -> set[bytes]:
    """Those of some addresses whose people do not want the list, or all that comes in its brand's or our name."""
    in_scope = sa.or_(*(sa.and_(Suppression.scope_kind == scope.kind, Suppression.scope_id == scope.id) for scope in _scopes(target)))
    found: set[bytes] = set()
    for some in slices(address_hashes):
        query = sa.select(Suppression.address_hash).where(Suppression.address_hash.in_(some), in_scope, Suppression.reason.in_(_OWN_WORD))
        found.update(digest for digest in connection.execute(query).scalars() if digest is not None)
    return found


def _scopes(target: MailingList) -> list[consent.Scope]:
    return consent.campaign_scopes(target.brand_id, target.id)


def refuse(connection: Connection, source: str, target: MailingList, noes: Noes, now: dt.datetime) -> None:
    """End, for good, the subscriptions to the list of all who left, and of those whose yes the source itself had brought and takes back.

    Who is not subscribed, or not known yet, cannot be subscribed by another source either.
    """
    for some in slices(noes.left):
        own = sa.and_(Subscription.contact_id == Contact.id, Subscription.list_id == target.id)
        query = sa.select(Contact.id).outerjoin(Subscription, own).where(Contact.address_hash.in_(some))
        open_ = connection.execute(query.where(sa.or_(Subscription.contact_id.is_(None), Subscription.subscribed))).scalars().all()
        consent.unsubscribe(connection, open_, scope="list", scope_id=target.id, now=now)
    consent.suppress(connection, sorted(noes.left), reason="unsubscribe", scope_kind="list", scope_id=target.id, now=now)
    for some in slices(noes.withdrawn):
        brought = sa.and_(Subscription.list_id == target.id, Subscription.subscribed, Subscription.source == source)
        query = sa.select(Contact.id).join(Subscription, Subscription.contact_id == Contact.id).where(Contact.address_hash.in_(some), brought)
        consent.unsubscribe(connection, connection.execute(query).scalars().all(), scope="list", scope_id=target.id, now=now)


def note_evidence(connection: Connection, source: str, words: str, people: Sequence[tuple[int, Record]], now: dt.datetime) -> None:
    """Keep with each contact that has no evidence yet on which one it is subscribed; `words` are the declaration's."""
    common = {"source": source, "recorded_at": now.isoformat()} | ({"evidence": words} if words else {})
    # Most say the same.
    written = {at: json.dumps(common | ({"at": at[:64]} if at else {})) for at in {record.evidence for _, record in people}}
    without: set[int] = set()
    for ids in slices(contact_id for contact_id, _ in people):
        without.update(connection.execute(sa.select(Contact.id).where(Contact.id.in_(ids), Contact.consent.is_(None))).scalars())
    rows = [(contact_id, written[record.evidence]) for contact_id, record in people if contact_id in without]
    if rows:
        import pyarrow as pa

        ids, texts = [row[0] for row in rows], [row[1] for row in rows]
        merging.stage(connection, _EVIDENCE, pa.table({"contact_id": pa.array(ids, pa.int64()), "consent": pa.array(texts, pa.string())}))
        said = sa.update(Contact).where(Contact.id == _EVIDENCE.c.contact_id).values(consent=sa.type_coerce(_EVIDENCE.c.consent, sa.JSON))
        connection.execute(said)


def begin_again(connection: Connection, source: str, target: MailingList, contact_ids: Sequence[int], now: dt.datetime) -> None:
    """Subscriptions that ended because the record was gone, and nobody has refused anything since."""
    scopes = _scopes(target)
    for ids in slices(contact_ids):
        query = (
            sa.select(Contact.id)
            .join(Subscription, Subscription.contact_id == Contact.id)
            .where(
                Contact.id.in_(ids),
                Subscription.list_id == target.id,
                Subscription.source == GONE_SOURCE,
                sa.not_(Subscription.subscribed),
                sa.not_(consent.suppressed_clause(Contact.address_hash, Contact.domain, scopes)),
            )
        )
        back = connection.execute(query).scalars().all()
        if back:
            again = sa.update(Subscription).where(Subscription.contact_id.in_(back), Subscription.list_id == target.id)
            connection.execute(again.values(subscribed=True, source=source, changed_at=now))
            changes.record(connection, back, "upsert", now=now)
