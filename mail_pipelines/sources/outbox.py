"""The outbox of a source: what it is to be told, what it was told, and its dead letters. An event is in it once, whoever reads it how often."""

from __future__ import annotations

import dataclasses
import datetime as dt
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Row

from mail_pipelines.contacts.sets import insert_if_absent, slices
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


@dataclass(frozen=True)
class Item:
    """One event; see `SyncOutbox`."""

    kind: str
    event_id: int
    contact_id: int
    occurred_at: dt.datetime
    recorded_at: dt.datetime
    facts: dict[str, Any]


@dataclass(frozen=True)
class Standing:
    """How much waits and is dead; when the oldest of what waits was recorded here."""

    waiting: int
    dead: int
    oldest: dt.datetime | None


def _row(source: str, item: Item, state: int) -> dict[str, Any]:
    # Due in the order of the events.
    return {**dataclasses.asdict(item), "source": source, "state": state, "attempts": 0, "due_at": item.recorded_at}


def add(connection: Connection, source: str, items: Sequence[Item], state: int = WAITING) -> int:
    """Take events that are not in it yet; returns how many."""
    if not items:
        return 0
    rows = sorted((_row(source, item, state) for item in items), key=lambda row: row["event_id"])
    return connection.execute(insert_if_absent(SyncOutbox), rows).rowcount


def fresh(connection: Connection, source: str, items: Sequence[Item]) -> list[Item]:
    """Those that are not in it yet. Of what a feed reads again that is little, and to look costs less than to add."""
    known: set[tuple[str, int]] = set()
    for these in _these(SyncOutbox, source, [(item.kind, item.event_id) for item in items]):
        known.update(connection.execute(sa.select(SyncOutbox.kind, SyncOutbox.event_id).where(these)).tuples())
    return [item for item in items if (item.kind, item.event_id) not in known]


def is_learned(source: str) -> sa.ColumnElement[bool]:
    """True for a row of `Suppression` in the outer query that the source said itself."""
    key = sa.and_(SyncOutbox.source == source, SyncOutbox.kind == "suppression", SyncOutbox.event_id == Suppression.id)
    return sa.exists().where(key, SyncOutbox.contact_id == NOBODY)


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
    query = (
        sa.select(*SyncOutbox.__table__.columns, Contact.email)
        .outerjoin(Contact, Contact.id == SyncOutbox.contact_id)
        .where(SyncOutbox.source == source, SyncOutbox.state == WAITING, SyncOutbox.due_at <= now)
    )
    return connection.execute(query.order_by(SyncOutbox.due_at, SyncOutbox.event_id).limit(most)).all()


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


def prune(connection: Connection, source: str, kept: Mapping[str, dt.timedelta], read_at: dt.datetime) -> None:
    """Forget what was told and no feed comes back to, when all were read at `read_at`: of each kind in `kept` what is so old. The others stay for good."""
    for kind, age in kept.items():
        past = sa.and_(SyncOutbox.kind == kind, SyncOutbox.recorded_at < read_at - age)
        connection.execute(sa.delete(SyncOutbox).where(SyncOutbox.source == source, SyncOutbox.state == TOLD, past))
