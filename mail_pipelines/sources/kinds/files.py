"""Files: CSV, Parquet or JSON lines, on this host or in object storage (any URL of fsspec whose package is installed: s3fs, gcsfs, adlfs …).

A file is read again in every run; deletions are noticed when a record stands in none of them any more.
"""

from __future__ import annotations

import csv
import io
import itertools
import json
from collections.abc import Iterable, Iterator
from typing import IO, Any, Literal

import pydantic

from mail_pipelines.sources.declaration import EnvironmentName, Form
from mail_pipelines.sources.errors import SourceError
from mail_pipelines.sources.kinds import Wanted

_ROWS = 10_000
_ENDINGS = {"parquet": "parquet", "jsonl": "jsonl", "ndjson": "jsonl", "json": "jsonl"}


class Connection(Form):
    """`options` go to fsspec as they are, `secrets` with the values of environment variables."""

    url: str
    options: dict[str, str | int | bool] = pydantic.Field(default={})
    secrets: dict[str, EnvironmentName] = pydantic.Field(default={})


class Read(Form):
    """`glob` below the URL. The format is that of the ending unless given."""

    glob: str
    format: Literal["csv", "parquet", "jsonl"] | None = None
    delimiter: str | None = None


def rows(connection: Connection, read: Read, wanted: Wanted) -> Iterator[Any]:
    from dlt.sources.filesystem import filesystem

    found = filesystem(bucket_url=connection.url, credentials=_file_system(connection, wanted), file_glob=read.glob)
    items = sorted(found, key=lambda item: str(item["file_url"]))
    if not items:
        raise SourceError(f"no file fits {read.glob!r} at the source; nothing is taken for deleted")
    for item in items:
        name = str(item["file_name"])
        with item.open(mode="rb", compression="enable" if name.endswith(".gz") else "disable") as file:
            yield from pages(file, name, read.format, read.delimiter)


def _file_system(connection: Connection, wanted: Wanted) -> Any:
    import fsspec

    protocol = connection.url.partition("://")[0] if "://" in connection.url else "file"
    secrets = {key: wanted.secret(name) for key, name in connection.secrets.items()}
    try:
        kind = fsspec.get_filesystem_class(protocol)
    except (ImportError, ValueError) as error:
        raise SourceError(f"connection.url: {protocol}:// cannot be read here: {error}") from None
    return kind(**connection.options, **secrets)


def pages(file: IO[bytes], name: str, format_: str | None, delimiter: str | None) -> Iterator[Any]:
    """The rows of an open file. Raises `SourceError` if it is not of its format."""
    kind = format_ or next((kind for ending, kind in _ENDINGS.items() if f".{ending}" in name), "csv")
    reader: csv.DictReader[str] | None = None
    try:
        if kind == "parquet":
            import pyarrow as pa
            import pyarrow.parquet as pq

            for batch in pq.ParquetFile(file).iter_batches(_ROWS):
                yield pa.Table.from_batches([batch])
            return
        text = io.TextIOWrapper(file, encoding="utf-8-sig", newline="")
        if kind == "jsonl":
            given: Iterator[Any] = _objects(text, name)
        else:
            head = text.readline()
            separator = delimiter or max(",;\t|", key=head.count)
            names = next(csv.reader([head], delimiter=separator), [])
            if any("@" in column for column in names):
                raise SourceError(f"{name} has no header: its first line holds an address; put a line with the names of the columns above it")
            given = reader = csv.DictReader(text, fieldnames=names, delimiter=separator, strict=True)
        while page := list(itertools.islice(given, _ROWS)):
            yield page
    except UnicodeDecodeError as error:
        raise SourceError(f"{name} is no text in UTF-8: have it written so (from a spreadsheet: 'CSV UTF-8'); nothing of this run was merged") from error
    except csv.Error as error:
        # Below the header; a quote that never closes swallows what follows.
        line = reader.reader.line_num + 1 if reader else 1
        raise SourceError(f"{name} is no readable csv in line {line:,} or before: {error}; nothing of this run was merged") from error
    except (ValueError, OSError) as error:
        raise SourceError(f"{name} is no readable {kind}: {type(error).__name__}; nothing of this run was merged") from error


def _objects(text: Iterable[str], name: str) -> Iterator[Any]:
    for number, line in enumerate(text, 1):
        if not line.strip():
            continue
        try:
            found = json.loads(line)
        except ValueError:
            found = None
        if not isinstance(found, dict):
            raise SourceError(f"{name}: line {number:,} is no JSON object, as each line of JSON lines is; nothing of this run was merged")
        yield found
