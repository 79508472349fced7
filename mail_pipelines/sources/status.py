"""Where each source stands: its last good run, cursor, counts, and what went wrong last. Kept in `sync_state`; names no person."""

from __future__ import annotations

import dataclasses
import datetime as dt
from dataclasses import dataclass, field
from typing import Any

import pydantic
import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine

from mail_pipelines.database import upsert
from mail_pipelines.database.engine import reading, transact
from mail_pipelines.database.models import SyncState
from mail_pipelines.errors import MailPipelinesError
from mail_pipelines.sources.declaration import Part, Told
from mail_pipelines.sources.feeds import Position

PREFIX = "source:"
_FEED = "feed:"
_POSITION = pydantic.TypeAdapter(Position)
_ERROR_LENGTH = 1_000


@dataclass(frozen=True)
class Standing:
    """One section of a source, or its write-back. Times are ISO 8601 in UTC; `counts` and `rejected` (by reason) are of the last good run.

    `run` numbers the runs. The last one began at `begun_at` and ended, well or not, at `ended_at`: None while it runs, or if it was killed. `cursor` is the
    highest merged, `whole_at` when everything was read last. `missing` records are gone at the source and wait for somebody to say that they are meant to
    be. `error` is why the last run failed, None if it did not.
    """

    run: int = 0
    begun_at: str | None = None
    ended_at: str | None = None
    good_at: str | None = None
    cursor: str | None = None
    whole_at: str | None = None
    counts: dict[str, int] = field(default_factory=dict)
    rejected: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    missing: int = 0
    note: str | None = None
    error: str | None = None

    def lag_seconds(self, now: dt.datetime) -> float | None:
        """How old what we have is: since the begin of the last good run; None if there was none."""
        return None if self.good_at is None else (now - dt.datetime.fromisoformat(self.good_at)).total_seconds()

    @property
    def merged(self) -> int:
        return sum(self.counts.get(name, 0) for name in ("inserted", "updated", "unchanged", "suppressed"))


def read(engine: Engine, source: str, section: Part) -> Standing:
    """Where the section stands; a standing of nothing if it never ran."""
    with reading(engine) as connection:
        return of(connection, source, section)


def of(connection: Connection, source: str, section: Part) -> Standing:
    """As `read`, within a connection."""
    query = sa.select(SyncState.value).where(SyncState.source == PREFIX + source, SyncState.key == section)
    value: dict[str, Any] | None = connection.execute(query).scalar_one_or_none()
    known = {entry.name for entry in dataclasses.fields(Standing)}
    # A newer version's names are left alone, as are its columns.
    return Standing(**{name: given for name, given in value.items() if name in known}) if value else Standing()


def begin(engine: Engine, source: str, section: Part, now: dt.datetime) -> Standing:
    """A run begins; returns the standing before it."""
    before = read(engine, source, section)
    change(engine, source, section, now, run=before.run + 1, begun_at=now.isoformat(), ended_at=None)
    return before


def fail(engine: Engine, source: str, section: Part, error: Exception, **values: Any) -> None:
    """A run has ended by an error. What is no word of ours is named only by its type: it may have an address in it."""
    now = dt.datetime.now(dt.UTC)
    change(engine, source, section, now, error=words(error), ended_at=now.isoformat(), **values)


def words(error: Exception) -> str:
    """What of an error is kept and shown."""
    if isinstance(error, MailPipelinesError):
        return str(error)
    return f"the run ended by {type(error).__name__}, which is no fault of the source: the log of the run says where"


def change(engine: Engine, source: str, section: Part, now: dt.datetime, **values: Any) -> Standing:
    """Change what is known of the section. One run at a time writes it."""
    if values.get("error"):
        values["error"] = str(values["error"])[:_ERROR_LENGTH]

    def work(connection: Connection) -> Standing:
        standing = dataclasses.replace(of(connection, source, section), **values)
        row = {"source": PREFIX + source, "key": section, "value": dataclasses.asdict(standing), "version": standing.run, "changed_at": now}
        upsert.put(connection, SyncState, [row])
        return standing

    return transact(engine, work)


def position(engine: Engine, source: str, told: Told) -> Position:
    """Where the feed of what the source is told was read to."""
    query = sa.select(SyncState.value).where(SyncState.source == PREFIX + source, SyncState.key == _FEED + told)
    with reading(engine) as connection:
        value = connection.execute(query).scalar_one_or_none()
    return Position() if value is None else _POSITION.validate_python(value)


def positions(engine: Engine) -> list[tuple[str, Told, Position]]:
    """Where each feed was read to for each source."""
    query = sa.select(SyncState.source, SyncState.key, SyncState.value).where(SyncState.source.startswith(PREFIX), SyncState.key.startswith(_FEED))
    with reading(engine) as connection:
        rows = connection.execute(query).tuples().all()
    return [(source.removeprefix(PREFIX), key.removeprefix(_FEED), _POSITION.validate_python(value)) for source, key, value in rows]


def move(engine: Engine, source: str, told: Told, position: Position) -> None:
    """The feed was read to `position`, and all of it is in the outbox."""
    value = _POSITION.dump_python(position, mode="json")
    row = {"source": PREFIX + source, "key": _FEED + told, "value": value, "version": 0, "changed_at": position.read_at}
    transact(engine, lambda connection: upsert.put(connection, SyncState, [row]))
