"""Reading a feed that grows while it is read: nothing committed late is lost, nothing is taken twice.

Rows get their number and time before they are committed, so a row may become visible after later ones were read. Each reading
therefore goes back over the `OVERLAP` before the previous one and leaves out the numbers that one saw. A transaction that stays open for
longer than the overlap would be missed; the longest the platform allows itself is 200 ms.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import sqlalchemy as sa
from sqlalchemy.engine import Connection
from sqlalchemy.orm import InstrumentedAttribute

from mail_pipelines.segments.manifest import FeedPosition

OVERLAP = dt.timedelta(minutes=15)
CHUNK_ROWS = 20_000


@dataclass(frozen=True)
class Feed:
    """A table read by `time` (when a row was written). `number` is unique; if it also rises, `rising` finds new rows whatever the writers' clocks say."""

    number: InstrumentedAttribute[int]
    time: InstrumentedAttribute[dt.datetime]
    columns: tuple[InstrumentedAttribute[Any], ...]
    where: tuple[sa.ColumnElement[bool], ...] = ()
    rising: bool = False


class Reading:
    """One reading of a feed from `position` (None: from the beginning) at the time `now`. Iterate, then ask for `position`."""

    def __init__(self, feed: Feed, connection: Connection, folder: Path, position: FeedPosition | None, now: dt.datetime) -> None:
        self._feed, self._connection, self._now = feed, connection, now
        self._before = position
        self._seen_before = np.empty(0, np.int64) if position is None or position.seen is None else pq.read_table(folder / position.seen)["number"].to_numpy()
        self._seen: list[int] = []
        self._last = 0 if position is None else position.last
        self._folder = folder

    def _statement(self) -> sa.Select[Any]:
        feed = self._feed
        statement = sa.select(feed.number, feed.time, *feed.columns).where(*feed.where)
        if self._before is None:
            return statement
        again = feed.time >= self._before.read_at - OVERLAP
        return statement.where(sa.or_(again, feed.number > self._before.last) if feed.rising else again)

    def __iter__(self) -> Iterator[list[Any]]:
        """Rows not read before, in chunks; the values of `columns` begin at index 2."""
        result = self._connection.execution_options(stream_results=True, yield_per=CHUNK_ROWS).execute(self._statement())
        window = self._now - OVERLAP
        for chunk in result.partitions():
            numbers = np.fromiter((row[0] for row in chunk), np.int64, len(chunk))
            self._last = max(self._last, int(numbers.max()))
            self._seen.extend(row[0] for row in chunk if row[1] >= window)
            fresh = ~np.isin(numbers, self._seen_before)
            yield [row for row, is_new in zip(chunk, fresh, strict=True) if is_new]

    def position(self, name: str) -> FeedPosition:
        """Where the next reading begins; writes the file `name` with the numbers it will have to leave out."""
        path = self._folder / name
        pq.write_table(
            pa.table({"number": np.sort(np.array(self._seen, np.int64))}), path, compression="none", use_dictionary=False, column_encoding="DELTA_BINARY_PACKED"
        )
        return FeedPosition(self._now, self._last, name)
