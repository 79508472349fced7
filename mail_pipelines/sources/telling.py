"""Write-back: a source is told what happened here. Read the feeds into the outbox, send what is due in batches, note what became of it.

Each event is sent at least once, and each time under the same key, so that a service that heeds keys counts it once: a run that is killed between sending
and noting sends that batch again. A service that does not answer, or wants to be left alone, ends the run; what waits goes out in a later one.
"""

from __future__ import annotations

import datetime as dt
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine, Row

from mail_pipelines.contacts import lists
from mail_pipelines.database.bulk import CHUNK_ROWS
from mail_pipelines.database.engine import database_now, reading, transact
from mail_pipelines.dispatch.files import only_one
from mail_pipelines.sources import feeds, kinds, outbox, refusals, status
from mail_pipelines.sources.declaration import ENGAGEMENT, Source, Told, WriteBack
from mail_pipelines.sources.errors import SourceError
from mail_pipelines.sources.kinds import Refused, Unavailable, Verdict, Writer
from mail_pipelines.sources.outbox import Event
from mail_pipelines.sources.running import lock, work_folder

# An event that failed so often within a batch is sent alone from then on: it may be what the batch fails by.
ALONE_AFTER = 2
# So many refused and none taken between them: the request is wrong rather than what is in it.
REFUSED_IN_A_ROW = 20
_PAGE = 1_000


@dataclass(frozen=True)
class Report:
    """What a run did: `counts` by what became of events (taken_up, pushed, retried, dead, unknown, erased), and how the outbox stands."""

    counts: dict[str, int]
    standing: outbox.Standing
    lag_seconds: float
    seconds: float


def run(engine: Engine, home: Path, source: Source) -> Report:
    """Tell the source what is new. Raises `AlreadyRunning`, or `SourceError` or another error (recorded as the standing's) if not all that is due was told."""
    wanted = source.write_back
    if wanted is None:
        raise SourceError(f"{source.name}: there is no section write_back in its declaration")
    work_folder(home).mkdir(parents=True, exist_ok=True)
    with only_one(lock(home, source.name), f"source {source.name}"):
        now = dt.datetime.now(dt.UTC)
        status.begin(engine, source.name, ENGAGEMENT, now)
        begin, counts = time.monotonic(), Counter[str]()
        try:
            own = _own_list(engine, source)
            for told in wanted.what:
                _take(engine, source.name, wanted, told, own, counts)
            with kinds.writer(source.kind, source.connection, wanted.send) as write:
                _Telling(engine, source.name, wanted, kinds.check_send(source.kind, wanted.send).batch, write, counts).all()
        except Exception as error:
            status.fail(engine, source.name, ENGAGEMENT, error, counts=dict(counts))
            raise
        seconds, ended = round(time.monotonic() - begin, 3), dt.datetime.now(dt.UTC)
        good = {"good_at": now.isoformat(), "ended_at": ended.isoformat(), "seconds": seconds, "error": None}
        status.change(engine, source.name, ENGAGEMENT, ended, counts=dict(counts), **good)
    with reading(engine) as connection:
        standing = outbox.standing(connection, source.name)
        lag = (database_now(connection) - standing.oldest).total_seconds() if standing.oldest else 0.0
    return Report(dict(counts), standing, lag, seconds)


# --- from the feeds into the outbox -----------------------------------------------------------------------------


def _own_list(engine: Engine, source: Source) -> str | None:
    """The key of the list whose ends alone are told; None for all."""
    if source.write_back is None or source.write_back.lists == "all" or source.contacts is None or source.contacts.list is None:
        return None
    name, now = source.contacts.list, dt.datetime.now(dt.UTC)
    return transact(engine, lambda connection: lists.ensure(connection, name, now=now).key)


def _take(engine: Engine, source: str, wanted: WriteBack, told: Told, own: str | None, counts: Counter[str]) -> None:
    before, feed = status.position(engine, source, told), feeds.FEEDS[told]
    with reading(engine) as connection:
        after = feeds.here(connection, before)
    begin = feeds.Position() if told in refusals.KINDS and after.is_whole else before
    with reading(engine) as connection:
        query = feed.query(connection, begin, wanted.begin, own)
        is_told_of = outbox.is_known_there(source, query.selected_columns.contact_id) if wanted.unknown == "skip" else sa.true()
        rows = connection.execution_options(stream_results=True, yield_per=CHUNK_ROWS).execute(query.add_columns(is_told_of))
        for portion in rows.partitions():
            events = [feed.event(*event) for *event, is_told in portion if is_told]
            counts.update(taken_up=_add(engine, source, feed.kind, events), unknown=len(portion) - len(events))
    status.move(engine, source, told, after)


