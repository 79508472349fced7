"""The contact snapshot: one row for each contact with typed fields and list memberships, refreshed from the change feed.

Columns: contact_id, domain, provider, time_zone, created_at, `f<id>` for each custom field, `l<id>` for each list (true while subscribed),
and in deltas `deleted`. No address, and text only folded (`text.fold`). Times are naive UTC.

The state of a changed contact is read anew from the database, after the feed: whatever the feed's rows said and in whatever order they came,
what is written is at least as new as they are, and a contact that is gone becomes a tombstone. Where changes went unread (`contacts.changes`), everything is
made anew.

What does not belong here: consent. The freeze and each claim ask the database; snapshots only make lists. Imports pyarrow: import this inside functions.
"""

from __future__ import annotations

import dataclasses
import datetime as dt
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine

from mail_pipelines.contacts import changes
from mail_pipelines.database.engine import reading
from mail_pipelines.database.models import Contact, ContactChange, Subscription
from mail_pipelines.segments import parts
from mail_pipelines.segments.catalogue import CustomField, FieldType, KnownList, read_fields, read_lists
from mail_pipelines.segments.compilation import connect
from mail_pipelines.segments.criteria import AllOf, as_instant
from mail_pipelines.segments.feed import OVERLAP, Feed, Reading
from mail_pipelines.segments.manifest import ContactManifest, FeedPosition, Layer, SnapshotInfo, rows_of
from mail_pipelines.segments.matching import ContactMatcher
from mail_pipelines.segments.store import Writer, contact_store
from mail_pipelines.segments.text import fold

Progress = Callable[[str, int, int | None], None]

CHUNK_ROWS = 5_000
# Deltas are folded into the base when they are larger than this share of it …
REWRITE_SHARE = 0.05
REWRITE_ROWS = 20_000
# … or when a tombstone is this old: what was erased leaves the files well within the 72 hours promised.
REWRITE_AGE = dt.timedelta(hours=24)

ARROW_TYPES: dict[FieldType, pa.DataType] = {
    "text": pa.string(),
    "number": pa.float64(),
    "boolean": pa.bool_(),
    "date": pa.date32(),
    "datetime": pa.timestamp("us"),
}

CHANGES = Feed(number=ContactChange.seq, time=ContactChange.created_at, columns=(ContactChange.contact_id,), rising=True)


def schema_of(fields: Sequence[CustomField], lists: Sequence[KnownList]) -> pa.Schema:
    return pa.schema(
        [
            ("contact_id", pa.int64()),
            ("domain", pa.string()),
            ("provider", pa.string()),
            ("time_zone", pa.string()),
            ("created_at", pa.timestamp("us")),
            *((custom.column, ARROW_TYPES[custom.type]) for custom in fields),
            *((known.column, pa.bool_()) for known in lists),
            ("deleted", pa.bool_()),
        ]
    )


# --- values -----------------------------------------------------------------------------------------------------


def _text(value: Any) -> str | None:
    return fold(value) if isinstance(value, str) else None


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def _boolean(value: Any) -> bool | None:
    return value if isinstance(value, bool) else None


def _date(value: Any) -> dt.date | None:
    try:
        return dt.date.fromisoformat(value)
    except (TypeError, ValueError):
        return None


def _datetime(value: Any) -> dt.datetime | None:
    try:
        return as_instant(dt.datetime.fromisoformat(value)).replace(tzinfo=None)
    except (TypeError, ValueError, OverflowError):
        return None


# A JSON value as a value of the type, or None if it is none.
CONVERTERS: dict[FieldType, Callable[[Any], Any]] = {"text": _text, "number": _number, "boolean": _boolean, "date": _date, "datetime": _datetime}


# --- rows -------------------------------------------------------------------------------------------------------


