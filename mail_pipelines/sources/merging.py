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
from mail_pipelines.sources import conflicts, outbox, records, subscribing
from mail_pipelines.sources.declaration import EMAIL, TIME_ZONE, Contacts, Rule, Source
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


class Merge:
    """One run's merge of contacts; `chunk` takes staged rows in order."""

    def __init__(self, engine: Engine, source: Source, resource: Contacts, target: Target, *, run: int, now: dt.datetime) -> None:
        self.engine, self.source, self.resource, self.target, self.run, self.now = engine, source, resource, target, run, now
        self._keys = [key for key in resource.map.values() if key in target.types or key == TIME_ZONE]
        self._columns = [importing.Column(place, records.name_of(resource, key), key) for place, key in enumerate([EMAIL, *self._keys]) if place]
        self._seen = importing.Seen()
        self._mostly_new = False
        # How an address is spelled is the source's word.
        self._rules: dict[str, Rule] = {EMAIL: "theirs", **{key: resource.rule_of(key) for key in self._keys}}
        self._links = Links(source.name, target.list, run, now)

    def chunk(self, rows: pa.Table, tally: Tally) -> list[tuple[str, str]]:
        """Merge at most `CHUNK_ROWS` rows; returns id and reason of those left out."""
        import pyarrow as pa
        import pyarrow.compute as pc

        assert rows.num_rows <= CHUNK_ROWS
        tally.counts["read"] += rows.num_rows
        ids = records.ids(self.resource, rows)
        deleted = records.deleted(self.resource, rows)
        usable, rejects = records.usable(self.resource, rows, ids, deleted)
        tally.counts["duplicates"] += records.drop_older(usable)
        kept = rows.filter(pc.is_in(rows[POSITION], value_set=pa.array(list(usable), pa.int64())))
        batch = Batch(kept[POSITION].to_pylist(), [kept[key].combine_chunks() for key in (EMAIL, *self._keys)], [], 0.0)
        prepared = importing.prepare(batch, 0, self._columns, self.target.types, self._seen)
        for reject in prepared.rejects:
            rejects[reject.line] = reject.reason
            usable.pop(reject.line, None)
        by_id = {record.external_id: record for record in usable.values()}
        refused = self._links.follow(self.engine, by_id)
        by_hash = {record.address.hash: record for record in by_id.values()}
        noes = records.noes(self.resource, rows)
        # Two records may have one address: a no of one of them is the person's.
        subscribes = {digest for digest, record in by_hash.items() if record.subscribes and record.external_id not in refused} - noes.left - noes.withdrawn
        if self.target.list:
            with reading(self.engine) as connection:
                subscribes -= subscribing.refused(connection, self.target.list, subscribes)
        taken = conflicts.taken(self.engine, self.source.name, self._rules, by_hash)
        erased: set[int] = set()
        for list_id, chosen in self._split(prepared.rows, subscribes):
            outcome = merging.merge(self.engine, chosen, list_id=list_id, now=self.now, mostly_new=self._mostly_new, source=self.source.name, taken=taken)
            self._mostly_new = outcome.inserted > chosen.num_rows // 2
            tally.counts.update(inserted=outcome.inserted, updated=outcome.updated, unchanged=outcome.unchanged)
            erased |= outcome.erased
        rejects.update(dict.fromkeys(erased, importing.ERASED))
        tally.counts["duplicates"] += prepared.superseded + len(prepared.repeated - erased)
        seen = [external_id for position, external_id in ids.items() if position not in deleted]
        gone = [ids[position] for position in deleted if position in ids]
        tally.counts["deleted"] += len(deleted)

        def link(connection: Connection) -> None:
            found = self._links.record(connection, by_id, seen, gone)
            people = [(contact_id, record) for contact_id, record in found if record.address.hash in subscribes]
            subscribing.note_evidence(connection, self.source.name, self.resource.consent.evidence, people, self.now)
            if self.target.list:
                subscribing.refuse(connection, self.source.name, self.target.list, noes, self.now)
                if self.source.write_back:
                    outbox.learned(connection, self.source.name, noes.left | noes.withdrawn, self.now)
                subscribing.begin_again(connection, self.source.name, self.target.list, [contact_id for contact_id, _ in people], self.now)

        transact(self.engine, link)
        tally.rejected.update(_general(reason) for reason in rejects.values())
        return [(ids.get(position, ""), reason) for position, reason in sorted(rejects.items())]

    def _split(self, rows: pa.Table, subscribes: Collection[bytes]) -> Iterator[tuple[int | None, pa.Table]]:
        """The rows of contacts that may be subscribed with the list, and the others without."""
        import pyarrow as pa
        import pyarrow.compute as pc

        chosen = pc.is_in(rows["address_hash"], value_set=pa.array(list(subscribes), pa.binary(16)))
        list_id = self.target.list.id if self.target.list else None
        for id_, part in ((list_id, rows.filter(chosen)), (None, rows.filter(pc.invert(chosen)))):
            if part.num_rows:
                yield id_, part


def _general(reason: str) -> str:
    """A reason to count by: without the letter that stands in it."""
    return re.sub(r"'.' cannot stand", "a character cannot stand", reason)
