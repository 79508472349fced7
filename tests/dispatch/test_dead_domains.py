"""The rows of a domain that does not answer wait for it, cost nothing meanwhile, and ask by one of them when it is due; on both databases."""

from __future__ import annotations

import datetime as dt
import threading
from pathlib import Path

import pytest
import sqlalchemy as sa

from mail_pipelines.contacts import consent
from mail_pipelines.contacts.addresses import parse
from mail_pipelines.database.engine import reading, transact
from mail_pipelines.database.models import Allotment, Delivery, DomainHealth, State
from mail_pipelines.delivery import domain_health
from mail_pipelines.delivery.domain_health import NO_CONNECTION, lesson
from mail_pipelines.delivery.recording import Result, record
from mail_pipelines.dispatch import servers
from mail_pipelines.dispatch.claiming.hindrances import SPREAD_SECONDS
from mail_pipelines.dispatch.claims import NothingClaimed, OpenClaim
from tests.dispatch.world import World, make_world

SECOND = dt.timedelta(seconds=1)


@pytest.fixture
def world(engine: sa.Engine, tmp_path: Path) -> World:
    """Twenty rows of each provider, google.test among them."""
    return make_world(engine, tmp_path / "home", recipients=80)


@pytest.fixture
def server(world: World) -> servers.ServerInfo:
    server = world.server()
    world.grant(server)
    return server


def hold(world: World, due_in: dt.timedelta, failures: int = 1) -> dt.datetime:
    """Hold google.test for dead until then."""
    now = dt.datetime.now(dt.UTC).replace(microsecond=0)
    values = {"domain": "google.test", "failures": failures, "dead_until": now + due_in, "changed_at": now - 60 * SECOND}

    def work(connection: sa.Connection) -> None:
        connection.execute(sa.delete(DomainHealth))
        connection.execute(sa.insert(DomainHealth).values(values))

    transact(world.engine, work)
    return now + due_in


def rows_of(claim: OpenClaim | NothingClaimed) -> tuple[int, int]:
    """How many rows a claim has, and how many of them ask."""
    assert isinstance(claim, OpenClaim)
    return len(claim.rows), sum(row.asks for row in claim.rows)


def end(world: World, claim: OpenClaim | NothingClaimed, *, silent: bool) -> None:
    """Record a claim of which every offer was delivered, or met silence for 5 s."""
    assert isinstance(claim, OpenClaim)
    if silent:
        results = [Result(row.contact_id, row.attempt, State.DEFERRED, reason=NO_CONNECTION, due=1, asked=False) for row in claim.rows]
    else:
        results = [Result(row.contact_id, row.attempt, State.DELIVERED, 250) for row in claim.rows]
    slow = {row.contact_id for row in claim.rows} if silent else set()
    learnt = lesson(results, {row.contact_id: row.domain for row in claim.rows}, slow, [row.contact_id for row in claim.rows if row.asks])

    def work(connection: sa.Connection) -> None:
        record(connection, claim.ref, results, claim_state="open")
        domain_health.learn(connection, claim.ref, learnt)

    transact(world.engine, work)


def waiting(world: World) -> set[tuple[int, str | None, int | None]]:
    """Attempt, reason and code of the deferred rows."""
    with reading(world.engine) as connection:
        query = sa.select(Delivery.attempt, Delivery.reason, Delivery.code).where(Delivery.state == int(State.DEFERRED))
        return {tuple(row) for row in connection.execute(query)}


def due(world: World) -> list[int]:
    with reading(world.engine) as connection:
        return sorted(connection.execute(sa.select(Delivery.sort_key).where(Delivery.state == int(State.DEFERRED))).scalars())


