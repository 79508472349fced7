"""Which domains are held for dead: silence and only silence, for a growing time, until anything is heard of them again."""

from __future__ import annotations

import datetime as dt
from dataclasses import replace

import pytest
import sqlalchemy as sa
from sqlalchemy import event

from mail_pipelines.database.engine import reading, transact
from mail_pipelines.database.models import DomainHealth, State
from mail_pipelines.database.types import utc_now
from mail_pipelines.delivery import counters, domain_health
from mail_pipelines.delivery.domain_health import NO_CONNECTION, Health, Lesson, after, learn, lesson
from mail_pipelines.delivery.recording import ClaimRef, Result

NOW = dt.datetime(2026, 3, 2, 9, 0, tzinfo=dt.UTC)
SECOND = dt.timedelta(seconds=1)
HELD = Health(3, NOW - SECOND, NOW - 60 * SECOND)


@pytest.mark.parametrize(
    ("before", "opened_ago", "hears", "expected"),
    [
        (None, 5, True, (1, 60)),
        (HELD, 5, True, (4, 480)),
        (replace(HELD, failures=40), 5, True, (41, 7200)),
        # Offered before the last failure was recorded.
        (HELD, 61, True, None),
        # Nobody answers this server.
        (None, 5, False, None),
        (HELD, 5, False, (3, 240)),
    ],
)
def test_the_wait_grows_with_each_new_silence(before: Health | None, opened_ago: int, hears: bool, expected: tuple[int, int] | None) -> None:
    found = after(before, NOW - opened_ago * SECOND, NOW, hears=hears)
    assert (found and (found.failures, (found.dead_until - NOW) / SECOND)) == expected
    assert found is None or found.changed_at == NOW


def end(contact_id: int, state: State = State.DELIVERED, reason: str = "", *, asked: bool = True) -> Result:
    return Result(contact_id, 0, state, reason=reason, due=1, asked=asked)


SILENCE = end(1, State.DEFERRED, NO_CONNECTION, asked=False)


@pytest.mark.parametrize(
    ("results", "slow", "asking", "expected"),
    [
        ([SILENCE, end(3)], {1}, (), Lesson(frozenset({"a.test"}))),
        # Refused at once: it held nothing up.
        ([SILENCE], set(), (), Lesson()),
        ([SILENCE], set(), (1,), Lesson(alive=frozenset({"a.test"}))),
        # Another of the domain was answered, whatever the answer.
        ([SILENCE, end(2)], {1}, (), Lesson()),
        ([SILENCE, end(2, State.BOUNCED, "invalid_recipient")], {1}, (), Lesson()),
        ([SILENCE, end(2, State.DEFERRED, "greylisted")], {1}, (1,), Lesson(alive=frozenset({"a.test"}))),
        # No answers: it was not offered; nobody knows.
        ([SILENCE, end(2, State.PENDING)], {1}, (), Lesson(frozenset({"a.test"}))),
        ([end(1, State.PENDING)], set(), (1,), Lesson()),
        ([end(1, State.UNKNOWN, "no_outcome")], {1}, (1,), Lesson()),
        # Slow, but alive.
        ([end(1)], {1}, (1,), Lesson(alive=frozenset({"a.test"}))),
        ([end(1), end(3)], {1}, (), Lesson()),
    ],
)
def test_what_the_end_of_a_claim_says(results: list[Result], slow: set[int], asking: tuple[int, ...], expected: Lesson) -> None:
    assert lesson(results, {1: "a.test", 2: "a.test", 3: "b.test"}, slow, asking) == expected


def now_of(engine: sa.Engine) -> dt.datetime:
    with reading(engine) as connection:
        return connection.execute(sa.select(utc_now())).scalar_one()


def count(engine: sa.Engine, server_id: int, state: State, reason: str, rows: int, at: dt.datetime) -> None:
    transact(engine, lambda connection: counters.add(connection, 1, server_id, {(0, "other", state, reason): rows}, at))


def claim(server_id: int, opened_at: dt.datetime) -> ClaimRef:
    return ClaimRef(1, 1, 0, "other", server_id, opened_at)


def held(engine: sa.Engine) -> dict[str, int]:
    with reading(engine) as connection:
        return {domain.domain: domain.failures for domain in domain_health.dead_domains(connection, 10)}


def test_silence_is_kept_and_any_answer_ends_it(engine: sa.Engine) -> None:
    silent = Lesson(frozenset({"a.test", "b.test"}))
    count(engine, 1, State.DELIVERED, "", 5, now_of(engine))
    transact(engine, lambda connection: learn(connection, claim(1, now_of(engine)), silent))
    assert held(engine) == {"a.test": 1, "b.test": 1}
    # Of a claim that was open before.
    transact(engine, lambda connection: learn(connection, claim(2, now_of(engine) - 60 * SECOND), silent))
    assert held(engine) == {"a.test": 1, "b.test": 1}
    opened = now_of(engine)
    transact(engine, lambda connection: learn(connection, claim(1, opened), Lesson(frozenset({"a.test"}), frozenset({"b.test"}))))
    assert held(engine) == {"a.test": 2}
    with reading(engine) as connection:
        row = connection.execute(sa.select(DomainHealth.dead_until, DomainHealth.changed_at)).one()
    assert row.dead_until - row.changed_at == 120 * SECOND
    assert row.changed_at >= opened


def test_a_server_that_nobody_answers_says_nothing_against_a_domain(engine: sa.Engine) -> None:
    """It has lost its own network. Another server, which is answered, is believed."""
    silent = Lesson(frozenset({"a.test"}))
    now = now_of(engine)
    count(engine, 1, State.DELIVERED, "", 1000, now - 600 * SECOND)
    count(engine, 1, State.DELIVERED, "", 5, now)
    count(engine, 1, State.DEFERRED, NO_CONNECTION, 6, now)
    transact(engine, lambda connection: learn(connection, claim(1, now_of(engine)), silent))
    assert held(engine) == {}
    count(engine, 2, State.DELIVERED, "", 6, now)
    count(engine, 2, State.DEFERRED, NO_CONNECTION, 6, now)
    transact(engine, lambda connection: learn(connection, claim(2, now_of(engine)), silent))
    assert held(engine) == {"a.test": 1}


def test_a_claim_that_teaches_nothing_costs_no_statement(engine: sa.Engine) -> None:
    statements: list[str] = []
    with engine.connect() as connection:
        event.listen(connection, "before_cursor_execute", lambda *arguments: statements.append(arguments[2]))
        learn(connection, claim(1, NOW), Lesson())
        assert statements == []
        # Few statements, however many domains.
        learn(connection, claim(1, NOW), Lesson(frozenset(f"d{number}.test" for number in range(300)), frozenset({"x.test", "y.test"})))
        assert len([statement for statement in statements if statement != "BEGIN"]) == 5
        connection.rollback()
