"""Staged rows of a source into contacts and subscriptions, a chunk at a time; each chunk may be merged again and changes nothing then.

The rows are checked as those of a file are (`contacts.importing`) and merged by the same statements (`contacts.merging`). What is added here: which rows are
`records`, which record is which contact (`links`), whose value wins (`conflicts`), and who may be subscribed on what evidence (`subscribing`).
Nobody who left is subscribed again, whatever the source says.
"""

from __future__ import annotations

import datetime as dt
import re
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from sqlalchemy.engine import Connection, Engine

from mail_pipelines.contacts import fields, importing, lists, merging
from mail_pipelines.contacts.fields import FieldType
from mail_pipelines.contacts.files import Batch
from mail_pipelines.database.bulk import CHUNK_ROWS
from mail_pipelines.database.engine import reading, transact
from mail_pipelines.sources import conflicts, records, refusals, status, subscribing
from mail_pipelines.sources.declaration import CONSENT_AT, EMAIL, TIME_ZONE, Contacts, Rule, Source
from mail_pipelines.sources.links import Links
from mail_pipelines.sources.staging import POSITION

if TYPE_CHECKING:
    import pyarrow as pa


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


@dataclass(frozen=True)
class Chunk:
    """Staged rows that are ready to be merged.

    `people` has a row for each contact, in the columns of `contacts.merging.STAGED`, with the evidence of its consent; `records` one for each record, of
    which several may be one contact's: its last `leads`. `unlinked` are the ids of rows that were seen and are in neither, `gone` of those marked as deleted.
    """

    people: pa.Table
    records: pa.Table
    unlinked: list[str]
    gone: list[str]
    noes: records.Noes
    rejects: dict[int, str]
    repeated: frozenset[int]
    counts: Counter[str]
    ids: dict[int, str]