def test_rows_of_a_dead_domain_wait_and_cost_nothing(world: World, server: servers.ServerInfo) -> None:
    until = int(hold(world, 3600 * SECOND).timestamp())
    assert rows_of(world.claim(server)) == (0, 0)
    assert world.states() == {State.PENDING: 60, State.DEFERRED: 20}
    assert waiting(world) == {(0, NO_CONNECTION, None)}
    assert all(until <= second < until + SPREAD_SECONDS for second in due(world))
    assert world.usage(server, "google") == {}
    with reading(world.engine) as connection:
        assert connection.execute(sa.select(sa.func.sum(Allotment.used))).scalar_one() == 0
    assert world.claim(server) == NothingClaimed("nothing is due", only_here=True)
    assert rows_of(world.claim(server, provider="yahoo")) == (20, 0)
    world.check_counters()


def test_one_row_asks_and_nobody_else_until_it_is_answered(world: World, server: servers.ServerInfo) -> None:
    hold(world, -SECOND)
    asking = world.claim(server, limit=10)
    assert rows_of(asking) == (1, 1)
    assert rows_of(world.claim(server)) == (0, 0)
    assert world.usage(server, "google") == {900: 1, 3600: 1, 86400: 1}
    assert world.states() == {State.PENDING: 60, State.DEFERRED: 19, State.CLAIMED: 1}
    end(world, asking, silent=False)
    with reading(world.engine) as connection:
        assert domain_health.dead_domains(connection, 10) == []
    # It lives: all of them go, once they are due.
    transact(world.engine, lambda connection: connection.execute(sa.update(Delivery).where(Delivery.state == int(State.DEFERRED)).values(sort_key=1)))
    assert rows_of(world.claim(server)) == (19, 0)
    world.check_counters()


def test_of_two_claims_at_once_one_asks(world: World, server: servers.ServerInfo) -> None:
    hold(world, -SECOND)
    begin = threading.Barrier(2)
    found: list[tuple[int, int]] = []

    def claim() -> None:
        begin.wait()
        found.append(rows_of(world.claim(server, limit=10)))

    threads = [threading.Thread(target=claim) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(found) == [(0, 0), (1, 1)]


def test_silence_doubles_the_wait_of_a_domain_that_was_asked(world: World, server: servers.ServerInfo) -> None:
    end(world, world.claim(server, provider="yahoo"), silent=False)
    hold(world, -SECOND, failures=3)
    end(world, world.claim(server), silent=True)
    with reading(world.engine) as connection:
        (found,) = domain_health.dead_domains(connection, 10)
        recorded = connection.execute(sa.select(DomainHealth.changed_at)).scalar_one()
    assert (found.failures, found.dead_until - recorded) == (4, 480 * SECOND)


def test_an_outage_of_our_own_network_is_held_against_no_domain(world: World, server: servers.ServerInfo) -> None:
    """Everything that this server offers meets silence. Rows wait as after any failure, and nothing waits for hours."""
    for provider in ("google", "yahoo", "microsoft"):
        end(world, world.claim(server, provider=provider, limit=10), silent=True)
    with reading(world.engine) as connection:
        assert domain_health.dead_domains(connection, 10) == []
    # All of them are offered again.
    assert rows_of(world.claim(server, limit=15)) == (15, 0)
    # One that was dead before stays so for as long as it was, and no longer.
    hold(world, -SECOND)
    end(world, world.claim(server), silent=True)
    with reading(world.engine) as connection:
        assert [found.failures for found in domain_health.dead_domains(connection, 10)] == [1]


def test_who_may_not_be_mailed_does_not_wait(world: World, server: servers.ServerInfo) -> None:
    hold(world, 3600 * SECOND)
    now = dt.datetime.now(dt.UTC)
    hashes = [parse(f"person{number}@google.test").hash for number in range(1, 81)]
    transact(world.engine, lambda connection: consent.suppress(connection, hashes, reason="complaint", now=now))
    assert rows_of(world.claim(server)) == (0, 0)
    assert world.states() == {State.PENDING: 60, State.SUPPRESSED: 20}
    world.check_counters()
