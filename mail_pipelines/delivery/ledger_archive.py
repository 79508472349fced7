"""The archive of ledgers: what the database had of a campaign's recipients, as Parquet files outside it.

What belongs here: writing the files and holding them against the ledger, looking things up in them, and deleting from the database what is in them.
What does not: when a campaign is archived, and its state (`campaigns.archiving`).

A file is `<campaign id>/<table>-<number>-<front of its sha256>.parquet`, immutable. Its rows follow those of the file before by the table's key (`first` and
`last` of the contact), so that one file has all there is of a contact in a table. Recipients are ordered by the hash of their address within a file: an
address is found by the statistics of the row groups, whoever has it now. Imports pyarrow inside functions: evidence is applied on the send path too.
"""

from __future__ import annotations

import datetime as dt
import functools
import hashlib
import io
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine

from mail_pipelines.database.bulk import CHUNK_ROWS
from mail_pipelines.database.engine import reading, transact
from mail_pipelines.database.models import Base, Claim, Delivery, DeliveryEvent, State
from mail_pipelines.database.types import EnhancedCode, UtcDateTime
from mail_pipelines.errors import MailPipelinesError
from mail_pipelines.object_store import ObjectStore

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet

# So many rows are one file: while it is written they are in memory three times.
FILE_ROWS = 250_000
# So many are read to find one recipient.
_GROUP_ROWS = 8_192
# A transaction deletes no more: a tenth of a second on a very busy machine, so that nobody waits for it for long.
DELETED_AT_ONCE = 2_000
# {table: its files, in order}
Manifest: TypeAlias = dict[str, list[dict[str, Any]]]


class LedgerArchiveError(MailPipelinesError):
    """The archive of ledgers is away, damaged, or not what was written. What is in the database stays there."""


class Recipient(NamedTuple):
    """A row of the ledger, as it was archived."""

    contact_id: int
    address_hash: bytes
    shard: int
    provider: str
    state: int
    sort_key: int
    attempt: int
    claim_id: int | None
    server_id: int | None
    code: int | None
    enhanced: str | None
    reason: str | None


class Event(NamedTuple):
    """A delivery event, as it was archived."""

    id: int
    contact_id: int
    occurred_at: dt.datetime
    server_id: int | None
    attempt: int
    kind: str
    code: int | None
    enhanced: str | None
    reason: str | None
    text: str | None


class ArchivedClaim(NamedTuple):
    id: int
    opened_at: dt.datetime
    run_id: str
    server_id: int


@dataclass(frozen=True)
class _Table:
    """A table that is archived: `key` orders and tells apart the rows of one campaign; `order` is that of a file, if it is another."""

    model: type[Base]
    key: tuple[str, ...]
    order: str | None = None

    @property
    def name(self) -> str:
        return str(self.model.__tablename__)

    @property
    def columns(self) -> list[sa.Column[Any]]:
        """All but the campaign, which is that of the folder."""
        return [column for column in self.table.columns if column.name != "campaign_id"]

    @property
    def table(self) -> sa.Table:
        return self.model.metadata.tables[self.name]

    def schema(self) -> pa.Schema:
        import pyarrow as pa

        return pa.schema([(column.name, _arrow_type(column.type)) for column in self.columns])

    def of(self, campaign_id: int) -> sa.ColumnElement[bool]:
        return self.table.c.campaign_id == campaign_id


RECIPIENTS = _Table(Delivery, ("contact_id",), "address_hash")
EVENTS = _Table(DeliveryEvent, ("contact_id", "month", "id"))
CLAIMS = _Table(Claim, ("id",))


def _arrow_type(type_: sa.types.TypeEngine[Any]) -> pa.DataType:
    import pyarrow as pa

    if isinstance(type_, UtcDateTime):
        return pa.timestamp("us", tz="UTC")
    if type_.python_type is bytes:
        return pa.binary(16)
    if type_.python_type is str or isinstance(type_, EnhancedCode):
        return pa.string()
    return pa.int64()


