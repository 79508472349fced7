"""Contact files as batches of text columns: CSV and Parquet, streamed, with the place and reason of every row that cannot be read.

What belongs here: file formats. What does not: what a column means (`importing`) and what a text means (`fields`).
"""

from __future__ import annotations

import csv
import io
import itertools
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from mail_pipelines.errors import MailPipelinesError

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

    from mail_pipelines.contacts.fields import FieldType

BATCH_ROWS = 10_000
_BLOCK_LINES = 2_000
_PARQUET_MAGIC = b"PAR1"
_DELIMITERS = ",;\t|"


class ContactFileError(MailPipelinesError):
    """A file that cannot be imported, or not with this mapping."""


@dataclass(frozen=True)
class Reject:
    """A row left out. `line` counts from 1 with the header in CSV (where the record begins), and without one in Parquet."""

    line: int
    reason: str


@dataclass(frozen=True)
class Batch:
    """Up to `BATCH_ROWS` readable rows: `lines` their places, `columns` text arrays in the order of the file's columns. `fraction` of the file is read."""

    lines: list[int]
    columns: list[pa.Array]
    rejects: list[Reject]
    fraction: float


@dataclass(frozen=True)
class ContactFile:
    """An open file: the names of its columns (empty for a column without name), its rows, and what a Parquet file says of the columns:
    `types` are theirs, `refused` those (with their Arrow type) that no field can hold. Batches leave the refused ones empty.
    """

    columns: list[str]
    types: dict[str, FieldType]
    refused: dict[str, str]
    batches: Iterator[Batch]


@contextmanager
def open_file(path: Path) -> Iterator[ContactFile]:
    """Open a CSV (UTF-8, delimiter found by the header) or Parquet file. Raises `ContactFileError` if it is neither, empty or without a header."""
    try:
        file = path.open("rb")
    except OSError as error:
        raise ContactFileError(f"{path} cannot be read: {error.strerror}") from error
    with file:
        head = file.read(4)
        file.seek(0)
        size = path.stat().st_size
        if not head:
            raise ContactFileError(f"{path} is empty: expected CSV with a header line, or Parquet")
        if head == _PARQUET_MAGIC or path.suffix.lower() == ".parquet":
            yield _open_parquet(path, file)
        else:
            yield _open_csv(path, file, size)


# --- CSV --------------------------------------------------------------------------------------------------------


class _Lines:
    """Physical lines by number, which can be given back: a stray quote swallows lines that are records of their own."""

    def __init__(self, file: io.TextIOWrapper) -> None:
        self._file = file
        self._returned: deque[str] = deque()
        self.taken: list[str] = []
        self.number = 0

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        line = self._returned.popleft() if self._returned else next(self._file)
        self.taken.append(line)
        self.number += 1
        return line

    def block(self, size: int) -> list[str]:
        """Up to `size` lines at once; none at the end of the file."""
        lines = [self._returned.popleft() for _ in range(min(size, len(self._returned)))]
        lines += itertools.islice(self._file, size - len(lines))
        self.number += len(lines)
        return lines

    def give_back(self, lines: list[str]) -> None:
        self.number -= len(lines)
        self._returned.extendleft(reversed(lines))


def _open_csv(path: Path, file: BinaryIO, size: int) -> ContactFile:
    # Bytes that are no UTF-8 become lone surrogates, so that one such row does not end the reading.
    lines = _Lines(io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline=""))
    header, delimiter = _csv_header(path, lines)
    return ContactFile(header, {}, {}, _csv_batches(lines, file, size, delimiter, len(header)))


def _csv_header(path: Path, lines: _Lines) -> tuple[list[str], str]:
    for line in lines:
        if line.strip():
            break
    else:
        raise ContactFileError(f"{path} is empty: expected CSV with a header line, or Parquet")
    if _unreadable([line]):
        raise ContactFileError(f"{path} is no text in UTF-8: save it as CSV in UTF-8 (from a spreadsheet: 'CSV UTF-8'), or as Parquet")
    delimiter = max(_DELIMITERS, key=line.count)
    try:
        header = next(csv.reader([line], delimiter=delimiter, strict=True))
    except csv.Error as error:
        raise ContactFileError(f"{path}: the header line is no CSV: {error}") from error
    names = [name.strip() for name in header]
    if any("@" in name for name in names):
        raise ContactFileError(f"{path} has no header: its first line holds an address; put a line with the names of the columns above it")
    _check_names(path, names)
    return names, delimiter


