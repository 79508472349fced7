"""Old changes of contacts go, in bounded transactions, and what goes is noted before: whoever reads the feed knows what it has missed. On both databases."""

from __future__ import annotations

import datetime as dt

import pytest
import sqlalchemy as sa

from mail_pipelines.contacts import changes
from mail_pipelines.contacts.changes import Gone
from mail_pipelines.database import pruning
from mail_pipelines.database.engine import reading, transact
from mail_pipelines.database.models import ContactChange
from tests.parts.kills import killed_at
from tests.parts.transactions import sizes_of_transactions

NOW = dt.datetime(2026, 3, 10, 12, tzinfo=dt.UTC)
DAY = dt.timedelta(days=1)
LIMIT = NOW - changes.KEPT


def change(engine: sa.Engine, number: int, at: dt.datetime) -> None:
    transact(engine, lambda connection: changes.record(connection, range(number), "upsert", now=at))


def numbers(engine: sa.Engine) -> list[int]:
    with reading(engine) as connection:
        return list(connection.execute(sa.select(ContactChange.seq).order_by(ContactChange.seq)).scalars())


def gone(engine: sa.Engine) -> Gone | None:
    with reading(engine) as connection:
        return changes.gone(connection)


def test_only_old_changes_go_in_bounded_transactions(engine: sa.Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pruning, "CHUNK_ROWS", 20)
    assert (changes.prune(engine, NOW), gone(engine)) == (0, None)
    for at in (LIMIT - DAY, LIMIT - dt.timedelta(microseconds=1), LIMIT, NOW, LIMIT - DAY):
        change(engine, 30, at)
    first = numbers(engine)[0]
    with sizes_of_transactions(engine, "DELETE") as sizes:
        assert changes.prune(engine, NOW) == 89
    assert (sum(sizes), max(sizes)) == (89, 20)
    # The last ones were written by a slow clock, and the very last stays: the next one must have a higher number than whatever was read.
    assert numbers(engine) == [*range(first + 60, first + 120), first + 149]
    assert gone(engine) == Gone(first + 148, LIMIT)
    assert changes.prune(engine, NOW) == 0
    # What a reader knows of it never goes back.
    assert changes.prune(engine, NOW - DAY) == 0
    assert gone(engine) == Gone(first + 148, LIMIT)
    changes.prune(engine, NOW + 15 * DAY)
    change(engine, 1, NOW)
    assert numbers(engine) == [first + 149, first + 150]
    assert gone(engine) == Gone(first + 148, LIMIT + 15 * DAY)


def test_killed_anywhere_nothing_goes_that_is_not_noted(engine: sa.Engine, database_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pruning, "CHUNK_ROWS", 20)
    change(engine, 100, LIMIT - DAY)
    change(engine, 10, NOW)
    all_, kills, seen = numbers(engine), 0, set[int]()
    for step in range(1, 30):
        engine.dispose()
        if not killed_at(step, database_url, lambda engine, _: changes.prune(engine, NOW)):
            break
        kills += 1
        left = numbers(engine)
        seen.add(len(left))
        assert left == all_[-len(left) :]
        noted = gone(engine)
        assert len(left) == len(all_) or (noted is not None and noted.seq == all_[99])
    # Before the first, and in the middle.
    assert kills > 8
    assert {110, 90, 70, 50} <= seen
    assert numbers(engine) == all_[100:]
