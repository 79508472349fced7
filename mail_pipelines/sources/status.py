"""Where each source stands: its last good run, cursor, counts, and what went wrong last. Kept in `sync_state`; names no person."""

from __future__ import annotations

import dataclasses
import datetime as dt
from dataclasses import dataclass, field
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine

from mail_pipelines.database import upsert
from mail_pipelines.database.engine import reading, transact
from mail_pipelines.database.models import SyncState
from mail_pipelines.sources.declaration import Section

PREFIX = "source:"
_ERROR_LENGTH = 1_000


@dataclass(frozen=True)
class Standing:
    """One section of a source. Times are ISO 8601 in UTC; `counts` and `rejected` (by reason) are of the last good run.

    `run` numbers the runs. `cursor` is the highest merged, `whole_at` when everything was read last. `missing` records are gone at the source and wait
    for somebody to say that they are meant to be. `error` is why the last run failed, None if it did not.
    """

    run: int = 0
    begun_at: str | None = None
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


def read(engine: Engine, source: str, section: Section) -> Standing:
    """Where the section stands; a standing of nothing if it never ran."""
    with reading(engine) as connection:
        return _read(connection, source, section)


def _read(connection: Connection, source: str, section: Section) -> Standing:
    query = sa.select(SyncState.value).where(SyncState.source == PREFIX + source, SyncState.key == section)
    value: dict[str, Any] | None = connection.execute(query).scalar_one_or_none()
    known = {entry.name for entry in dataclasses.fields(Standing)}
    # A newer version's names are left alone, as are its columns.
    return Standing(**{name: given for name, given in value.items() if name in known}) if value else Standing()


def change(engine: Engine, source: str, section: Section, now: dt.datetime, **values: Any) -> Standing:
    """Change what is known of the section. One run at a time writes it."""
    if values.get("error"):
        values["error"] = str(values["error"])[:_ERROR_LENGTH]

    def work(connection: Connection) -> Standing:
        standing = dataclasses.replace(_read(connection, source, section), **values)
        row = {"source": PREFIX + source, "key": section, "value": dataclasses.asdict(standing), "version": standing.run, "changed_at": now}
        upsert.put(connection, SyncState, [row])
        return standing

    return transact(engine, work)