class LedgerArchive:
    """The archive at a folder or a URL that fsspec knows. Every method raises `LedgerArchiveError` if it cannot do what it says."""

    def __init__(self, url: str, *, file_rows: int = FILE_ROWS) -> None:
        self._url = url
        self._file_rows = file_rows

    @functools.cached_property
    def _store(self) -> ObjectStore:
        if not self._url:
            raise LedgerArchiveError("campaigns.archive is not set: set it to the folder or URL that archived campaigns are in")
        return ObjectStore(self._url, "archive of campaigns", LedgerArchiveError, "what is in the database stays there")

    def check(self) -> None:
        """Raise `LedgerArchiveError` if it cannot be read now."""
        self._store.names()

    # --- writing ---

    def write(self, engine: Engine, campaign_id: int) -> Manifest:
        """Write all that the database has of the campaign's recipients, each file held against it once more; changes nothing in it.

        The ledger must not change meanwhile (its campaign is archived). Doing it again writes the same files.
        """
        return {table.name: list(self._write_table(engine, campaign_id, table)) for table in (RECIPIENTS, EVENTS, CLAIMS)}

    def _write_table(self, engine: Engine, campaign_id: int, table: _Table) -> Iterator[dict[str, Any]]:
        number, after = 0, None
        while (rows := self._next_rows(engine, campaign_id, table, after)).num_rows:
            recorded = self._write_file(campaign_id, table, number, rows)
            found = _in_key_order(table, self._whole(campaign_id, recorded))
            if not found.equals(self._next_rows(engine, campaign_id, table, after)):
                raise LedgerArchiveError(
                    f"{recorded['name']} of campaign {campaign_id} is not what the database has: nothing is deleted, and it is written again"
                )
            yield recorded
            number, after = number + 1, tuple(rows[name][-1].as_py() for name in table.key)

    def _next_rows(self, engine: Engine, campaign_id: int, table: _Table, after: Sequence[Any] | None) -> pa.Table:
        """The rows of the next file, in the order of the key."""
        import pyarrow as pa

        columns, key = table.columns, [table.table.c[name] for name in table.key]
        schema, chunks, rows = table.schema(), [], 0
        while rows < self._file_rows:
            where: list[sa.ColumnElement[bool]] = [table.of(campaign_id)]
            if after is not None:
                where += [key[0] >= after[0], sa.tuple_(*key) > sa.tuple_(*map(sa.literal, after))]
            limit = min(CHUNK_ROWS, self._file_rows - rows)
            with reading(engine) as connection:
                found = connection.execute(sa.select(*columns).where(*where).order_by(*key).limit(limit)).all()
            if found:
                values = zip(*found, strict=True)
                chunk = pa.table([pa.array(column, field.type) for column, field in zip(values, schema, strict=True)], schema=schema)
                after = tuple(chunk[name][-1].as_py() for name in table.key)
                chunks.append(chunk)
                rows += len(found)
            if len(found) < limit:
                break
        return pa.concat_tables(chunks) if chunks else schema.empty_table()

    def _write_file(self, campaign_id: int, table: _Table, number: int, rows: pa.Table) -> dict[str, Any]:
        import pyarrow.parquet as pq

        contacts = rows[table.key[0]]
        buffer = io.BytesIO()
        pq.write_table(rows.sort_by(table.order) if table.order else rows, buffer, row_group_size=_GROUP_ROWS, compression="zstd")
        data = buffer.getvalue()
        digest = hashlib.sha256(data).hexdigest()
        name = f"{table.name}-{number:04d}-{digest[:16]}.parquet"
        self._store.write(data, str(campaign_id), name)
        return {"name": name, "rows": rows.num_rows, "sha256": digest, "first": contacts[0].as_py(), "last": contacts[-1].as_py()}

    def remove_others(self, campaign_id: int, manifest: Manifest) -> None:
        """Remove files that a killed attempt left."""
        named = {recorded["name"] for files in manifest.values() for recorded in files}
        for name in self._store.names(str(campaign_id)):
            if name not in named:
                self._store.remove(str(campaign_id), name)

    # --- deleting what is written ---

    def verify(self, campaign_id: int, manifest: Manifest) -> None:
        """Read every file and compare its checksum with the recorded one."""
        for files in manifest.values():
            for recorded in files:
                self._bytes(campaign_id, recorded)

    def delete_archived(self, engine: Engine, campaign_id: int, manifest: Manifest) -> int:
        """Delete the recipients and events that the files have from the database, and nothing else; how many rows went.

        Claims are left to `delivery.upkeep`, which knows for how long servers need them. Recipients go first: whoever finds one still finds its events.
        """
        import pyarrow.compute as pc

        deleted = 0
        for recorded in manifest[RECIPIENTS.name]:
            ids = sorted(self._columns(campaign_id, recorded, ["contact_id"])["contact_id"].to_pylist())
            for start in range(0, len(ids), DELETED_AT_ONCE):
                last = min(start + DELETED_AT_ONCE, len(ids)) - 1
                deleted += _delete(engine, Delivery, Delivery.campaign_id == campaign_id, Delivery.contact_id.between(ids[start], ids[last]))
        for recorded in manifest[EVENTS.name]:
            events = self._columns(campaign_id, recorded, ["month", "id"]).sort_by("id")
            for month in sorted(pc.unique(events["month"]).to_pylist()):
                numbers = events.filter(pc.equal(events["month"], month))["id"].to_pylist()
                for start in range(0, len(numbers), DELETED_AT_ONCE):
                    chosen = numbers[start : start + DELETED_AT_ONCE]
                    deleted += _delete(engine, DeliveryEvent, DeliveryEvent.month == month, DeliveryEvent.id.in_(chosen))
        return deleted

    # --- looking up ---

    def recipients(self, campaign_id: int, manifest: Manifest, contact_ids: Collection[int]) -> dict[int, Recipient]:
        """Those of these contacts that were in the audience."""
        rows = self._look_up(campaign_id, manifest[RECIPIENTS.name], contact_ids, Recipient._fields)
        return {row["contact_id"]: Recipient(**row) for row in rows}

    def recipient_of(self, campaign_id: int, manifest: Manifest, address_hash: bytes) -> Recipient | None:
        """Who had the address in the audience."""
        import pyarrow.compute as pc

        for recorded in manifest[RECIPIENTS.name]:
            with self._opened(campaign_id, recorded) as file:
                groups = [number for number, least, most in _statistics(file, "address_hash") if least <= address_hash <= most]
                found = file.read_row_groups(groups, columns=list(Recipient._fields))
                found = found.filter(pc.equal(found["address_hash"], address_hash))
            if found.num_rows:
                return Recipient(**found.to_pylist()[0])
        return None

    def events(self, campaign_id: int, manifest: Manifest, contact_ids: Collection[int]) -> list[Event]:
        """All archived events of these contacts, in no order."""
        return [Event(**row) for row in self._look_up(campaign_id, manifest[EVENTS.name], contact_ids, Event._fields)]

    def claim(self, campaign_id: int, manifest: Manifest, claim_id: int) -> ArchivedClaim | None:
        """A claim that the database still had when the campaign was archived."""
        import pyarrow.compute as pc

        for recorded in manifest[CLAIMS.name]:
            if recorded["first"] <= claim_id <= recorded["last"]:
                found = self._columns(campaign_id, recorded, list(ArchivedClaim._fields))
                rows = found.filter(pc.equal(found["id"], claim_id)).to_pylist()
                return ArchivedClaim(**rows[0]) if rows else None
        return None

    def delivered(self, campaign_id: int, manifest: Manifest) -> Iterator[pa.Table]:
        """`contact_id` and `sort_key` of those to whom the message was delivered, in ascending order of contacts."""
        import pyarrow.compute as pc

        for recorded in manifest[RECIPIENTS.name]:
            rows = self._columns(campaign_id, recorded, ["contact_id", "sort_key", "state"])
            yield rows.filter(pc.equal(rows["state"], int(State.DELIVERED))).select(["contact_id", "sort_key"]).sort_by("contact_id")

    def _look_up(self, campaign_id: int, files: Sequence[Mapping[str, Any]], contact_ids: Collection[int], fields: Sequence[str]) -> Iterator[dict[str, Any]]:
        import pyarrow as pa
        import pyarrow.compute as pc

        wanted = sorted(contact_ids)
        for recorded in files:
            here = [contact_id for contact_id in wanted if recorded["first"] <= contact_id <= recorded["last"]]
            if not here:
                continue
            with self._opened(campaign_id, recorded) as file:
                for number, least, most in _statistics(file, "contact_id"):
                    if not any(least <= contact_id <= most for contact_id in here):
                        continue
                    # One narrow column first: where recipients are ordered by their addresses most groups have none of these.
                    chosen = pc.is_in(file.read_row_group(number, columns=["contact_id"])["contact_id"], pa.array(here, pa.int64()))
                    if pc.any(chosen).as_py():
                        yield from file.read_row_group(number, columns=list(fields)).filter(chosen).to_pylist()

    # --- files ---

    def _bytes(self, campaign_id: int, recorded: Mapping[str, Any]) -> bytes:
        data = self._store.read(str(campaign_id), recorded["name"])
        if hashlib.sha256(data).hexdigest() != recorded["sha256"]:
            raise LedgerArchiveError(
                f"{recorded['name']} of campaign {campaign_id} in the archive {self._store.url} is not what was written (sha256 differs): bring it back from a "
                "backup; nothing is deleted from the database until then"
            )
        return data

    def _whole(self, campaign_id: int, recorded: Mapping[str, Any]) -> pa.Table:
        import pyarrow.parquet as pq

        data = self._bytes(campaign_id, recorded)
        with self._store.told("read"):
            return pq.read_table(io.BytesIO(data))

    def _columns(self, campaign_id: int, recorded: Mapping[str, Any], columns: list[str]) -> pa.Table:
        with self._opened(campaign_id, recorded) as file:
            return file.read(columns=columns)

    @contextmanager
    def _opened(self, campaign_id: int, recorded: Mapping[str, Any]) -> Iterator[pyarrow.parquet.ParquetFile]:
        import pyarrow.parquet as pq

        with self._store.opened(str(campaign_id), recorded["name"]) as source, pq.ParquetFile(source) as file:
            yield file


def rows_in(manifest: Manifest) -> int:
    """How many recipients are in the archive."""
    return sum(int(recorded["rows"]) for recorded in manifest[RECIPIENTS.name])


def _in_key_order(table: _Table, rows: pa.Table) -> pa.Table:
    return rows.sort_by([(name, "ascending") for name in table.key]) if table.order else rows


def _statistics(file: pyarrow.parquet.ParquetFile, column: str) -> Iterator[tuple[int, Any, Any]]:
    """(number, least, most) of each row group of the file."""
    place = file.schema_arrow.get_field_index(column)
    for number in range(file.metadata.num_row_groups):
        found = file.metadata.row_group(number).column(place).statistics
        yield number, found.min, found.max


def _delete(engine: Engine, model: type[Base], *where: sa.ColumnElement[bool]) -> int:
    def work(connection: Connection) -> int:
        return connection.execute(sa.delete(model).where(*where)).rowcount

    return transact(engine, work)