def _check_names(path: Path, names: list[str]) -> None:
    twice = sorted({name for name in names if name and names.count(name) > 1})
    if twice:
        raise ContactFileError(f"{path}: {twice[0]!r} is the name of more than one column; name them apart")


def _unreadable(lines: list[str]) -> str | None:
    """Why lines cannot be taken as text."""
    for line in lines:
        if "\0" in line:
            return "holds a NUL character"
        if not line.isascii():
            try:
                line.encode()
            except UnicodeEncodeError:
                return "is no text in UTF-8"
    return None


def _csv_batches(lines: _Lines, file: BinaryIO, size: int, delimiter: str, width: int) -> Iterator[Batch]:
    import pyarrow as pa

    places: list[int] = []
    pieces: list[list[pa.Array]] = []
    rejects: list[Reject] = []
    while True:
        block = lines.block(_BLOCK_LINES)
        if block and (columns := _clean_block(block, delimiter, width)) is not None:
            places.extend(range(lines.number - len(block) + 1, lines.number + 1))
            pieces.append(columns)
        elif block:
            end = lines.number
            lines.give_back(block)
            rows: list[list[str]] = []
            for place, row in _records(lines, delimiter, width, end):
                if isinstance(row, str):
                    rejects.append(Reject(place, row))
                else:
                    places.append(place)
                    rows.append(row)
            pieces.append([pa.array([row[number] for row in rows], pa.string()) for number in range(width)])
        if len(places) + len(rejects) > BATCH_ROWS - _BLOCK_LINES or (not block and (places or rejects)):
            yield Batch(places, [pa.concat_arrays(column) for column in zip(*pieces, strict=True)], rejects, min(1.0, file.tell() / size))
            places, pieces, rejects = [], [], []
        if not block:
            return


def _clean_block(block: list[str], delimiter: str, width: int) -> list[pa.Array] | None:
    """The columns of lines that are one sound record each, several times faster than record by record; None if any is not."""
    import pyarrow as pa
    import pyarrow.csv

    text = "".join(block)
    if "\0" in text:
        return None
    try:
        data = text.encode()
        if '"' in text:
            records = list(csv.reader(block, delimiter=delimiter, strict=True))
            if len(records) != len(block) or {len(record) for record in records} != {width}:
                return None
        names = [str(number) for number in range(width)]
        rows = pyarrow.csv.read_csv(
            pa.BufferReader(data),
            pyarrow.csv.ReadOptions(column_names=names, use_threads=False, block_size=len(data) + 1),
            pyarrow.csv.ParseOptions(delimiter=delimiter),
            pyarrow.csv.ConvertOptions(check_utf8=False, column_types=dict.fromkeys(names, pa.string()), strings_can_be_null=False),
        )
    except (UnicodeEncodeError, csv.Error, pa.ArrowInvalid):
        return None
    return [column.combine_chunks() for column in rows.columns] if rows.num_rows == len(block) else None


def _records(lines: _Lines, delimiter: str, width: int, end: int) -> Iterator[tuple[int, list[str] | str]]:
    """The records that begin up to line `end`, each with its first line: its values, or what is wrong with it."""
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    while lines.number < end:
        lines.taken.clear()
        place = lines.number + 1
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            # The quoting is broken, so the lines after the first are not known to belong to it: they are read again on their own.
            lines.give_back(lines.taken[1:])
            yield place, "a quote is opened that never closes properly" if len(lines.taken) > 1 else f"is no CSV: {error}"
            continue
        if row:
            problem = _unreadable(lines.taken) or (None if len(row) == width else f"has {len(row)} values, the header has {width}")
            yield place, problem or row