def _add(engine: Engine, source: str, kind: str, events: Sequence[Event]) -> int:
    # Before the transaction: of what is read again most is in the outbox, and nobody has to wait for that to be found out.
    with reading(engine) as connection:
        known = outbox.known(connection, source, kind, [event.event_id for event in events])
    new = [event for event in events if event.event_id not in known]
    return transact(engine, lambda connection: outbox.add(connection, source, kind, new)) if new else 0


# --- from the outbox to the service -----------------------------------------------------------------------------


class _Telling:
    """One run's sending. Each request is noted before the next one is made."""

    def __init__(self, engine: Engine, source: str, wanted: WriteBack, batch: int, write: Writer, counts: Counter[str]) -> None:
        self.engine, self.source, self.wanted, self.batch, self.write, self.counts = engine, source, wanted, batch, write, counts
        self._refused_in_a_row = 0

    def all(self) -> None:
        """Send everything that is due."""
        with reading(self.engine) as connection:
            now = database_now(connection)
        while True:
            with reading(self.engine) as connection:
                rows = outbox.due(connection, self.source, now, max(_PAGE, self.batch))
                ids = outbox.external_ids(connection, self.source, (row.contact_id for row in rows))
            if not rows:
                return
            self._leave_out(rows, ids)
            for batch in _batches([row for row in rows if self._reaches(row, ids)], self.batch):
                self._send(batch, ids)

    def _reaches(self, row: Row[*tuple[Any, ...]], ids: dict[int, str]) -> bool:
        return row.email is not None and (row.contact_id in ids or self.wanted.unknown == "create")

    def _leave_out(self, rows: Sequence[Row[*tuple[Any, ...]]], ids: dict[int, str]) -> None:
        """People who were erased here, or are no longer known there, since the events were taken up."""
        left = [row for row in rows if not self._reaches(row, ids)]
        transact(self.engine, lambda connection: outbox.drop(connection, self.source, [(row.kind, row.event_id) for row in left]))
        self.counts.update("erased" if row.email is None else "unknown" for row in left)

    def _send(self, batch: Sequence[Row[*tuple[Any, ...]]], ids: dict[int, str]) -> None:
        try:
            verdicts = self.write([_event(row, ids.get(row.contact_id)) for row in batch])
        except Unavailable as error:
            self._note(batch, [Verdict("later", str(error))] * len(batch))
            raise
        except Refused as error:
            if len(batch) > 1:
                # Which of them it was shows when they are sent in halves.
                middle = len(batch) // 2
                self._send(batch[:middle], ids)
                self._send(batch[middle:], ids)
                return
            verdicts = [Verdict("refused", str(error))]
        self._note(batch, verdicts)

    def _note(self, batch: Sequence[Row[*tuple[Any, ...]]], verdicts: Sequence[Verdict]) -> None:
        pairs = list(zip(batch, verdicts, strict=True))
        reasons = {(row.kind, row.event_id): verdict.reason for row, verdict in pairs}

        def those(outcome: str) -> list[Row[*tuple[Any, ...]]]:
            return [row for row, verdict in pairs if verdict.outcome == outcome]

        def work(connection: Connection) -> int:
            now = database_now(connection)
            outbox.told(connection, self.source, [(row.kind, row.event_id) for row in those("taken")])
            dead = outbox.failed(connection, self.source, those("refused"), reasons, now, for_good=True)
            return dead + outbox.failed(connection, self.source, those("later"), reasons, now, for_good=False)

        dead = transact(self.engine, work)
        taken, refused = len(those("taken")), len(those("refused"))
        self.counts.update(pushed=taken, dead=dead, retried=len(batch) - taken - dead)
        self._refused_in_a_row = 0 if taken else self._refused_in_a_row + refused
        if self._refused_in_a_row >= REFUSED_IN_A_ROW:
            raise SourceError(
                f"{self._refused_in_a_row} events in a row were refused and none was taken: `mail-pipelines source dead-letters {self.source}` says why; "
                f"check write_back.send, then `mail-pipelines source retry {self.source}` sends them again"
            )


def _batches(rows: Sequence[Row[*tuple[Any, ...]]], size: int) -> Iterator[Sequence[Row[*tuple[Any, ...]]]]:
    together = [row for row in rows if row.attempts < ALONE_AFTER]
    for start in range(0, len(together), size):
        yield together[start : start + size]
    for row in rows:
        if row.attempts >= ALONE_AFTER:
            yield [row]


def _event(row: Row[*tuple[Any, ...]], external_id: str | None) -> kinds.Event:
    event: dict[str, Any] = dict.fromkeys(kinds.EVENT_FIELDS)
    event.update(row.facts)
    event.update(key=f"{row.kind}-{row.event_id}", kind=row.kind, email=row.email, external_id=external_id, occurred_at=row.occurred_at)
    return event
