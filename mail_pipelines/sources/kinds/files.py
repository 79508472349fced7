"""Files: CSV, Parquet or JSON lines, on this host, in a store that speaks S3, or at any other URL of fsspec whose package is installed (gcsfs, adlfs …).

A file is read again in every run; deletions are noticed when a record stands in none of them any more.
"""

from __future__ import annotations

import csv
import glob
import io
import itertools
import json
import urllib.parse
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any, Literal

import pydantic

from mail_pipelines.sources.declaration import EnvironmentName, Form, first_problem
from mail_pipelines.sources.errors import SourceError
from mail_pipelines.sources.kinds import Wanted

_ROWS = 10_000
_S3 = "s3://"
_ENDINGS = {"parquet": "parquet", "jsonl": "jsonl", "ndjson": "jsonl", "json": "jsonl"}


class S3Options(Form):
    """`endpoint` is the store's address (`https://HOST`), none for AWS; `path_style` says that a bucket stands in the path and not in the host's name."""

    endpoint: str | None = None
    region: str | None = None
    path_style: bool = True
    anonymous: bool = False

    @pydantic.field_validator("endpoint")
    @classmethod
    def _is_an_address(cls, value: str | None) -> str | None:
        if value is not None:
            parts = urllib.parse.urlsplit(value)
            if parts.scheme not in ("http", "https") or not parts.hostname or "@" in parts.netloc or parts.path.strip("/") or parts.query:
                raise ValueError("expected the address of the store alone, as https://s3.example.com; the bucket stands in connection.url")
        return value


class S3Secrets(Form):
    access_key: EnvironmentName
    secret_key: EnvironmentName
    session_token: EnvironmentName | None = None


class Connection(Form):
    """`options` go to the store of the URL as they are, `secrets` with the values of environment variables: to fsspec, or for `s3://` in the forms above."""

    url: str
    options: dict[str, str | int | bool] = pydantic.Field(default={})
    secrets: dict[str, EnvironmentName] = pydantic.Field(default={})

    @pydantic.model_validator(mode="after")
    def _fits_the_store(self) -> Connection:
        if self.url.startswith(_S3):
            if wrong := next((name for name in self.options if name in S3Secrets.model_fields), None):
                raise ValueError(f"options.{wrong}: stands under secrets, with the name of an environment variable")
            if not self.url.removeprefix(_S3).strip("/"):
                raise ValueError("url: expected s3://BUCKET or s3://BUCKET/FOLDER")
            options = _form(S3Options, "options", self.options)
            if self.secrets:
                _form(S3Secrets, "secrets", self.secrets)
                if options.anonymous:
                    raise ValueError("options.anonymous: without a login there are no secrets; leave one of them out")
        return self


def _form(form: type[Form], place: str, given: dict[str, Any]) -> Any:
    try:
        return form.model_validate(given)
    except pydantic.ValidationError as error:
        raise ValueError(f"{place}.{first_problem(error)}; expected of {', '.join(form.model_fields)}") from None


class Read(Form):
    """`glob` below the URL. The format is that of the ending unless given."""

    glob: str
    format: Literal["csv", "parquet", "jsonl"] | None = None
    delimiter: str | None = None


def rows(connection: Connection, read: Read, wanted: Wanted) -> Iterator[Any]:
    files, root = _store(connection, wanted)
    paths = _found(files, root, read.glob)
    if not paths:
        raise SourceError(f"no file fits {read.glob!r} at the source; nothing is taken for deleted")
    for path in paths:
        name = path.rpartition("/")[2]
        try:
            version = files.ukey(path)
            with files.open(path, "rb", compression="gzip" if name.endswith(".gz") else None) as file:
                yield from pages(file, name, read.format, read.delimiter)
            changed = files.ukey(path) != version
        except FileNotFoundError:
            changed = True
        if changed:
            raise SourceError(f"{name} was changed or removed while it was read; nothing of this run was merged, and the next one reads it anew")


def _store(connection: Connection, wanted: Wanted) -> tuple[Any, str]:
    """The file system of the URL, and the folder in it."""
    import fsspec.core

    secrets = {key: wanted.secret(name) for key, name in connection.secrets.items()}
    if connection.url.startswith(_S3):
        from mail_pipelines.sources.kinds.s3 import S3

        options = S3Options.model_validate(connection.options)
        return S3(**options.model_dump(), secrets=secrets), connection.url.removeprefix(_S3).strip("/")
    try:
        # A file system that is kept would go on with the listing of the run before.
        files, root = fsspec.core.url_to_fs(connection.url, skip_instance_cache=True, **connection.options, **secrets)
    except (ImportError, ValueError) as error:
        protocol = connection.url.partition("://")[0]
        raise SourceError(f"connection.url: {protocol}:// cannot be read here: {error}") from None
    return files, root


def _found(files: Any, root: str, pattern: str) -> list[str]:
    """The files below `root` that fit, by name. On this host hidden ones do not: what is still being copied is often one."""
    from fsspec.implementations.local import LocalFileSystem

    if isinstance(files, LocalFileSystem):
        found = [Path(root, name) for name in glob.glob(pattern, root_dir=root, recursive=True)]  # noqa: PTH207 (pathlib takes hidden ones)
        return sorted(str(path) for path in found if path.is_file())
    return sorted(path for path, info in files.glob(f"{root.rstrip('/')}/{pattern}", detail=True).items() if info["type"] == "file")


def pages(file: IO[bytes], name: str, format_: str | None, delimiter: str | None) -> Iterator[Any]:
    """The rows of an open file. Raises `SourceError` if it is not of its format."""
    kind = format_ or next((kind for ending, kind in _ENDINGS.items() if f".{ending}" in name), "csv")
    reader: csv.DictReader[str] | None = None
    try:
        if kind == "parquet":
            import pyarrow as pa
            import pyarrow.parquet as pq

            # Buffered before, all of the file is held at once.
            for batch in pq.ParquetFile(file, pre_buffer=False).iter_batches(_ROWS):
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
    except (ValueError, OSError, EOFError, zlib.error) as error:
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