class Merge:
    """One run's merge of contacts: staged rows are made ready with `prepare`, in order, and merged with `merge`."""

    def __init__(self, engine: Engine, source: Source, resource: Contacts, target: Target, *, run: int, now: dt.datetime) -> None:
        self.engine, self.source, self.resource, self.target, self.now = engine, source, resource, target, now
        self._keys = [key for key in resource.map.values() if key in target.types or key == TIME_ZONE]
        self._columns = [importing.Column(place, records.name_of(resource, key), key) for place, key in enumerate(self._keys)]
        self._seen = importing.Seen()
        self._mostly_new = False
        # How an address is spelled is the source's word.
        self._rules: dict[str, Rule] = {EMAIL: "theirs", **{key: resource.rule_of(key) for key in self._keys}}
        self._links = Links(source.name, target.list, run, now)
        # A feed that is read for the first time has everybody.
        feeds_are_read = any(status.position(engine, source.name, told).read_at for told in refusals.KINDS)
        self._write_back = source.write_back if feeds_are_read else None
        with reading(engine) as connection:
            self._some_are_gone = bool(target.list and subscribing.some_are_gone(connection, target.list))

    def prepare(self, rows: pa.Table) -> Chunk:
        """The rows checked and encoded; asks no database."""
        import pyarrow as pa
        import pyarrow.compute as pc

        found = records.read(self.resource, rows)
        usable = found.usable
        kept = rows.take(pc.index_in(usable[POSITION], value_set=rows[POSITION]).combine_chunks())
        batch = Batch(usable[POSITION].to_pylist(), [kept[key].combine_chunks() for key in self._keys], [], 0.0)
        prepared = importing.prepare_addressed(batch, usable, {}, self._columns, self.target.types, self._seen)
        rejects = found.rejects | {reject.line: reject.reason for reject in prepared.rejects}
        if prepared.rejects:
            usable = usable.filter(pc.invert(pc.is_in(usable[POSITION], value_set=pa.array([reject.line for reject in prepared.rejects], pa.int64()))))
        leads = pc.is_in(usable[POSITION], value_set=prepared.rows["line"])
        usable = usable.append_column("leads", leads).set_column(usable.column_names.index("subscribes"), "subscribes", pc.and_(usable["subscribes"], leads))
        leading = usable.take(pc.index_in(prepared.rows["line"], value_set=usable[POSITION]).combine_chunks())
        evidence = subscribing.evidence(self.source.name, self.resource.consent.evidence, leading[CONSENT_AT].combine_chunks(), self.now)
        people = prepared.rows.append_column("consent", evidence).append_column("subscribes", leading["subscribes"])
        has_id = pc.is_valid(found.ids)
        linked = pc.is_in(rows[POSITION], value_set=usable[POSITION])
        gone = pc.and_(found.deleted, has_id)
        unlinked = pc.and_(pc.and_(pc.invert(found.deleted), has_id), pc.invert(linked))
        places = rows[POSITION].to_pylist()
        counts = Counter(read=rows.num_rows, duplicates=found.older + prepared.superseded, deleted=pc.sum(found.deleted).as_py() or 0)
        return Chunk(
            people,
            usable,
            found.ids.filter(unlinked).to_pylist(),
            found.ids.filter(gone).to_pylist(),
            found.noes,
            rejects,
            prepared.repeated,
            counts,
            {places[row]: id_ for row, id_ in enumerate(found.ids.to_pylist()) if places[row] in rejects and id_},
        )

    def merge(self, chunk: Chunk, tally: Tally) -> list[tuple[str, str]]:
        """Merge at most `CHUNK_ROWS` rows in one transaction; returns id and reason of those left out."""
        assert chunk.counts["read"] <= CHUNK_ROWS
        outcome = merging.transact_merge(self.engine, lambda connection: self._merge(connection, chunk))
        self._mostly_new = outcome.inserted > chunk.people.num_rows // 2
        ids = self._ids_at(chunk, outcome.erased) | chunk.ids
        rejects = chunk.rejects | dict.fromkeys(outcome.erased, importing.ERASED)
        tally.counts.update(chunk.counts)
        tally.counts.update(inserted=outcome.inserted, updated=outcome.updated, unchanged=outcome.unchanged)
        tally.counts["duplicates"] += len(chunk.repeated - outcome.erased)
        tally.rejected.update(_general(reason) for reason in rejects.values())
        return [(ids.get(position, ""), reason) for position, reason in sorted(rejects.items())]

    def _merge(self, connection: Connection, chunk: Chunk) -> merging.Outcome:
        moved, refused = self._links.follow(connection, chunk.records)
        # Also of those whose rows have no usable address any more, or that of somebody else.
        astray = chunk.noes.left_ids & {*moved, *chunk.unlinked, *chunk.gone}
        left = chunk.noes.left | self._links.addresses(connection, astray)
        unwanted = subscribing.refused(connection, self.target.list) if self.target.list else set()
        taken = conflicts.taken(self.source.name, self._rules, chunk.records)
        inserted = updated = unchanged = 0
        erased: frozenset[int] = frozenset()
        for list_id, people in self._split(chunk, refused, unwanted):
            outcome = merging.merge_within(connection, people, list_id=list_id, now=self.now, mostly_new=self._mostly_new, source=self.source.name, taken=taken)
            inserted, updated, unchanged = inserted + outcome.inserted, updated + outcome.updated, unchanged + outcome.unchanged
            erased |= outcome.erased
        if self.target.list:
            subscribing.note_refused(connection, self.source.name, self.target.list, unwanted, self.now)
        if self._write_back:
            own = self.target.list.key if self.target.list and self._write_back.lists == "own" else None
            refusals.of_newcomers(connection, self.source.name, self._write_back, own, self._links.newcomers(), self.now)
        self._some_are_gone |= self._links.record(connection, [*chunk.unlinked, *self._ids_at(chunk, erased).values()], chunk.gone)
        # Whoever is new has the evidence, and was never subscribed before.
        some_are_known = inserted < chunk.people.num_rows
        if some_are_known:
            subscribing.note_evidence(connection, chunk.people)
        if self.target.list:
            subscribing.refuse(connection, self.source.name, self.target.list, left, chunk.noes.withdrawn, self.now)
            if self.source.write_back:
                refusals.learned(connection, self.source.name, left | chunk.noes.withdrawn, self.now)
            if some_are_known and self._some_are_gone:
                subscribing.begin_again(connection, self.source.name, self.target.list, self.now)
        return merging.Outcome(inserted, updated, unchanged, erased)

    def _split(self, chunk: Chunk, refused: Collection[str], unwanted: Collection[bytes]) -> Iterator[tuple[int | None, pa.Table]]:
        """The rows of contacts that may be subscribed with the list, and the others without, and without evidence."""
        import pyarrow as pa
        import pyarrow.compute as pc

        people, subscribes = chunk.people.drop_columns(["subscribes"]), chunk.people["subscribes"]
        if refused:
            theirs = chunk.records.filter(pc.is_in(chunk.records["external_id"], value_set=pa.array(list(refused), pa.string())))
            subscribes = pc.and_(subscribes, pc.invert(pc.is_in(people["line"], value_set=theirs[POSITION])))
        if unwanted:
            subscribes = pc.and_(subscribes, pc.invert(pc.is_in(people["address_hash"], value_set=pa.array(list(unwanted), pa.binary(16)))))
        list_id = self.target.list.id if self.target.list else None
        for id_, part in ((list_id, people.filter(subscribes)), (None, people.filter(pc.invert(subscribes)).drop_columns(["consent"]))):
            if part.num_rows:
                yield id_, part

    @staticmethod
    def _ids_at(chunk: Chunk, lines: Collection[int]) -> dict[int, str]:
        """By position, the ids of all records of the contacts that stand in these lines."""
        import pyarrow as pa
        import pyarrow.compute as pc

        if not lines:
            return {}
        hashes = chunk.people.filter(pc.is_in(chunk.people["line"], value_set=pa.array(list(lines), pa.int64())))["address_hash"]
        theirs = chunk.records.filter(pc.is_in(chunk.records["address_hash"], value_set=hashes))
        return dict(zip(theirs[POSITION].to_pylist(), theirs["external_id"].to_pylist(), strict=True))


def _general(reason: str) -> str:
    """A reason to count by: without the letter that stands in it."""
    return re.sub(r"'.' cannot stand", "a character cannot stand", reason)
