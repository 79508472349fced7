"""Contacts from a file into a list: columns to fields, rows to contacts, problems to a reject file.

What belongs here: what the columns of a file mean and how its rows are checked. What does not: file formats (`files`) and the
merge into the tables (`merging`). An import can be killed at any moment and run again: rows that are in already are left alone. Beside sending it
gives way (`portions`).
"""

from __future__ import annotations

import csv
import datetime as dt
import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, TextIO

from sqlalchemy.engine import Connection, Engine

from mail_pipelines.contacts import address_columns, attributes, fields, lists, merging, time_zones
from mail_pipelines.contacts.fields import FieldType
from mail_pipelines.contacts.files import Batch, ContactFile, ContactFileError, Reject, open_file
from mail_pipelines.contacts.portions import ahead, portions
from mail_pipelines.database.engine import transact
from mail_pipelines.errors import nearest

if TYPE_CHECKING:
    import pyarrow as pa

# What `--map column=` is given to say that the column holds the addresses.
ADDRESS_FIELD = "email"
# A column of this name, or mapped to it, is the contact's own time zone and no field.
TIME_ZONE = merging.TIME_ZONE
_ADDRESS_COLUMNS = frozenset({"email", "mail", "emailaddress", "mailaddress"})
ERASED = "the address was erased at the person's request and is not taken again"


@dataclass(frozen=True)
class ImportReport:
    """What became of a file's rows: `read` = `inserted` + `updated` + `unchanged` + `rejected` + `duplicates`.

    `duplicates` are rows whose address stands in another row, too: all are applied in order, so the last value of each field
    wins, and the contact counts once. `reject_file` has line and reason of each rejected row, or is None if there is none.
    """

    list_key: str
    read: int
    inserted: int
    updated: int
    unchanged: int
    rejected: int
    duplicates: int
    reject_file: Path | None


@dataclass(frozen=True)
class Column:
    """A column that is imported: its place, its name in the file, and the field it becomes, or `TIME_ZONE`."""

    place: int
    name: str
    key: str


@dataclass(frozen=True)
class Prepared:
    """A batch ready to be merged: `rows` in the columns of `merging.STAGED`, one a contact; `repeated` the lines whose address an earlier batch had."""

    rows: pa.Table
    rejects: list[Reject]
    repeated: frozenset[int]
    superseded: int
    fraction: float


def import_file(
    engine: Engine,
    path: Path,
    *,
    list_name: str,
    now: dt.datetime,
    mapping: Mapping[str, str] | None = None,
    types: Mapping[str, FieldType] | None = None,
    progress: Callable[[int, float], None] | None = None,
    reject_path: Path | None = None,
) -> ImportReport:
    """Import a CSV or Parquet file; contacts not yet known to the list are subscribed to it, which is made if there is none.

    `mapping` gives columns another field key, `email` to the one with the addresses, `time_zone` to the one with names of the IANA database, or
    nothing to leave one out. `types`
    declares fields; those unknown take the type of the Parquet column, or the narrowest that fits the first rows. An empty
    cell says nothing and changes nothing. Nobody who unsubscribed is subscribed again, no suppression is lifted.
    `progress` is called with the rows read and the fraction of the file. Rejects go to `<path>.rejected.csv` by default.

    Raises `ContactFileError`, `FieldError`, `InvalidKey` or `ListError` before anything is written if file, mapping, types or
    name cannot be used; `ContactFileError` in the middle if a Parquet file is damaged there.
    """
    with open_file(path) as file:
        email, columns = assign_columns(file, mapping or {}, types or {})
        first = next(file.batches, None)
        target, chosen = transact(engine, lambda connection: _declare(connection, file, first, columns, types or {}, list_name, now))
        batches = itertools.chain([first] if first else [], file.batches)
        prepared = _prepare_all(batches, email, columns, chosen)
        read = inserted = updated = unchanged = duplicates = 0
        mostly_new = False
        with RejectFile(reject_path or path.with_name(f"{path.name}.rejected.csv")) as rejects, closing(ahead(engine, prepared)) as ready:
            for batch in ready:
                erased: set[int] = set()
                for rows in portions(engine, batch.rows):
                    outcome = merging.merge(engine, rows, list_id=target.id, now=now, mostly_new=mostly_new)
                    mostly_new = outcome.inserted > rows.num_rows // 2
                    erased |= outcome.erased
                    inserted += outcome.inserted
                    updated += outcome.updated
                    unchanged += outcome.unchanged
                rejects.write(sorted(batch.rejects + [Reject(line, ERASED) for line in erased], key=lambda reject: reject.line))
                read += batch.rows.num_rows + len(batch.rejects) + batch.superseded
                duplicates += batch.superseded + len(batch.repeated - erased)
                if progress:
                    progress(read, batch.fraction)
    return ImportReport(target.key, read, inserted, updated, unchanged, rejects.count, duplicates, rejects.path if rejects.count else None)


