"""Staged rows of a source into contacts and subscriptions, a chunk at a time; each chunk may be merged again and changes nothing then.

The rows are checked as those of a file are (`contacts.importing`) and merged by the same statements (`contacts.merging`). What is added here: which record
of the source is which contact (`source_contacts`), addresses that changed there, whose value wins, who may be subscribed, and on what evidence.
Nobody who left is subscribed again, whatever the source says.
"""

from __future__ import annotations

import datetime as dt
import json
import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine

from mail_pipelines.contacts import changes, consent, fields, importing, lists, merging
from mail_pipelines.contacts.addresses import Address, AddressError, parse
from mail_pipelines.contacts.fields import FieldType
from mail_pipelines.contacts.files import Batch
from mail_pipelines.contacts.providers import provider_of
from mail_pipelines.contacts.sets import insert_if_absent, slices
from mail_pipelines.database import upsert
from mail_pipelines.database.bulk import CHUNK_ROWS
from mail_pipelines.database.engine import reading, transact
from mail_pipelines.database.models import Contact, SourceContact, Subscription, Suppression
from mail_pipelines.database.types import LongText
from mail_pipelines.sources.declaration import CHANGED_AT, CONSENT_AT, DELETED, EMAIL, EXTERNAL_ID, OPTED_IN, TIME_ZONE, Contacts, Rule, Source
from mail_pipelines.sources.staging import POSITION

if TYPE_CHECKING:
    import pyarrow as pa

PRESENT, MISSING, GONE = 0, 1, 2
# The `source` of a subscription that ended because its record was gone; it begins again if the record comes back.
GONE_SOURCE = "gone"
ID_LENGTH = 190
# Reasons that follow a person to a new address; a bounce belongs to the address.
_FOLLOWS = ("unsubscribe", "complaint", "manual")
_NEVER = dt.datetime.min.replace(tzinfo=dt.UTC)
_EPOCH = re.compile(r"\d{9,13}(\.\d+)?")


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


@dataclass
class Tally:
    """What became of rows: `read` = inserted + updated + unchanged + duplicates + deleted + the sum of `rejected`, which is by reason."""

    counts: Counter[str] = field(default_factory=Counter)
    rejected: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True)
class Target:
    """Where the contacts of a source go: list, fields with their types."""

    list: lists.MailingList | None
    types: dict[str, FieldType]


@dataclass(frozen=True)
class _Record:
    """A row whose address can be used."""

    external_id: str
    address: Address
    changed_at: dt.datetime | None
    subscribes: bool
    evidence: str | None


def declare(engine: Engine, resource: Contacts, first: pa.Table | None, now: dt.datetime) -> Target:
    """The list and the fields, made where they are new; a field without a declared type takes the narrowest that fits the first rows. Raises `FieldError`."""

    def work(connection: Connection) -> Target:
        known = fields.declared(connection)
        types: dict[str, FieldType] = {}
        for column, key in resource.field_columns.items():
            texts = (text.strip() for text in (first[key].to_pylist() if first is not None else []) if text and text.strip())
            if first is None and key not in known and key not in resource.types:
                continue
            types[key] = resource.types.get(key) or known.get(key) or fields.infer_type(texts)
            fields.declare(connection, key, types[key], label=column, now=now)
        target = lists.ensure(connection, resource.list, now=now) if resource.list else None
        return Target(target, types)

    return transact(engine, work)