@dataclass
class ContactReader:
    """Rows of contacts as Arrow tables. Counts the values that did not fit their field."""

    fields: Sequence[CustomField]
    lists: Sequence[KnownList]
    unusable: int = 0
    deleted: int = 0
    schema: pa.Schema = field(init=False)

    def __post_init__(self) -> None:
        self.schema = schema_of(self.fields, self.lists)

    def everyone(self, engine: Engine) -> Iterator[pa.Table]:
        """All contacts in ascending order of id, a chunk for each transaction."""
        last = None
        while True:
            with reading(engine) as connection:
                rows = connection.execute(self._contacts().where(sa.true() if last is None else Contact.id > last).limit(CHUNK_ROWS)).tuples().all()
                if not rows:
                    return
                last = rows[-1][0]
                table = self._table(rows, self._subscriptions(connection, Subscription.contact_id.between(rows[0][0], last)))
            yield table

    def some(self, engine: Engine, contact_ids: np.ndarray) -> Iterator[pa.Table]:
        """The contacts of ascending ids; those that are gone are tombstones."""
        for start in range(0, len(contact_ids), CHUNK_ROWS):
            wanted = contact_ids[start : start + CHUNK_ROWS]
            ids = wanted.tolist()
            with reading(engine) as connection:
                rows = connection.execute(self._contacts().where(Contact.id.in_(ids))).tuples().all()
                table = self._table(rows, self._subscriptions(connection, Subscription.contact_id.in_(ids)))
            gone = np.setdiff1d(wanted, table["contact_id"].to_numpy(), assume_unique=True)
            self.deleted += len(gone)
            tombstones = parts.conform(pa.table({"contact_id": gone, "deleted": np.ones(len(gone), bool)}), self.schema)
            yield pa.concat_tables([table, tombstones]).sort_by("contact_id")

    def _contacts(self) -> sa.Select[Any]:
        return sa.select(Contact.id, Contact.domain, Contact.provider, Contact.time_zone, Contact.created_at, Contact.attributes).order_by(Contact.id)

    def _subscriptions(self, connection: Connection, which: sa.ColumnElement[bool]) -> Sequence[tuple[int, int]]:
        return connection.execute(sa.select(Subscription.contact_id, Subscription.list_id).where(which, Subscription.subscribed)).tuples().all()

    def _table(self, rows: Sequence[tuple[Any, ...]], subscriptions: Sequence[tuple[int, int]]) -> pa.Table:
        ids = np.fromiter((row[0] for row in rows), np.int64, len(rows))
        columns: dict[str, Any] = {
            "contact_id": ids,
            "domain": [row[1] for row in rows],
            "provider": [row[2] for row in rows],
            "time_zone": [row[3] for row in rows],
            "created_at": [row[4].replace(tzinfo=None) for row in rows],
        }
        attributes = [row[5] or {} for row in rows]
        for custom in self.fields:
            convert, key = CONVERTERS[custom.type], custom.key
            given = [values.get(key) for values in attributes]
            columns[custom.column] = [None if value is None else convert(value) for value in given]
            self.unusable += sum(value is None for value in columns[custom.column]) - sum(value is None for value in given)
        members: dict[int, np.ndarray] = {known.id: np.zeros(len(rows), bool) for known in self.lists}
        if len(rows):
            contact_ids = np.fromiter((row[0] for row in subscriptions), np.int64, len(subscriptions))
            places = np.minimum(np.searchsorted(ids, contact_ids), len(rows) - 1)
            for (contact_id, list_id), place in zip(subscriptions, places.tolist(), strict=True):
                # A contact or list that came after the rows were read has its own change in the feed.
                if list_id in members and ids[place] == contact_id:
                    members[list_id][place] = True
        columns.update((f"l{list_id}", member) for list_id, member in members.items())
        return pa.table([pa.array(columns.get(column.name, [False] * len(rows)), column.type) for column in self.schema], schema=self.schema)


def slim(table: pa.Table) -> pa.Table:
    """Without the columns in which no contact of the part has a value: a reader takes a missing field as absent and a missing list as no member."""

    def says_nothing(name: str) -> bool:
        column = table[name]
        if pa.types.is_boolean(column.type) and not name.startswith("f"):
            return pc.any(column).as_py() is not True
        return bool(column.null_count == len(column))

    return table.drop_columns([name for name in table.column_names if name not in ("contact_id", "domain", "provider") and says_nothing(name)])


# --- refresh ----------------------------------------------------------------------------------------------------


def refresh(engine: Engine, folder: Any, *, now: dt.datetime, min_free_mb: int, progress: Progress) -> SnapshotInfo:
    """See `snapshots.refresh_contacts`."""
    with contact_store(engine, folder).writing(now, min_free_mb) as writer:
        with reading(engine) as connection:
            fields, lists = read_fields(connection), read_lists(connection)
        reader = ContactReader(fields, lists)
        old = writer.current
        changed = None if old is None else _changes(engine, writer, old.position)
        if old is None or changed is None or _has_missed(engine, old.position):
            old, (contact_ids, manifest) = None, _build(engine, writer, reader, progress)
        else:
            contact_ids, manifest = _advance(engine, writer, reader, old, *changed, progress)
        rewritten = old is None or manifest.base != old.base
        manifest = dataclasses.replace(manifest, rows=_count(writer, manifest))
        writer.publish(manifest)
        size = sum(part.size for part in manifest.parts())
        return SnapshotInfo(
            "contacts", manifest.version, now, manifest.rows, contact_ids, reader.deleted, reader.unusable, rewritten, len(list(manifest.parts())), size
        )


