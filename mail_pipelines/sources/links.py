"""Who is who: which record of a source is which contact (`source_contacts`), and what follows when a record becomes another contact.

The records of a chunk are staged in a temporary table, so that each step is one statement for all of them.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from mail_pipelines.contacts import changes, merging
from mail_pipelines.contacts.addresses import Address, parse
from mail_pipelines.contacts.lists import MailingList
from mail_pipelines.contacts.providers import provider_of
from mail_pipelines.contacts.sets import insert_if_absent, slices
from mail_pipelines.database import upsert
from mail_pipelines.database.models import Contact, SourceContact, Subscription, Suppression
from mail_pipelines.database.types import Hash16, UtcDateTime, byte_string
from mail_pipelines.sources.records import ID_LENGTH

if TYPE_CHECKING:
    import pyarrow as pa

PRESENT, MISSING, GONE = 0, 1, 2
# The `source` of a subscription that ended because its record was gone; it begins again if the record comes back.
GONE_SOURCE = "gone"
# Reasons that follow a person to a new address; a bounce belongs to the address.
_FOLLOWS = ("unsubscribe", "complaint", "manual")


# The records of a chunk, one a row; `subscribes` says that its contact may be subscribed, of several records of one contact the last one's.
STAGED = sa.Table(
    "staged_records",
    sa.MetaData(),
    sa.Column("external_id", byte_string(ID_LENGTH), nullable=False),
    sa.Column("address_hash", Hash16, nullable=False),
    sa.Column("changed_at", UtcDateTime),
    sa.Column("subscribes", sa.Boolean, nullable=False),
    prefixes=["TEMPORARY"],
    mysql_engine="InnoDB",
    mysql_charset="utf8mb4",
    mariadb_engine="InnoDB",
    mariadb_charset="utf8mb4",
)


def select(*columns: Any) -> sa.Select[Any]:
    """A query that begins at the staged records: a database that has not counted a new table yet would begin at the other end."""
    query = sa.select(*columns).prefix_with("STRAIGHT_JOIN", dialect="mysql").prefix_with("STRAIGHT_JOIN", dialect="mariadb")
    return query.select_from(STAGED)


def same_address() -> sa.ColumnElement[bool]:
    """The contact of a staged record."""
    return Contact.address_hash == STAGED.c.address_hash


@dataclass(frozen=True)
class Links:
    """The links of one source, as run number `run` finds them; `target` is the list where its people are subscribed."""

    source: str
    target: MailingList | None
    run: int
    now: dt.datetime

    @property
    def _mine(self) -> sa.ColumnElement[bool]:
        """The link of a staged record."""
        return sa.and_(SourceContact.source == self.source, SourceContact.external_id == STAGED.c.external_id)

    def follow(self, connection: Connection, records: pa.Table) -> tuple[set[str], set[str]]:
        """Stage a chunk's records (`external_id`, `email` and the columns of `STAGED`) and move contacts whose address changed at the source.

        Returns the ids of all whose address changed, and of those who left under another address and must not be subscribed.
        """
        import pyarrow as pa
        import pyarrow.compute as pc

        # In the order of the links' key, which are then written page by page.
        merging.stage(connection, STAGED, records.select([column.name for column in STAGED.columns]).sort_by("external_id"))
        query = select(SourceContact.external_id, SourceContact.contact_id, SourceContact.address_hash).join(SourceContact, self._mine)
        moved = connection.execute(query.where(SourceContact.address_hash != STAGED.c.address_hash)).all()
        if not moved:
            return set(), set()
        theirs = records.filter(pc.is_in(records["external_id"], value_set=pa.array([row.external_id for row in moved], pa.string())))
        emails = dict(zip(theirs["external_id"].to_pylist(), theirs["email"].to_pylist(), strict=True))
        refused: set[str] = set()
        for row in moved:
            if self._left(connection, row.contact_id):
                refused.add(row.external_id)
            self._move(connection, row.external_id, row.contact_id, row.address_hash, parse(emails[row.external_id]))
        for ids in slices(refused):
            connection.execute(sa.update(STAGED).where(STAGED.c.external_id.in_(ids)).values(subscribes=False))
        return {row.external_id for row in moved}, refused

    def addresses(self, connection: Connection, ids: Collection[str]) -> set[bytes]:
        """By hash, the addresses of the contacts that these records were until now."""
        found: set[bytes] = set()
        for some in slices(ids):
            query = sa.select(Contact.address_hash).join(SourceContact, SourceContact.contact_id == Contact.id)
            found.update(connection.execute(query.where(SourceContact.source == self.source, SourceContact.external_id.in_(some))).scalars())
        return found

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

    def newcomers(self) -> sa.Select[Any]:
        """A query of the contacts of staged records whom the source did not know until now: until `record` notes them."""
        known = sa.and_(self._mine, SourceContact.contact_id == Contact.id, SourceContact.state == PRESENT)
        return select(Contact.id).join(Contact, same_address()).outerjoin(SourceContact, known).where(SourceContact.contact_id.is_(None))

    def record(self, connection: Connection, unlinked: Sequence[str], gone: Sequence[str]) -> bool:
        """Note which contact each staged record is, with the version now in; that `unlinked` ids were seen; and which are marked as deleted.

        Returns whether a subscription ended, because no record stands for it any more.
        """
        ended = self._end_left_behind(connection)
        links = select(
            sa.literal(self.source),
            STAGED.c.external_id,
            Contact.id,
            STAGED.c.address_hash,
            STAGED.c.changed_at,
            sa.literal(self.now, SourceContact.merged_at.type),
            sa.literal(self.run),
            sa.literal(PRESENT),
        )
        upsert.put_selected(connection, SourceContact, links.join(Contact, same_address()).where(STAGED.c.address_hash.is_not(None)))
        self._mark(connection, unlinked, PRESENT)
        self._mark(connection, gone, MISSING)
        return ended

    def _mark(self, connection: Connection, ids: Sequence[str], state: int) -> None:
        for some in slices(ids):
            mine = sa.and_(SourceContact.source == self.source, SourceContact.external_id.in_(some))
            # What is gone already is not missed again.
            where = mine if state == PRESENT else sa.and_(mine, SourceContact.state != GONE)
            connection.execute(sa.update(SourceContact).where(where).values(state=state, run=self.run))

    def _end_left_behind(self, connection: Connection) -> bool:
        """The subscription that the source made for a contact which its record no longer is."""
        query = select(SourceContact.contact_id).join(SourceContact, self._mine).join(Contact, same_address())
        left = connection.execute(query.where(SourceContact.contact_id != Contact.id)).scalars().all()
        if not left:
            return False
        now_are = set(connection.execute(sa.select(STAGED.c.external_id)).scalars())
        return end_subscriptions(connection, self.source, left, self.target, now=self.now, besides=now_are) > 0


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
