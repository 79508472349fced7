"""Who is who: which record of a source is which contact (`source_contacts`), and what follows when a record becomes another contact."""

from __future__ import annotations

import datetime as dt
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine

from mail_pipelines.contacts import changes
from mail_pipelines.contacts.addresses import Address
from mail_pipelines.contacts.lists import MailingList
from mail_pipelines.contacts.providers import provider_of
from mail_pipelines.contacts.sets import insert_if_absent, slices
from mail_pipelines.database import upsert
from mail_pipelines.database.engine import transact
from mail_pipelines.database.models import Contact, SourceContact, Subscription, Suppression
from mail_pipelines.sources.records import Record

PRESENT, MISSING, GONE = 0, 1, 2
# The `source` of a subscription that ended because its record was gone; it begins again if the record comes back.
GONE_SOURCE = "gone"
# Reasons that follow a person to a new address; a bounce belongs to the address.
_FOLLOWS = ("unsubscribe", "complaint", "manual")


@dataclass(frozen=True)
class Links:
    """The links of one source, as run number `run` finds them; `target` is the list where its people are subscribed."""

    source: str
    target: MailingList | None
    run: int
    now: dt.datetime

    def follow(self, engine: Engine, latest: Mapping[str, Record]) -> set[str]:
        """Move contacts whose address changed at the source; returns the ids of those who left under another address and must not be subscribed."""

        def work(connection: Connection) -> set[str]:
            refused: set[str] = set()
            for ids in slices(latest):
                mine = sa.and_(SourceContact.source == self.source, SourceContact.external_id.in_(ids))
                query = sa.select(SourceContact.external_id, SourceContact.contact_id, SourceContact.address_hash).where(mine)
                moved = [row for row in connection.execute(query) if row.address_hash != latest[row.external_id].address.hash]
                for row in moved:
                    if self._left(connection, row.contact_id):
                        refused.add(row.external_id)
                    self._move(connection, row.external_id, row.contact_id, row.address_hash, latest[row.external_id].address)
            return refused

        return transact(engine, work) if latest else set()

    def _left(self, connection: Connection, contact_id: int) -> bool:
        if self.target is None:
            return False
        ended = sa.and_(Subscription.contact_id == contact_id, Subscription.list_id == self.target.id, sa.not_(Subscription.subscribed))
        return connection.execute(sa.select(sa.exists().where(ended, Subscription.source != GONE_SOURCE))).scalar_one()

    def _move(self, connection: Connection, external_id: str, contact_id: int, before: bytes, address: Address) -> None:
        """The contact takes the new address, unless somebody has it, or another record still says the old one. What was refused is refused there, too."""
        refusals = sa.select(
            sa.literal(address.hash, Suppression.address_hash.type),
            Suppression.scope_kind,
            Suppression.scope_id,
            Suppression.reason,
            sa.literal(self.now, Suppression.created_at.type),
        ).where(Suppression.address_hash == before, Suppression.reason.in_(_FOLLOWS))
        kept = insert_if_absent(Suppression).from_select(["address_hash", "scope_kind", "scope_id", "reason", "created_at"], refusals)
        connection.execute(kept)
        other = sa.and_(SourceContact.contact_id == contact_id, sa.or_(SourceContact.source != self.source, SourceContact.external_id != external_id))
        occupied = sa.or_(
            sa.exists().where(Contact.address_hash == address.hash),
            sa.exists().where(Suppression.address_hash == address.hash, Suppression.reason == "erased"),
            sa.exists().where(other),
        )
        if connection.execute(sa.select(occupied)).scalar_one():
            return
        values = {"email": address.email, "address": address.address, "address_hash": address.hash, "domain": address.domain}
        values |= {"provider": provider_of(address.domain)}
        # Not `updated_at`: no field changed here, and whose fields are newer is decided by it.
        changed = connection.execute(sa.update(Contact).where(Contact.id == contact_id, Contact.address_hash == before).values(**values))
        if changed.rowcount:
            changes.record(connection, [contact_id], "upsert", now=self.now)

    def record(self, connection: Connection, latest: Mapping[str, Record], seen: Sequence[str], gone: Sequence[str]) -> list[tuple[int, Record]]:
        """Note which contact each id is, with the version now in; who was seen; who is marked as deleted. Returns the contacts with a record of each."""
        by_hash: dict[bytes, list[Record]] = {}
        for record in latest.values():
            by_hash.setdefault(record.address.hash, []).append(record)
        found: list[tuple[int, bytes]] = []
        for hashes in slices(by_hash):
            query = sa.select(Contact.id, Contact.address_hash).where(Contact.address_hash.in_(hashes))
            found += connection.execute(query).tuples().all()
        links = [
            {
                "source": self.source,
                "external_id": record.external_id,
                "contact_id": contact_id,
                "address_hash": digest,
                "changed_at": record.changed_at,
                "merged_at": self.now,
                "run": self.run,
                "state": PRESENT,
            }
            for contact_id, digest in found
            for record in by_hash[digest]
        ]
        self._end_left_behind(connection, links)
        upsert.put(connection, SourceContact, sorted(links, key=lambda link: link["external_id"]))
        linked = {link["external_id"] for link in links}
        self._mark(connection, [id_ for id_ in seen if id_ not in linked], PRESENT)
        self._mark(connection, gone, MISSING)
        return [(contact_id, by_hash[digest][-1]) for contact_id, digest in found]

    def _mark(self, connection: Connection, ids: Sequence[str], state: int) -> None:
        for some in slices(ids):
            mine = sa.and_(SourceContact.source == self.source, SourceContact.external_id.in_(some))
            # What is gone already is not missed again.
            where = mine if state == PRESENT else sa.and_(mine, SourceContact.state != GONE)
            connection.execute(sa.update(SourceContact).where(where).values(state=state, run=self.run))

    def _end_left_behind(self, connection: Connection, links: Sequence[Mapping[str, Any]]) -> None:
        """The subscription that the source made for a contact which its record no longer is."""
        now_is = {link["external_id"]: link["contact_id"] for link in links}
        left = []
        for ids in slices(now_is):
            query = sa.select(SourceContact.external_id, SourceContact.contact_id).where(
                SourceContact.source == self.source, SourceContact.external_id.in_(ids)
            )
            left += [contact_id for external_id, contact_id in connection.execute(query).tuples() if contact_id != now_is[external_id]]
        end_subscriptions(connection, self.source, left, self.target, now=self.now, besides=set(now_is))


def end_subscriptions(
    connection: Connection, source: str, contact_ids: Collection[int], target: MailingList | None, *, now: dt.datetime, besides: Collection[str] = ()
) -> int:
    """End what the source subscribed of these contacts, unless another of its records (not of `besides`) still stands for them; returns how many."""
    if target is None or not contact_ids:
        return 0
    ended = 0
    for ids in slices(contact_ids):
        standing = sa.select(SourceContact.contact_id, SourceContact.external_id).where(
            SourceContact.source == source, SourceContact.contact_id.in_(ids), SourceContact.state == PRESENT
        )
        kept = {contact_id for contact_id, external_id in connection.execute(standing).tuples() if external_id not in besides}
        mine = sa.select(Subscription.contact_id).where(
            Subscription.contact_id.in_(set(ids) - kept), Subscription.list_id == target.id, Subscription.subscribed, Subscription.source == source
        )
        chosen = connection.execute(mine).scalars().all()
        if chosen:
            over = sa.update(Subscription).where(Subscription.contact_id.in_(chosen), Subscription.list_id == target.id)
            connection.execute(over.values(subscribed=False, source=GONE_SOURCE, changed_at=now))
            changes.record(connection, chosen, "upsert", now=now)
            ended += len(chosen)
    return ended
