"""The outbox of a source: what it is to be told, what it was told, and its dead letters. An event is in it once, whoever reads it how often."""

from __future__ import annotations

import datetime as dt
import itertools
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Row

from mail_pipelines.contacts.sets import insert_if_absent, slices
from mail_pipelines.database import bulk
from mail_pipelines.database.engine import database_now
from mail_pipelines.database.models import Contact, SourceContact, Suppression, SyncDeadLetter, SyncOutbox
from mail_pipelines.sources.links import PRESENT

WAITING, TOLD, DEAD = 0, 1, 2
# Whose a suppression is that the source said itself: its address may be nobody's yet.
NOBODY = 0
Rows = Sequence[Row[*tuple[Any, ...]]]
# A service that is away is asked again after a minute, then two, at most every six hours: for about four days.
MOST_ATTEMPTS = 24
_FIRST_WAIT = dt.timedelta(minutes=1)
_MOST_WAIT = dt.timedelta(hours=6)
_REASON_LENGTH = 500
_LATER_STEPS = 10


class Event(NamedTuple):
    """What a source is told once, of one kind; see `SyncOutbox`. `facts` is the text of a JSON object."""

    event_id: int
    contact_id: int
    occurred_at: dt.datetime
    recorded_at: dt.datetime
    facts: str = "{}"


@dataclass(frozen=True)
class Standing:
    """How much waits and is dead; when the oldest of what waits was recorded here."""

    waiting: int
    dead: int
    oldest: dt.datetime | None


def facts(**values: Any) -> sa.ColumnElement[str]:
    """The facts of an event, put together by the database."""
    return sa.func.json_object(*itertools.chain.from_iterable(values.items()))


def add(connection: Connection, source: str, kind: str, events: Sequence[Event], state: int = WAITING) -> int:
    """Take up to `bulk.CHUNK_ROWS` events that are not in it yet; returns how many."""
    import pyarrow as pa

    if not events:
        return 0
    time = pa.timestamp("us", "UTC")
    types = (pa.int64(), pa.int64(), time, time, pa.string())
    columns = dict(zip(Event._fields, map(pa.array, zip(*events, strict=True), types), strict=True))
    # Due in the order of the events.
    columns["due_at"] = columns["recorded_at"]
    columns |= {name: pa.repeat(value, len(events)) for name, value in {"source": source, "kind": kind, "state": state, "attempts": 0}.items()}
    return bulk.load(connection, SyncOutbox.metadata.tables[SyncOutbox.__tablename__], pa.table(columns).sort_by("event_id"), ignore_duplicates=True)


def known(connection: Connection, source: str, kind: str, event_ids: Collection[int]) -> set[int]:
    """Those that are in it. Of what a feed reads again that is most, and to look costs less than to add."""
    found: set[int] = set()
    for these in _these(SyncOutbox, source, [(kind, event_id) for event_id in event_ids]):
        found.update(connection.execute(sa.select(SyncOutbox.event_id).where(these)).scalars())
    return found


def is_learned(source: str) -> sa.ColumnElement[bool]:
    """True for a row of `Suppression` in the outer query that the source said itself."""
    key = sa.and_(SyncOutbox.source == source, SyncOutbox.kind == "suppression", SyncOutbox.event_id == Suppression.id)
    return sa.exists().where(key, SyncOutbox.contact_id == NOBODY)


def is_known_there(source: str, contact_id: sa.ColumnElement[int]) -> sa.ColumnElement[bool]:
    """True for a contact of the outer query whom the source knows."""
    return sa.exists().where(SourceContact.contact_id == contact_id, SourceContact.source == source, SourceContact.state == PRESENT)


def external_ids(connection: Connection, source: str, contact_ids: Iterable[int]) -> dict[int, str]:
    """By which id the source knows each contact, of those it knows."""
    found: dict[int, str] = {}
    for ids in slices(set(contact_ids)):
        query = sa.select(SourceContact.contact_id, sa.func.min(SourceContact.external_id)).where(
            SourceContact.source == source, SourceContact.contact_id.in_(ids), SourceContact.state == PRESENT
        )
        found.update(connection.execute(query.group_by(SourceContact.contact_id)).tuples().all())
    return found


def due(connection: Connection, source: str, now: dt.datetime, most: int) -> Rows:
    """The next rows, with the e-mail of the contact (None: it was erased)."""
    # Many may be due at one time: in the order of the index, so they are not sorted for each page.
    query = (
        sa.select(*SyncOutbox.__table__.columns, Contact.email)
        .outerjoin(Contact, Contact.id == SyncOutbox.contact_id)
        .where(SyncOutbox.source == source, SyncOutbox.state == WAITING, SyncOutbox.due_at <= now)
    )
    return connection.execute(query.order_by(SyncOutbox.due_at).limit(most)).all()