def _changes(engine: Engine, writer: Writer[ContactManifest], after: FeedPosition) -> tuple[np.ndarray, FeedPosition]:
    """Ids of contacts that changed after a position, ascending, and the position reached."""
    with reading(engine) as connection:
        feed = Reading(CHANGES, connection, writer.path, after, writer.now)
        chunks = [np.fromiter((row[2] for row in chunk), np.int64, len(chunk)) for chunk in feed]
    return np.unique(np.concatenate([np.empty(0, np.int64), *chunks])), feed.position(writer.new_name("seen"))


def _has_missed(engine: Engine, position: FeedPosition) -> bool:
    """Whether changes went that a reading up to `position` had not seen. To be asked after the reading that follows it."""
    with reading(engine) as connection:
        gone = changes.gone(connection)
    return gone is not None and (position.last < gone.seq or position.read_at - OVERLAP < gone.created_before)


def _build(engine: Engine, writer: Writer[ContactManifest], reader: ContactReader, progress: Progress) -> tuple[int, ContactManifest]:
    # The feed first: whatever is in it now is in the rows read after it.
    with reading(engine) as connection:
        newest = connection.execute(sa.select(sa.func.coalesce(sa.func.max(ContactChange.seq), 0))).scalar_one()
    _, position = _changes(engine, writer, FeedPosition(writer.now, newest, None))
    with reading(engine) as connection:
        total = connection.execute(sa.select(sa.func.count()).select_from(Contact)).scalar_one()
    layer = parts.LayerWriter(writer.path, writer.new_name, "base", slim)
    done = 0
    for table in reader.everyone(engine):
        layer.add(table)
        done += table.num_rows
        progress("contacts", done, total)
    return done, ContactManifest(writer.version, writer.now, position, tuple(reader.fields), tuple(reader.lists), 0, layer.layer())


def _advance(
    engine: Engine,
    writer: Writer[ContactManifest],
    reader: ContactReader,
    old: ContactManifest,
    ids: np.ndarray,
    position: FeedPosition,
    progress: Progress,
) -> tuple[int, ContactManifest]:
    layer = parts.LayerWriter(writer.path, writer.new_name, "delta", slim)
    done = 0
    for table in reader.some(engine, ids):
        layer.add(table)
        done += table.num_rows
        progress("contacts", done, len(ids))
    deltas = (*old.deltas, layer.layer()) if len(ids) else old.deltas
    manifest = dataclasses.replace(
        old,
        version=writer.version,
        made_at=writer.now,
        position=position,
        fields=tuple(reader.fields),
        lists=tuple(reader.lists),
        deltas=deltas,
        oldest_tombstone_at=old.oldest_tombstone_at or (writer.now if reader.deleted else None),
    )
    return len(ids), _tidied(writer, reader.schema, manifest)


def _tidied(writer: Writer[ContactManifest], schema: pa.Schema, manifest: ContactManifest) -> ContactManifest:
    """Fold the deltas into the base if it is time, else keep their number small."""
    changed = sum(map(rows_of, manifest.deltas))
    oldest = manifest.oldest_tombstone_at
    if changed > max(REWRITE_ROWS, REWRITE_SHARE * rows_of(manifest.base)) or (oldest is not None and writer.now - oldest >= REWRITE_AGE):
        base = _folded(writer, schema, "base", manifest.base, manifest.deltas, _living)
        return dataclasses.replace(manifest, base=base, deltas=(), oldest_tombstone_at=None)
    count = parts.merged_tail(manifest.deltas)
    if count < 2:
        return manifest
    oldest_of_tail, *rest = manifest.deltas[-count:]
    merged = _folded(writer, schema, "delta", oldest_of_tail, rest, parts.newest)
    return dataclasses.replace(manifest, deltas=(*manifest.deltas[:-count], merged))


def _folded(writer: Writer[ContactManifest], schema: pa.Schema, what: str, older: Layer, newer: Sequence[Layer], combine: parts.Combine) -> Layer:
    layer = parts.LayerWriter(writer.path, writer.new_name, what, slim)
    parts.fold(layer, writer.path, schema, older, newer, combine)
    return layer.layer()


def _living(tables: Sequence[pa.Table]) -> pa.Table:
    joined = parts.newest(tables)
    return joined.filter(pc.invert(pc.fill_null(joined["deleted"], False)))


def _count(writer: Writer[ContactManifest], manifest: ContactManifest) -> int:
    everybody = ContactMatcher(connect(), writer.path, manifest, AllOf(()), writer.now)
    return sum(table.num_rows for table in everybody.tables())