class Merge:
    """One run's merge of contacts; `chunk` takes staged rows in order."""

    def __init__(self, engine: Engine, source: Source, resource: Contacts, target: Target, *, run: int, now: dt.datetime) -> None:
        self.engine, self.source, self.resource, self.target, self.run, self.now = engine, source, resource, target, run, now
        self._keys = [key for key in resource.map.values() if key in target.types or key == TIME_ZONE]
        self._columns = [importing.Column(place, self._name_of(key), key) for place, key in enumerate([EMAIL, *self._keys]) if place]
        self._seen = importing.Seen()
        self._mostly_new = False
        # How an address is spelled is the source's word.
        self._by_rule: dict[str, Rule] = {EMAIL: "theirs", **{key: resource.rule_of(key) for key in self._keys}}

    def _name_of(self, key: str) -> str:
        return self.resource.column_of(key) or key

    def chunk(self, rows: pa.Table, tally: Tally) -> list[tuple[str, str]]:
        """Merge at most `CHUNK_ROWS` rows; returns id and reason of those left out."""
        import pyarrow as pa
        import pyarrow.compute as pc

        assert rows.num_rows <= CHUNK_ROWS
        tally.counts["read"] += rows.num_rows
        ids = self._ids(rows)
        deleted = self._deleted(rows)
        records, rejects = self._records(rows, ids, deleted)
        # Of several rows of one record the newest is the record.
        latest: dict[str, tuple[dt.datetime, int]] = {}
        for position, record in records.items():
            version = (record.changed_at or _NEVER, position)
            latest[record.external_id] = max(latest.get(record.external_id, version), version)
        older = [position for position, record in records.items() if latest[record.external_id][1] != position]
        for position in older:
            del records[position]
        tally.counts["duplicates"] += len(older)
        kept = rows.filter(pc.is_in(rows[POSITION], value_set=pa.array(list(records), pa.int64())))
        batch = Batch(kept[POSITION].to_pylist(), [kept[key].combine_chunks() for key in (EMAIL, *self._keys)], [], 0.0)
        prepared = importing.prepare(batch, 0, self._columns, self.target.types, self._seen)
        for reject in prepared.rejects:
            rejects[reject.line] = reject.reason
            records.pop(reject.line, None)
        by_id = {record.external_id: record for record in records.values()}
        refused = self._follow_addresses(by_id)
        by_hash = {record.address.hash: record for record in by_id.values()}
        subscribing = {digest for digest, record in by_hash.items() if record.subscribes and record.external_id not in refused}
        taken = self._taken(by_hash)
        erased: set[int] = set()
        for list_id, chosen in self._split(prepared.rows, subscribing):
            outcome = merging.merge(self.engine, chosen, list_id=list_id, now=self.now, mostly_new=self._mostly_new, source=self.source.name, taken=taken)
            self._mostly_new = outcome.inserted > chosen.num_rows // 2
            tally.counts.update(inserted=outcome.inserted, updated=outcome.updated, unchanged=outcome.unchanged)
            erased |= outcome.erased
        rejects.update(dict.fromkeys(erased, importing.ERASED))
        tally.counts["duplicates"] += prepared.superseded + len(prepared.repeated - erased)
        seen = [external_id for position, external_id in ids.items() if position not in deleted]
        gone = [ids[position] for position in deleted if position in ids]
        tally.counts["deleted"] += len(deleted)
        transact(self.engine, lambda connection: self._link(connection, by_id, seen, gone, subscribing))
        tally.rejected.update(_general(reason) for reason in rejects.values())
        return [(ids.get(position, ""), reason) for position, reason in sorted(rejects.items())]

    # --- rows ---------------------------------------------------------------------------------------------------

    def _ids(self, rows: pa.Table) -> dict[int, str]:
        """Position → id at the source, of the rows that have a usable one."""
        positions = rows[POSITION].to_pylist()
        if self.resource.column_of(EXTERNAL_ID):
            return {position: text for position, text in zip(positions, rows[EXTERNAL_ID].to_pylist(), strict=True) if text and len(text) <= ID_LENGTH}
        found = {}
        for position, text in zip(positions, rows[EMAIL].to_pylist(), strict=True):
            try:
                found[position] = parse(text or "").hash.hex()
            except AddressError:
                continue
        return found

    def _deleted(self, rows: pa.Table) -> set[int]:
        if not self.resource.column_of(DELETED):
            return set()
        return {position for position, text in zip(rows[POSITION].to_pylist(), rows[DELETED].to_pylist(), strict=True) if is_marked(text)}

    def _records(self, rows: pa.Table, ids: Mapping[int, str], deleted: Collection[int]) -> tuple[dict[int, _Record], dict[int, str]]:
        records: dict[int, _Record] = {}
        rejects: dict[int, str] = {}
        size = rows.num_rows

        def column(target: str) -> Sequence[str | None]:
            return rows[target].to_pylist() if self.resource.column_of(target) else [None] * size

        given = zip(rows[POSITION].to_pylist(), rows[EMAIL].to_pylist(), column(CHANGED_AT), column(OPTED_IN), column(CONSENT_AT), strict=True)
        for position, email, changed, opted_in, consent_at in given:
            if position in deleted:
                continue
            try:
                if not (email or "").strip():
                    raise AddressError("", "there is none")
                address = parse(email)
            except AddressError as error:
                rejects[position] = f"address: {error.reason}"
                continue
            if position not in ids:
                rejects[position] = f"column {self._name_of(EXTERNAL_ID)!r}: there is no id, or it is longer than {ID_LENGTH} characters"
                continue
            try:
                changed_at = moment(changed)
            except ValueError as error:
                rejects[position] = f"column {self._name_of(CHANGED_AT)!r}: {error}"
                continue
            rule = self.resource.consent.subscribe
            subscribes = rule == "always" or (rule == "opted_in" and is_true(opted_in))
            records[position] = _Record(ids[position], address, changed_at, subscribes, consent_at)
        return records, rejects

    def _split(self, rows: pa.Table, subscribing: Collection[bytes]) -> Iterator[tuple[int | None, pa.Table]]:
        """The rows of contacts that may be subscribed with the list, and the others without."""
        import pyarrow as pa
        import pyarrow.compute as pc

        chosen = pc.is_in(rows["address_hash"], value_set=pa.array(list(subscribing), pa.binary(16)))
        list_id = self.target.list.id if self.target.list else None
        for id_, part in ((list_id, rows.filter(chosen)), (None, rows.filter(pc.invert(chosen)))):
            if part.num_rows:
                yield id_, part

    # --- whose value wins ---------------------------------------------------------------------------------------

    def _taken(self, by_hash: Mapping[bytes, _Record]) -> merging.Taken | None:
        """`newest` compares three versions: what differs since the last merge on one side only is that side's; on both, the later change wins."""
        rules = self._by_rule
        if set(rules.values()) <= {"theirs"}:
            return None
        last: dict[bytes, tuple[dt.datetime | None, dt.datetime]] = {}
        if "newest" in rules.values():
            with reading(self.engine) as connection:
                for ids in slices(record.external_id for record in by_hash.values()):
                    query = sa.select(SourceContact.address_hash, SourceContact.changed_at, SourceContact.merged_at)
                    found = connection.execute(query.where(SourceContact.source == self.source.name, SourceContact.external_id.in_(ids)))
                    last.update({digest: (changed_at, merged_at) for digest, changed_at, merged_at in found})

        def theirs_is_newer(digest: bytes, updated_at: dt.datetime) -> bool:
            record = by_hash.get(digest)
            theirs = record.changed_at if record else None
            before = last.get(digest)
            if before is not None and (theirs == before[0] or (theirs or _NEVER) < (before[0] or _NEVER)):
                return False
            if before is not None and updated_at <= before[1]:
                return True
            return theirs is not None and theirs > updated_at

        def taken(digest: bytes, updated_at: dt.datetime, stored: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
            newer = theirs_is_newer(digest, updated_at)
            return {key: value for key, value in given.items() if stored.get(key) is None or rules[key] == "theirs" or (rules[key] == "newest" and newer)}

        return taken

    # --- who is who ---------------------------------------------------------------------------------------------

    def _follow_addresses(self, latest: Mapping[str, _Record]) -> set[str]:
        """Move contacts whose address changed at the source; returns the ids of those who left under another address and must not be subscribed."""

        def work(connection: Connection) -> set[str]:
            refused: set[str] = set()
            for ids in slices(latest):
                mine = sa.and_(SourceContact.source == self.source.name, SourceContact.external_id.in_(ids))
                query = sa.select(SourceContact.external_id, SourceContact.contact_id, SourceContact.address_hash).where(mine)
                moved = [row for row in connection.execute(query) if row.address_hash != latest[row.external_id].address.hash]
                for row in moved:
                    if self._left(connection, row.contact_id):
                        refused.add(row.external_id)
                    self._move(connection, row.external_id, row.contact_id, row.address_hash, latest[row.external_id].address)
            return refused

        return transact(self.engine, work) if latest else set()

    def _left(self, connection: Connection, contact_id: int) -> bool:
        if self.target.list is None:
            return False
        ended = sa.and_(Subscription.contact_id == contact_id, Subscription.list_id == self.target.list.id, sa.not_(Subscription.subscribed))
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
        other = sa.and_(SourceContact.contact_id == contact_id, sa.or_(SourceContact.source != self.source.name, SourceContact.external_id != external_id))
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

    def _link(self, connection: Connection, latest: Mapping[str, _Record], seen: Sequence[str], gone: Sequence[str], subscribing: Collection[bytes]) -> None:
        """Record which contact each id is, with the version now in; who was seen; who is marked as deleted; and on what evidence people are subscribed."""
        by_hash: dict[bytes, list[_Record]] = {}
        for record in latest.values():
            by_hash.setdefault(record.address.hash, []).append(record)
        found: list[tuple[int, bytes, bool]] = []
        for hashes in slices(by_hash):
            query = sa.select(Contact.id, Contact.address_hash, Contact.consent.is_(None)).where(Contact.address_hash.in_(hashes))
            found += connection.execute(query).tuples().all()
        links = [
            {
                "source": self.source.name,
                "external_id": record.external_id,
                "contact_id": contact_id,
                "address_hash": digest,
                "changed_at": record.changed_at,
                "merged_at": self.now,
                "run": self.run,
                "state": PRESENT,
            }
            for contact_id, digest, _ in found
            for record in by_hash[digest]
        ]
        self._end_left_behind(connection, links)
        upsert.put(connection, SourceContact, sorted(links, key=lambda link: link["external_id"]))
        linked = {link["external_id"] for link in links}
        self._mark(connection, [id_ for id_ in seen if id_ not in linked], PRESENT)
        self._mark(connection, gone, MISSING)
        self._evidence(connection, [(contact_id, by_hash[digest][-1]) for contact_id, digest, without in found if without and digest in subscribing])
        self._begin_again(connection, [contact_id for contact_id, digest, _ in found if digest in subscribing])

    def _mark(self, connection: Connection, ids: Sequence[str], state: int) -> None:
        for some in slices(ids):
            mine = sa.and_(SourceContact.source == self.source.name, SourceContact.external_id.in_(some))
            # What is gone already is not missed again.
            where = mine if state == PRESENT else sa.and_(mine, SourceContact.state != GONE)
            connection.execute(sa.update(SourceContact).where(where).values(state=state, run=self.run))

    def _end_left_behind(self, connection: Connection, links: Sequence[Mapping[str, Any]]) -> None:
        """The subscription that the source made for a contact which its record no longer is."""
        now_is = {link["external_id"]: link["contact_id"] for link in links}
        left = []
        for ids in slices(now_is):
            query = sa.select(SourceContact.external_id, SourceContact.contact_id).where(
                SourceContact.source == self.source.name, SourceContact.external_id.in_(ids)
            )
            left += [contact_id for external_id, contact_id in connection.execute(query).tuples() if contact_id != now_is[external_id]]
        end_subscriptions(connection, self.source.name, left, self.target.list, now=self.now, besides=set(now_is))

    def _evidence(self, connection: Connection, people: Sequence[tuple[int, _Record]]) -> None:
        words = self.resource.consent.evidence
        common = {"source": self.source.name, "recorded_at": self.now.isoformat()} | ({"evidence": words} if words else {})
        # Most say the same.
        written = {at: json.dumps(common | ({"at": at[:64]} if at else {})) for at in {record.evidence for _, record in people}}
        rows = [(contact_id, written[record.evidence]) for contact_id, record in people]
        if rows:
            import pyarrow as pa

            ids, texts = [row[0] for row in rows], [row[1] for row in rows]
            merging.stage(connection, _EVIDENCE, pa.table({"contact_id": pa.array(ids, pa.int64()), "consent": pa.array(texts, pa.string())}))
            said = sa.update(Contact).where(Contact.id == _EVIDENCE.c.contact_id).values(consent=sa.type_coerce(_EVIDENCE.c.consent, sa.JSON))
            connection.execute(said)

    def _begin_again(self, connection: Connection, contact_ids: Sequence[int]) -> None:
        """Subscriptions that ended because the record was gone, and nobody has refused anything since."""
        if self.target.list is None:
            return
        scopes = consent.campaign_scopes(self.target.list.brand_id, self.target.list.id)
        for ids in slices(contact_ids):
            query = (
                sa.select(Contact.id)
                .join(Subscription, Subscription.contact_id == Contact.id)
                .where(
                    Contact.id.in_(ids),
                    Subscription.list_id == self.target.list.id,
                    Subscription.source == GONE_SOURCE,
                    sa.not_(Subscription.subscribed),
                    sa.not_(consent.suppressed_clause(Contact.address_hash, Contact.domain, scopes)),
                )
            )
            back = connection.execute(query).scalars().all()
            if back:
                again = sa.update(Subscription).where(Subscription.contact_id.in_(back), Subscription.list_id == self.target.list.id)
                connection.execute(again.values(subscribed=True, source=self.source.name, changed_at=self.now))
                changes.record(connection, back, "upsert", now=self.now)


def end_subscriptions(
    connection: Connection, source: str, contact_ids: Collection[int], target: lists.MailingList | None, *, now: dt.datetime, besides: Collection[str] = ()
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


def is_true(text: str | None) -> bool:
    """Whether a text says yes; anything else, and nothing, does not."""
    try:
        return bool(text) and fields.parse_value((text or "").strip(), "boolean") is True
    except ValueError:
        return False


def is_marked(text: str | None) -> bool:
    """Whether a column says that the record is deleted: by yes, or by a time (of its deletion)."""
    if is_true(text):
        return True
    try:
        return moment(text) is not None and (text or "").strip() not in ("0", "1")
    except ValueError:
        return False


def moment(text: str | None) -> dt.datetime | None:
    """A time in ISO 8601, or in seconds or milliseconds since 1970; None for nothing. Raises `ValueError` with a reason."""
    given = (text or "").strip()
    if not given:
        return None
    if _EPOCH.fullmatch(given):
        seconds = float(given)
        return dt.datetime.fromtimestamp(seconds / 1000 if seconds >= 1e11 else seconds, dt.UTC)
    value = str(fields.parse_value(given, "datetime"))
    return dt.datetime.fromisoformat(value.replace("Z", "+00:00")).astimezone(dt.UTC)


def _general(reason: str) -> str:
    """A reason to count by: without the letter that stands in it."""
    return re.sub(r"'.' cannot stand", "a character cannot stand", reason)
