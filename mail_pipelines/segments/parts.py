"""Parquet files of snapshots: how they are encoded, and layers of them that are folded into one another.

A snapshot is a small log-structured merge tree: one big layer, and smaller, newer ones, each sorted by contact id. A refresh
writes a layer of the size of the change; `fold` rewrites only those files of the older layer whose range of ids is touched.

What does not belong here: what the columns mean (`contact_snapshot`, `engagement_snapshot`). Imports pyarrow: import this inside functions.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from mail_pipelines.segments.manifest import Layer, Part, rows_of

PART_ROWS = 262_144
ROW_GROUP_ROWS = 131_072
# A layer is merged into the one before it when that is not at least so many times larger: few layers, each row merged O(log n) times.
LAYER_GROWTH = 4
SMALL_LAYER_ROWS = 10_000

Combine = Callable[[Sequence[pa.Table]], pa.Table]
NewName = Callable[[str], str]


def write_part(folder: Path, name: str, table: pa.Table) -> Part:
    """Write one file and make it durable.

    Whole numbers and times are delta-packed (sorted ids then take about a byte and decode at memory speed), epoch seconds (uint32)
    stay plain, other columns are dictionary-encoded; only text is compressed, for the rest it costs more time than it saves
    (10 M ids: 22 ms against 117 ms).
    """
    delta = [field.name for field in table.schema if pa.types.is_int64(field.type) or pa.types.is_timestamp(field.type)]
    plain = [field.name for field in table.schema if pa.types.is_uint32(field.type)]
    path = folder / name
    with path.open("xb") as file:
        pq.write_table(
            table,
            file,
            row_group_size=ROW_GROUP_ROWS,
            compression={field.name: "lz4" if pa.types.is_string(field.type) or pa.types.is_dictionary(field.type) else "none" for field in table.schema},
            use_dictionary=[field.name for field in table.schema if field.name not in (*delta, *plain)],
            column_encoding=dict.fromkeys(delta, "DELTA_BINARY_PACKED"),
            store_schema=False,
        )
        file.flush()
        os.fsync(file.fileno())
    bounds = pc.min_max(table["contact_id"]).as_py() if table.num_rows else {"min": 0, "max": 0}
    return Part(name, table.num_rows, tuple(table.column_names), bounds["min"], bounds["max"], path.stat().st_size)


class LayerWriter:
    """Cuts a stream of tables in ascending order of contact id into parts. `slim` may drop columns that say nothing in a part."""

    def __init__(self, folder: Path, new_name: NewName, what: str, slim: Callable[[pa.Table], pa.Table] = lambda table: table) -> None:
        self._folder, self._new_name, self._what, self._slim = folder, new_name, what, slim
        self._waiting: list[pa.Table] = []
        self._rows = 0
        self.parts: list[Part] = []

    def add(self, table: pa.Table) -> None:
        self._waiting.append(table)
        self._rows += table.num_rows
        while self._rows >= PART_ROWS:
            joined = pa.concat_tables(self._waiting)
            self._write(joined.slice(0, PART_ROWS))
            self._waiting = [joined.slice(PART_ROWS)]
            self._rows = joined.num_rows - PART_ROWS

    def keep(self, part: Part) -> None:
        """Take over a part of an older layer as it is."""
        self.flush()
        self.parts.append(part)

    def flush(self) -> None:
        if self._rows:
            self._write(pa.concat_tables(self._waiting))
        self._waiting, self._rows = [], 0

    def _write(self, table: pa.Table) -> None:
        self.parts.append(write_part(self._folder, self._new_name(self._what), self._slim(table).combine_chunks()))

    def layer(self) -> Layer:
        self.flush()
        return tuple(self.parts)


def read_range(folder: Path, layer: Layer, schema: pa.Schema, first: int | None, end: int | None) -> pa.Table:
    """The rows of a layer with `first` ≤ contact id < `end` (None: no bound); columns a part lacks are null."""
    tables = []
    for part in layer:
        if (end is not None and part.first_id >= end) or (first is not None and part.last_id < first):
            continue
        wanted = [name for name in schema.names if name in part.columns]
        bounds = [("contact_id", ">=", first)] * (first is not None) + [("contact_id", "<", end)] * (end is not None)
        covered = (first is None or part.first_id >= first) and (end is None or part.last_id < end)
        table = pq.read_table(folder / part.name, columns=wanted, filters=None if covered else bounds)
        tables.append(conform(table, schema))
    return pa.concat_tables(tables) if tables else schema.empty_table()


def conform(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """`table` with exactly the columns of `schema`, in its types."""
    columns = [table[field.name].cast(field.type) if field.name in table.column_names else pa.nulls(table.num_rows, field.type) for field in schema]
    return pa.table(columns, schema=schema)


def fold(writer: LayerWriter, folder: Path, schema: pa.Schema, older: Layer, newer: Sequence[Layer], combine: Combine) -> None:
    """Write `older` with the `newer` layers (oldest first) folded in. A part that no newer row falls into is taken over as it is.

    `combine` gets the rows of one range, newest layer first, and returns them joined, in ascending order of contact id.
    Memory stays at about one part of each layer.
    """
    starts = [part.first_id for part in older[1:]]
    changed = np.unique(np.concatenate([ids for layer in newer for (ids,) in read_columns(folder, layer, "contact_id")] or [np.empty(0, np.int64)]))
    for number, (first, end) in enumerate(zip([None, *starts], [*starts, None], strict=True)):
        inside = changed[0 if first is None else np.searchsorted(changed, first) : None if end is None else np.searchsorted(changed, end)]
        if not len(inside):
            if older:
                writer.keep(older[number])
            continue
        cuts = inside[PART_ROWS::PART_ROWS].tolist()
        for low, high in zip([first, *cuts], [*cuts, end], strict=True):
            tables = [read_range(folder, layer, schema, low, high) for layer in (*reversed(newer), older)]
            writer.add(combine([table for table in tables if table.num_rows] or [schema.empty_table()]))


def merged_tail(layers: Sequence[Layer]) -> int:
    """How many of the newest layers should become one, so that layers stay few and each is several times larger than the next."""
    count, rows = 1, rows_of(layers[-1]) if layers else 0
    while count < len(layers):
        before = rows_of(layers[-count - 1])
        if before >= LAYER_GROWTH * rows and before > SMALL_LAYER_ROWS:
            break
        rows += before
        count += 1
    return count


def read_columns(folder: Path, layer: Layer, *names: str) -> Iterator[tuple[np.ndarray, ...]]:
    """Whole columns without nulls, part by part; half the time of a scan by the query engine when nothing is filtered."""
    for part in layer:
        with pq.ParquetFile(folder / part.name) as file:
            table = file.read(columns=list(names))
        yield tuple(table[name].to_numpy() for name in names)


def newest(tables: Sequence[pa.Table]) -> pa.Table:
    """A `Combine` in which the newest row of a contact wins."""
    joined = pa.concat_tables(tables)
    _, first = np.unique(joined["contact_id"].to_numpy(), return_index=True)
    return joined.take(pa.array(first))
