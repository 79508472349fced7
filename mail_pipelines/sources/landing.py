"""One section of a source into its staging table, by dlt: extracted into packages in a folder of the home, then loaded.

What belongs here: dlt. What does not: how a kind of source is read (`kinds`) and what the rows mean (`merging`). A process that is killed while it
extracts begins anew; one that is killed while it loads goes on with the packages that are there. dlt keeps no cursor: that moves with the merge (`running`).
"""

from __future__ import annotations

import dataclasses
import datetime as dt
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mail_pipelines.sources import kinds
from mail_pipelines.sources.declaration import EMAIL, Contacts, Source, Suppressions
from mail_pipelines.sources.errors import SourceError
from mail_pipelines.sources.staging import POSITION, Landing, Staging

if TYPE_CHECKING:
    import pyarrow as pa

_BATCH_ROWS = 10_000
CURSOR = "cursor_"
# Of a page, when its columns are named: so many records, and so many columns.
_LOOKED_AT, _NAMED = 100, 30
_SETTINGS = {
    "RUNTIME__DLTHUB_TELEMETRY": "false",
    "RUNTIME__LOG_LEVEL": "CRITICAL",
    # Who is in a package can be erased only if it is not kept.
    "LOAD__DELETE_COMPLETED_JOBS": "true",
    "LOAD__WORKERS": "1",
    "NORMALIZE__WORKERS": "1",
}


def columns_of(resource: Contacts | Suppressions) -> tuple[str, ...]:
    """The columns of the staging table: the targets of the mapping, and the cursor if it is none of them."""
    return (*resource.map.values(), *((CURSOR,) if resource.cursor else ()))


def land(source: Source, resource: Contacts | Suppressions, staging: Staging, folder: Path, *, since: str | None, run: int, now: dt.datetime) -> Landing:
    """Bring the section's rows into staging, or go on with what a killed run has left there; returns the landing, which is complete.

    `folder` is where dlt keeps packages. Raises `SourceError`; nothing is merged of a landing that failed.
    """
    landing = staging.landing()
    if landing is not None and landing.columns != columns_of(resource):
        landing = None
    if landing is not None and landing.complete:
        return landing
    pipeline = _pipeline(staging, folder)
    try:
        if landing is not None and pipeline.has_pending_data:
            pipeline.run()
        else:
            # Nothing of dlt's is needed from one landing to the next, and half an extraction is none.
            pipeline = _pipeline(staging, folder, anew=True)
            landing = Landing(columns_of(resource), since, now.isoformat(), run)
            staging.begin(landing)
            pages = kinds.rows(source.kind, source.connection, resource.read, _wanted(resource, since))
            _run(pipeline, staging, _picked(pages, resource))
    except Exception as error:
        raise explained(error) from error
    landing = dataclasses.replace(landing, complete=True)
    staging.note(landing)
    return landing


@dataclass(frozen=True)
class FirstPage:
    """What a first page has: rows, how many of them with a usable address, mapped columns in which nothing stands, and the columns that there are."""

    rows: int = 0
    usable: int = 0
    empty: tuple[str, ...] = ()
    columns: str = ""


def check(source: Source, resource: Contacts | Suppressions) -> FirstPage:
    """Read the first page. Raises `SourceError`."""
    from mail_pipelines.contacts import address_columns

    _prepare_dlt(None)
    try:
        for page in kinds.rows(source.kind, source.connection, resource.read, _wanted(resource, None)):
            for picked in _picked(iter([page]), resource):
                _, unusable = address_columns.encode(picked[EMAIL].combine_chunks())
                empty = tuple(column for column, target in resource.map.items() if not any(picked[target].to_pylist()))
                return FirstPage(picked.num_rows, picked.num_rows - len(unusable), empty, _names(page))
    except Exception as error:
        raise explained(error) from error
    return FirstPage()


def _wanted(resource: Contacts | Suppressions, since: str | None) -> kinds.Wanted:
    columns = dict.fromkeys([*resource.map, *([resource.cursor] if resource.cursor else [])])
    return kinds.Wanted(tuple(columns), resource.cursor, since, kinds.secret)


def _prepare_dlt(folder: Path | None) -> Any:
    os.environ.update({name: value for name, value in _SETTINGS.items() if name not in os.environ})
    if folder is not None:
        os.environ.setdefault("DLT_DATA_DIR", str(folder))
    import dlt

    return dlt


def _pipeline(staging: Staging, folder: Path, *, anew: bool = False) -> Any:
    dlt = _prepare_dlt(folder)
    if anew:
        shutil.rmtree(folder / staging.name, ignore_errors=True)

    @dlt.destination(batch_size=_BATCH_ROWS, loader_file_format="parquet", name="staging", naming_convention="direct", skip_dlt_columns_and_tables=True)  # type: ignore[untyped-decorator]
    def destination(batch: pa.RecordBatch, table: Mapping[str, Any]) -> None:  # noqa: ARG001 (dlt gives it)
        import pyarrow as pa

        staging.write(batch if isinstance(batch, pa.Table) else pa.Table.from_batches([batch]))

    return dlt.pipeline(pipeline_name=staging.name, pipelines_dir=str(folder), destination=destination(), dataset_name="staging")


