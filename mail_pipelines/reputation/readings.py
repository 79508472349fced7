"""Readings: what a provider tells of one domain or address of ours on one day, kept in the table `reputation`.

What belongs here: the row, writing and reading it. What does not: asking providers (`google`, `microsoft`), when (`syncing`, `standing`), and what follows
(`capacity.told`, `capacity.domain_breakers`).
"""

from __future__ import annotations

import datetime as dt
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from mail_pipelines.config import ReputationSettings
from mail_pipelines.database.models import Reputation
from mail_pipelines.database.upsert import put

GOOGLE, MICROSOFT = "google_postmaster", "microsoft_snds"
# The group of recipients of which each tells.
PROVIDERS = {GOOGLE: "google", MICROSOFT: "microsoft"}
# By how much they mind, as a number from 0.
FILTER_RESULTS = ("GREEN", "YELLOW", "RED")
DAY = 86400


@dataclass(frozen=True)
class Reading:
    """`subject` is a domain (in A-labels) or an address; `day` the first second of a day. None: the provider does not tell.

    `spam_rate` is the part of the messages that people reported as spam (of a band its lower end), `delivery_errors` the part that was refused.
    """

    source: str
    subject: str
    day: int
    spam_rate: float | None = None
    delivery_errors: float | None = None
    messages: int | None = None
    filter_result: str | None = None
    trap_hits: int | None = None
    details: Mapping[str, Any] = field(default_factory=dict)

    def measure(self, name: str) -> float | None:
        """One of the numbers by its name; `filter_result` is its place in `FILTER_RESULTS`."""
        value = getattr(self, name)
        return FILTER_RESULTS.index(value) if isinstance(value, str) else value


@dataclass(frozen=True)
class Fetched:
    """What a provider told in one go. `refused`: domain → why it tells nothing of it; `rejected`: why a row was left out → how many."""

    readings: tuple[Reading, ...]
    refused: Mapping[str, str] = field(default_factory=dict)
    rejected: Mapping[str, int] = field(default_factory=dict)


def configured(settings: ReputationSettings) -> tuple[str, ...]:
    """The sources for which there are credentials."""
    given = {GOOGLE: bool(settings.google_credentials), MICROSOFT: Path(settings.microsoft_token_file).is_file()}
    return tuple(source for source, is_given in given.items() if is_given)


def second_of(day: dt.date) -> int:
    return int(dt.datetime(day.year, day.month, day.day, tzinfo=dt.UTC).timestamp())


def date_of(day: int) -> dt.date:
    return dt.datetime.fromtimestamp(day, dt.UTC).date()


def keep(connection: Connection, readings: Sequence[Reading], now: dt.datetime) -> Counter[str]:
    """Write readings, of which the newer one of a day is right; how many were new, corrected, or as they had been. What is not among them stays."""
    counts: Counter[str] = Counter()
    if not readings:
        return counts
    days = {reading.day for reading in readings}
    known = {(one.source, one.subject, one.day): one for one in read(connection, min(days), max(days))}
    rows = []
    for reading in sorted(readings, key=lambda one: (one.source, one.subject, one.day)):
        before = known.get((reading.source, reading.subject, reading.day))
        counts["unchanged" if before == reading else "new" if before is None else "corrected"] += 1
        if before != reading:
            rows.append(asdict(reading) | {"changed_at": now})
    put(connection, Reputation, rows)
    return counts


def read(connection: Connection, first: int, last: int | None = None, source: str | None = None) -> list[Reading]:
    """The readings of the days from `first` to `last`, by source, subject and day."""
    columns = [column for column in Reputation.__table__.columns if column.name != "changed_at"]
    query = sa.select(*columns).where(Reputation.day >= first).order_by(Reputation.source, Reputation.subject, Reputation.day)
    if last is not None:
        query = query.where(Reputation.day <= last)
    if source is not None:
        query = query.where(Reputation.source == source)
    return [Reading(**row) for row in connection.execute(query).mappings()]


def newest(readings: Iterable[Reading], measure: str) -> dict[tuple[str, str], Reading]:
    """By source and subject the newest reading that has this measure."""
    found: dict[tuple[str, str], Reading] = {}
    for reading in sorted(readings, key=lambda one: one.day):
        if reading.measure(measure) is not None:
            found[reading.source, reading.subject] = reading
    return found