# --- columns ----------------------------------------------------------------------------------------------------


def assign_columns(file: ContactFile, mapping: Mapping[str, str], types: Mapping[str, FieldType]) -> tuple[int, list[Column]]:
    """The place of the column with the addresses, and the columns that become fields. Raises `ContactFileError` or `FieldError`."""
    names = [name for name in file.columns if name]
    for name in mapping:
        if name not in names:
            raise ContactFileError(f"the file has no column {name!r}; {nearest(name, names)}")
    email = _address_column(names, mapping)
    columns: dict[str, Column] = {}
    for place, name in enumerate(file.columns):
        key = mapping.get(name, name)
        if name == email or not key:
            continue
        if name in file.refused:
            raise ContactFileError(f"column {name!r} is of type {file.refused[name]}, which no field can hold; leave it out with --map {name}=")
        try:
            if key.strip().lower().replace(" ", "_") == TIME_ZONE:
                key = TIME_ZONE
            else:
                key = fields.check_key(key) if name in mapping else fields.key_of(name)
        except fields.FieldError as error:
            raise fields.FieldError(f"column {name!r}: {error}; give it one with --map '{name}=KEY', or leave it out with --map '{name}='") from None
        if key in columns:
            raise ContactFileError(f"columns {columns[key].name!r} and {name!r} both become the field {key!r}; give one another key with --map")
        columns[key] = Column(place, name, key)
    for key in types:
        if key not in columns:
            raise fields.FieldError(f"no column of the file becomes the field {key!r}; {nearest(key, list(columns))}")
        fields.check_key(key)
    return file.columns.index(email), list(columns.values())


def _address_column(names: Sequence[str], mapping: Mapping[str, str]) -> str:
    mapped = [name for name, key in mapping.items() if key == ADDRESS_FIELD]
    found = mapped or [name for name in names if re.sub(r"[^a-z]", "", name.lower()) in _ADDRESS_COLUMNS and name not in mapping]
    if len(found) > 1:
        raise ContactFileError(f"columns {found[0]!r} and {found[1]!r} may both hold the addresses; say which one with --map '{found[0]}={ADDRESS_FIELD}'")
    if not found:
        raise ContactFileError(f"no column with the addresses; say which one it is with --map COLUMN={ADDRESS_FIELD} (columns: {', '.join(names)})")
    return found[0]


def _declare(
    connection: Connection,
    file: ContactFile,
    first: Batch | None,
    columns: Sequence[Column],
    types: Mapping[str, FieldType],
    list_name: str,
    now: dt.datetime,
) -> tuple[lists.MailingList, dict[str, FieldType]]:
    """The list, and the type of every field, both made where they are new."""
    known = fields.declared(connection)
    chosen: dict[str, FieldType] = {}
    for column in columns:
        if column.key == TIME_ZONE:
            continue
        texts = first.columns[column.place].to_pylist() if first else []
        type_ = types.get(column.key) or known.get(column.key) or file.types.get(column.name)
        chosen[column.key] = type_ or fields.infer_type(text.strip() for text in texts if text and text.strip())
        fields.declare(connection, column.key, chosen[column.key], label=column.name, now=now)
    return lists.ensure(connection, list_name, now=now), chosen


# --- rows -------------------------------------------------------------------------------------------------------


def _prepare_all(batches: Iterator[Batch], email: int, columns: Sequence[Column], types: Mapping[str, FieldType]) -> Iterator[Prepared]:
    seen = Seen()
    for batch in batches:
        yield prepare(batch, email, columns, types, seen)


def prepare(batch: Batch, email: int, columns: Sequence[Column], types: Mapping[str, FieldType], seen: Seen) -> Prepared:
    """The batch's rows checked and in the columns of `merging.STAGED`; `email` is the place of the addresses, `types` are those of the columns' keys."""
    return prepare_addressed(batch, *address_columns.encode(batch.columns[email]), columns, types, seen)