def _these(model: type[SyncOutbox] | type[SyncDeadLetter], source: str, keys: Collection[tuple[str, int]]) -> Iterable[sa.ColumnElement[bool]]:
    by_kind: dict[str, list[int]] = {}
    for kind, event_id in keys:
        by_kind.setdefault(kind, []).append(event_id)
    for kind, event_ids in by_kind.items():
        for some in slices(event_ids):
            yield sa.and_(model.source == source, model.kind == kind, model.event_id.in_(some))


def told(connection: Connection, source: str, keys: Collection[tuple[str, int]]) -> None:
    for these in _these(SyncOutbox, source, keys):
        connection.execute(sa.update(SyncOutbox).where(these).values(state=TOLD))


def drop(connection: Connection, source: str, keys: Collection[tuple[str, int]]) -> None:
    for these in _these(SyncOutbox, source, keys):
        connection.execute(sa.delete(SyncOutbox).where(these))


def failed(connection: Connection, source: str, rows: Rows, reasons: Mapping[tuple[str, int], str], now: dt.datetime, *, for_good: bool) -> int:
    """Put rows off, those that failed too often or `for_good` to the dead letters; returns how many are dead."""
    dead = [row for row in rows if for_good or row.attempts + 1 >= MOST_ATTEMPTS]
    waiting = [] if for_good else [row for row in rows if row.attempts + 1 < MOST_ATTEMPTS]
    letters = [
        {
            "source": source,
            "kind": row.kind,
            "event_id": row.event_id,
            "contact_id": row.contact_id,
            "reason": reasons[row.kind, row.event_id][:_REASON_LENGTH],
            "attempts": row.attempts + 1,
            "at": now,
        }
        for row in dead
    ]
    if letters:
        connection.execute(insert_if_absent(SyncDeadLetter), letters)
        for these in _these(SyncOutbox, source, [(row.kind, row.event_id) for row in dead]):
            connection.execute(sa.update(SyncOutbox).where(these).values(state=DEAD, attempts=SyncOutbox.attempts + 1))
    later: dict[int, list[tuple[str, int]]] = {}
    for row in waiting:
        later.setdefault(row.attempts, []).append((row.kind, row.event_id))
    for attempts, keys in later.items():
        wait = min(_MOST_WAIT, _FIRST_WAIT * 2 ** min(attempts, _LATER_STEPS))
        for these in _these(SyncOutbox, source, keys):
            connection.execute(sa.update(SyncOutbox).where(these).values(attempts=attempts + 1, due_at=now + wait))
    return len(dead)


def retry(connection: Connection, source: str) -> int:
    """Dead letters wait again, with all their attempts; returns how many."""
    dead = sa.select(SyncDeadLetter.kind, SyncDeadLetter.event_id).where(SyncDeadLetter.source == source)
    keys = [(kind, event_id) for kind, event_id in connection.execute(dead).tuples()]
    for these in _these(SyncOutbox, source, keys):
        connection.execute(sa.update(SyncOutbox).where(these).values(state=WAITING, attempts=0, due_at=database_now(connection)))
    for these in _these(SyncDeadLetter, source, keys):
        connection.execute(sa.delete(SyncDeadLetter).where(these))
    return len(keys)


def dead_letters(connection: Connection, source: str, most: int) -> Rows:
    """The newest dead letters."""
    query = sa.select(
        SyncDeadLetter.kind, SyncDeadLetter.event_id, SyncDeadLetter.contact_id, SyncDeadLetter.reason, SyncDeadLetter.attempts, SyncDeadLetter.at
    )
    return connection.execute(query.where(SyncDeadLetter.source == source).order_by(SyncDeadLetter.at.desc(), SyncDeadLetter.event_id).limit(most)).all()


def standing(connection: Connection, source: str) -> Standing:
    counted = sa.select(sa.func.count(), sa.func.min(SyncOutbox.recorded_at)).where(SyncOutbox.source == source, SyncOutbox.state == WAITING)
    waiting, oldest = connection.execute(counted).tuples().one()
    dead = connection.execute(sa.select(sa.func.count()).select_from(SyncDeadLetter).where(SyncDeadLetter.source == source)).scalar_one()
    return Standing(waiting, dead, oldest)