# --- Parquet ----------------------------------------------------------------------------------------------------


def _open_parquet(path: Path, file: BinaryIO) -> ContactFile:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        # Buffered before, all of the file would be held at once.
        parquet = pq.ParquetFile(file, pre_buffer=False)
    except (pa.ArrowException, OSError) as error:
        raise ContactFileError(f"{path} is no readable Parquet file: {str(error).splitlines()[0]}") from error
    schema = parquet.schema_arrow
    _check_names(path, list(schema.names))
    types = {field.name: type_ for field in schema if (type_ := field_type(field.type))}
    refused = {field.name: str(field.type) for field in schema if field.name not in types}
    return ContactFile(list(schema.names), types, refused, _parquet_batches(path, parquet, types))


def field_type(arrow: pa.DataType) -> FieldType | None:
    import pyarrow as pa

    if pa.types.is_dictionary(arrow):
        arrow = arrow.value_type
    if pa.types.is_boolean(arrow):
        return "boolean"
    if pa.types.is_integer(arrow) or pa.types.is_floating(arrow) or pa.types.is_decimal(arrow):
        return "number"
    if pa.types.is_date(arrow):
        return "date"
    if pa.types.is_timestamp(arrow):
        return "datetime"
    if pa.types.is_string(arrow) or pa.types.is_large_string(arrow) or pa.types.is_string_view(arrow) or pa.types.is_null(arrow):
        return "text"
    return None


def _parquet_batches(path: Path, parquet: pq.ParquetFile, types: dict[str, FieldType]) -> Iterator[Batch]:
    import pyarrow as pa

    total, done = parquet.metadata.num_rows, 0
    try:
        for rows in parquet.iter_batches(BATCH_ROWS):
            lines = range(done + 1, done + rows.num_rows + 1)
            done += rows.num_rows
            columns = [
                as_text(column, types[name]) if name in types else pa.nulls(rows.num_rows, pa.string())
                for name, column in zip(rows.schema.names, rows.columns, strict=True)
            ]
            yield _without_broken_text(lines, columns, done / total)
    except (pa.ArrowException, OSError) as error:
        raise ContactFileError(f"{path} is damaged after row {done}: {str(error).splitlines()[0]}; the rows before it are in") from error


def as_text(column: pa.Array, type_: FieldType) -> pa.Array:
    """A column in the texts that `fields.parse_value` reads."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if pa.types.is_floating(column.type):
        column = pc.if_else(pc.is_nan(column), None, column)
        if pc.all(pc.equal(pc.trunc(column), column)).as_py() and pc.all(pc.less(pc.abs(column), 1e15)).as_py():
            column = column.cast(pa.int64())
    elif type_ == "date":
        column = column.cast(pa.date32())
    elif type_ == "datetime":
        # A time without zone is taken as UTC; the cast of one with a zone gives UTC.
        text = column.cast(pa.timestamp("us")).cast(pa.string())
        return pc.binary_join_element_wise(pc.replace_substring_regex(text, r"\.000000$", ""), "Z", "")
    return column.cast(pa.string())


def _without_broken_text(lines: range, columns: list[pa.Array], fraction: float) -> Batch:
    """A batch without the rows that hold bytes which are no UTF-8: Parquet files may, and Arrow does not look."""
    import pyarrow as pa

    broken: set[int] = set()
    for column in columns:
        try:
            column.validate(full=True)
        except pa.ArrowInvalid:
            broken |= {number for number, value in enumerate(column.cast(pa.binary()).to_pylist()) if value is not None and not _is_utf8(value)}
    if not broken:
        return Batch(list(lines), columns, [], fraction)
    kept = [number for number in range(len(lines)) if number not in broken]
    rejects = [Reject(lines[number], "is no text in UTF-8") for number in sorted(broken)]
    return Batch([lines[number] for number in kept], [column.take(pa.array(kept, pa.int64())) for column in columns], rejects, fraction)


def _is_utf8(value: bytes) -> bool:
    try:
        value.decode()
    except UnicodeDecodeError:
        return False
    return True