def prepare_addressed(
    batch: Batch, addresses: pa.Table, unusable: Mapping[int, str], columns: Sequence[Column], types: Mapping[str, FieldType], seen: Seen
) -> Prepared:
    """As `prepare`, where the addresses are there already, as `address_columns.encode` gives them."""
    import pyarrow as pa

    problems: dict[int, list[str]] = {row: [f"address: {reason}"] for row, reason in unusable.items()}
    encoded: dict[str, pa.Array] = {}
    for column in columns:
        texts = batch.columns[column.place]
        encoded[column.key], wrong = time_zones.encode(texts) if column.key == TIME_ZONE else attributes.encode(texts, types[column.key])
        for row, reason in wrong.items():
            problems.setdefault(row, []).append(f"column {column.name!r}: {reason}")
    hashes = addresses["address_hash"].to_pylist()
    kept = [row for row in range(len(hashes)) if row not in problems]
    # The last row of each address; earlier ones are merged into it.
    last = {hashes[row]: row for row in kept}
    superseded = len(kept) - len(last)
    if superseded:
        earlier: dict[int, list[int]] = {}
        for row in kept:
            if (final := last[hashes[row]]) != row:
                earlier.setdefault(final, []).append(row)
        encoded = {key: _merged(column, earlier) for key, column in encoded.items()}
        kept = [row for row in kept if last[hashes[row]] == row]
    lines = [batch.lines[row] for row in kept]
    if len(kept) < len(hashes):
        places = pa.array(kept, pa.int64())
        addresses, encoded = addresses.take(places), {key: column.take(places) for key, column in encoded.items()}
    repeated = seen.before(addresses["address_hash"].to_pylist())
    zones = encoded.pop(TIME_ZONE, pa.nulls(len(kept), pa.string()))
    rows = pa.table(
        {
            "line": pa.array(lines, pa.int64()),
            "repeated": repeated,
            **{name: addresses[name] for name in address_columns.NAMES},
            "time_zone": zones,
            "attributes": attributes.join(encoded, len(kept)),
        }
    )
    # In the order of the unique index, which is then written page by page.
    rows = rows.sort_by("address_hash")
    rejects = batch.rejects + [Reject(batch.lines[row], "; ".join(reasons)) for row, reasons in problems.items()]
    return Prepared(rows, rejects, frozenset(itertools.compress(lines, repeated.to_pylist())), superseded, batch.fraction)


def _merged(column: pa.Array, earlier: Mapping[int, Sequence[int]]) -> pa.Array:
    """The column with the newest value of the earlier rows where the last row has none."""
    import pyarrow as pa

    values = column.to_pylist()
    for row, before in earlier.items():
        values[row] = next((value for value in (values[number] for number in (row, *reversed(before))) if value is not None), None)
    return pa.array(values, pa.string())


class Seen:
    """Which addresses a file has had so far: 8 bytes each of their hashes, in sorted runs that grow by merging."""

    def __init__(self) -> None:
        self._runs: list[pa.Array] = []

    def before(self, hashes: Sequence[bytes]) -> pa.Array:
        """Whether each of these (distinct) hashes was given in an earlier call."""
        import pyarrow as pa
        import pyarrow.compute as pc

        prefixes = pa.array([int.from_bytes(digest[:8], "big") for digest in hashes], pa.uint64())
        found = pa.array([False] * len(hashes), pa.bool_())
        for run in self._runs:
            found = pc.or_(found, pc.not_equal(pc.search_sorted(run, prefixes, side="left"), pc.search_sorted(run, prefixes, side="right")))
        new = prefixes.filter(pc.invert(found)).sort()
        while self._runs and len(self._runs[-1]) <= 2 * len(new):
            new = pa.concat_arrays([self._runs.pop(), new]).sort()
        self._runs.append(new)
        return found


class RejectFile:
    """A CSV file of rejected rows, made at the first one. It holds places and reasons, not the rows: people in it could not be erased."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.count = 0
        self._file: TextIO | None = None

    def __enter__(self) -> RejectFile:
        # What an earlier import left there says nothing about this one.
        self.path.unlink(missing_ok=True)
        return self

    def write(self, rejects: Sequence[Reject]) -> None:
        if not rejects:
            return
        try:
            if self._file is None:
                self._file = self.path.open("w", encoding="utf-8", newline="")
                csv.writer(self._file).writerow(["line", "reason"])
            csv.writer(self._file).writerows([reject.line, reject.reason] for reject in rejects)
            self._file.flush()
        except OSError as error:
            raise ContactFileError(
                f"the rejected rows cannot be written to {self.path}: {error.strerror}; move the file to a folder you may write to"
            ) from error
        self.count += len(rejects)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._file is not None:
            self._file.close()