def _run(pipeline: Any, staging: Staging, pages: Iterator[pa.Table]) -> None:
    import dlt

    pipeline.run(dlt.resource(pages, name=staging.name, write_disposition="append"), loader_file_format="parquet")


def _picked(pages: Iterator[Any], resource: Contacts | Suppressions) -> Iterator[pa.Table]:
    """The mapped columns of the pages as texts, each row with its position. Raises `SourceError` for a page without a needed column."""
    import pyarrow as pa

    position = 0
    wanted = {**{target: column for column, target in resource.map.items()}, **({CURSOR: resource.cursor} if resource.cursor else {})}
    says_who_left = resource.says_who_left if isinstance(resource, Contacts) else ()
    needed = {EMAIL: "has the addresses", **dict.fromkeys(says_who_left, "says who left")}
    for page in pages:
        count = page.num_rows if isinstance(page, pa.Table) else len(page)
        if not count:
            continue
        if position + count > resource.max_rows:
            raise SourceError(f"the source gives more than {resource.max_rows:,} rows: it does not end, or max_rows is too small")
        if isinstance(page, pa.Table):
            columns = {target: _texts(page, column) for target, column in wanted.items()}
        else:
            columns = {target: pa.array([_text(_nested(record, column)) for record in page], pa.string()) for target, column in wanted.items()}
            for target, what in needed.items():
                if not any(_has(record, wanted[target]) for record in page):
                    raise SourceError(f"the source gives no column {wanted[target]!r} any more, which {what}; its columns: {_names(page)}")
        yield pa.table({POSITION: pa.array(range(position, position + count), pa.int64()), **columns})
        position += count


def _names(page: pa.Table | Sequence[Mapping[str, Any]]) -> str:
    """The columns of a page, those within others by their dotted names."""
    import pyarrow as pa

    records = page.slice(0, _LOOKED_AT).to_pylist() if isinstance(page, pa.Table) else page[:_LOOKED_AT]
    found = {name for record in records for name in _dotted(record)}
    return ", ".join(sorted(found)[:_NAMED])


def _dotted(record: Mapping[str, Any]) -> Iterator[str]:
    for name, value in record.items():
        if name is not None:
            yield from (f"{name}.{inner}" for inner in value) if isinstance(value, Mapping) and value else [str(name)]


def _has(record: Mapping[str, Any], path: str) -> bool:
    """Whether a record has a column, be it empty or within one that is."""
    if path in record:
        return True
    value: Any = record
    for name in path.split("."):
        if value is None or value == []:
            return True
        try:
            value = _within(value, name)
        except LookupError:
            return False
    return True


def _nested(record: Mapping[str, Any], path: str) -> Any:
    """The value of a column; a dot leads into a nested one, and a number to an item of a list, unless the column's own name has it."""
    if path in record:
        return record[path]
    value: Any = record
    for name in path.split("."):
        try:
            value = _within(value, name)
        except LookupError:
            return None
    return value


def _within(value: Any, name: str) -> Any:
    """What stands in a value under a name or a number. Raises `LookupError` if nothing does."""
    if isinstance(value, Mapping):
        return value[name]
    if isinstance(value, list) and name.isdecimal():
        return value[int(name)]
    raise LookupError(name)


def _text(value: Any) -> str | None:
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
        return str(int(value))
    if isinstance(value, (dict, list)):
        return json.dumps(value, ensure_ascii=False)
    return value.isoformat() if isinstance(value, (dt.date, dt.datetime)) else str(value)


def _texts(page: pa.Table, name: str) -> pa.Array:
    import pyarrow as pa

    from mail_pipelines.contacts.files import as_text, field_type

    outer = name.partition(".")[0]
    if name not in page.column_names and outer in page.column_names and pa.types.is_nested(page.schema.field(outer).type):
        # Of Parquet and databases with such types; of JSON there are none.
        return pa.array([_text(_nested({outer: value}, name)) for value in page.column(outer).to_pylist()], pa.string())
    if name not in page.column_names:
        raise SourceError(f"the source has no column {name!r} any more; its columns: {', '.join(page.column_names[:_NAMED])}")
    column = page.column(name).combine_chunks()
    type_ = field_type(column.type)
    if type_ is None:
        return pa.array([_text(value) for value in column.to_pylist()], pa.string())
    return as_text(column, type_)


def explained(error: Exception) -> SourceError:
    """What went wrong in the words of this package: dlt wraps errors several times, and some hold addresses of requests or rows."""
    import sqlalchemy as sa

    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, SourceError):
            return cause
        if isinstance(cause, sa.exc.SQLAlchemyError):
            orig = getattr(cause, "orig", None)
            number = orig.args[0] if orig is not None and orig.args and isinstance(orig.args[0], int) else None
            words = f"{type(cause).__name__}{f', error {number}' if number else ''}"
            return SourceError(f"a database refuses ({words}): check connection, rights, table and columns of the source")
        if cause.__cause__ is None and cause.__context__ is None:
            break
        cause = cause.__cause__ or cause.__context__
    root = cause or error
    return SourceError(f"the source cannot be read: {type(root).__name__}")
