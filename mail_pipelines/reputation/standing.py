"""Where each provider that is asked stands: its last good run, what went wrong last, and whether what is known is too old to rest on."""

from __future__ import annotations

import dataclasses
import datetime as dt
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine

from mail_pipelines.database.engine import transact
from mail_pipelines.database.models import ProviderUsage, Reputation, SyncState
from mail_pipelines.database.upsert import put
from mail_pipelines.reputation.readings import DAY, PROVIDERS, date_of

# One run of a day may fail; then somebody has to look.
STALE_AFTER = dt.timedelta(hours=50)
# Google's threshold of a bulk sender: of a day with so much mail a provider tells within so many days.
BULK, LATE_DAYS = 5_000, 5
_SOURCE = "reputation"
_ERROR_LENGTH = 1_000


@dataclass(frozen=True)
class Standing:
    """One source. `good_at` is when the last good run began (ISO 8601 in UTC); `counts`, `refused` (domain → why) and `rejected` (why → rows) are its.

    `error` is why the newest run failed, if it did; what was known before stays.
    """

    good_at: str | None = None
    counts: dict[str, int] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    rejected: dict[str, int] = field(default_factory=dict)
    error: str | None = None

    @property
    def problems(self) -> list[str]:
        """What a run that was good did not take in."""
        remedy = "add it in Postmaster Tools, as the user whose credentials these are"
        return [
            *(f"Google tells nothing of {domain} ({why}): {remedy}" for domain, why in self.refused.items()),
            *(f"{rows:,} rows left out: {why}" for why, rows in self.rejected.items()),
        ]


def read(connection: Connection, source: str) -> Standing:
    """Where a source stands; a standing of nothing if it was never asked."""
    query = sa.select(SyncState.value).where(SyncState.source == _SOURCE, SyncState.key == source)
    value: Mapping[str, Any] | None = connection.execute(query).scalar_one_or_none()
    known = {entry.name for entry in dataclasses.fields(Standing)}
    return Standing(**{name: given for name, given in value.items() if name in known}) if value else Standing()


def keep(engine: Engine, source: str, standing: Standing, now: dt.datetime) -> None:
    value = dataclasses.asdict(standing) | {"error": standing.error and standing.error[:_ERROR_LENGTH]}
    row = {"source": _SOURCE, "key": source, "value": value, "version": 1, "changed_at": now}
    transact(engine, lambda connection: put(connection, SyncState, [row]))


def stale(connection: Connection, source: str, now: dt.datetime) -> str | None:
    """Why what is known of a source is too old to rest on: it could not be asked, or tells of no day any more though much was sent. None if it is not."""
    known = read(connection, source)
    if known.good_at is None:
        return f"{source} could not be read yet: {known.error}" if known.error else None
    good_at = dt.datetime.fromisoformat(known.good_at)
    if now - good_at > STALE_AFTER:
        return f"{source} was read last at {good_at:%Y-%m-%d %H:%M} UTC{f': {known.error}' if known.error else ''}"
    return _silent(connection, source, int(now.timestamp()) - (LATE_DAYS + 1) * DAY)


def _silent(connection: Connection, source: str, until: int) -> str | None:
    """Whether it tells of no day since one before `until` (epoch seconds) on which much was sent."""
    newest = connection.execute(sa.select(sa.func.max(Reputation.day)).where(Reputation.source == source)).scalar_one() or 0
    # Windows of a day are kept for two weeks.
    sent = (
        sa.select(ProviderUsage.window_start)
        .where(ProviderUsage.provider == PROVIDERS[source], ProviderUsage.window_seconds == DAY)
        .where(ProviderUsage.window_start > newest, ProviderUsage.window_start <= until)
        .group_by(ProviderUsage.window_start)
        .having(sa.func.sum(ProviderUsage.used) >= BULK)
        .order_by(ProviderUsage.window_start)
        .limit(1)
    )
    day = None if newest > until else connection.execute(sent).scalar_one_or_none()
    if day is None:
        return None
    since = f"since {date_of(newest)}" if newest else "yet"
    return f"{source} tells of no day {since}, though on {date_of(day)} {BULK:,} messages or more went to {PROVIDERS[source]}"
