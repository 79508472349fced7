"""A destination that cannot be asked about a message has not refused it."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import sqlalchemy as sa

from mail_pipelines.benchmarks.silence import silent_port
from mail_pipelines.database.engine import database_now, reading, transact
from mail_pipelines.database.models import Contact, Delivery, DeliveryEvent, DomainHealth, State
from mail_pipelines.dispatch.servers import ServerInfo
from tests.dispatch.test_session import session
from tests.dispatch.world import Servers, World, make_world, write_play

pytestmark = pytest.mark.server


@pytest.mark.parametrize("kind", ["exim", "burst"])
def test_no_connection_costs_no_attempt(engine: sa.Engine, tmp_path: Path, kind: str, running: Servers) -> None:
    world = make_world(engine, tmp_path / "home", recipients=12, kind=kind, first_retry_seconds=60, linger_seconds=1)
    server = world.server()
    exim = running.start(world, server, write_play(tmp_path / "play.toml"))
    exim.destinations.terminate()
    exim.destinations.wait(120)
    begin = time.time()
    session(world, server).run()
    assert world.states() == {State.DEFERRED: 12}
    with reading(engine) as connection:
        rows = connection.execute(sa.select(Delivery.attempt, Delivery.reason, Delivery.code, Delivery.sort_key)).all()
        kinds = connection.execute(sa.select(DeliveryEvent.kind, sa.func.count()).group_by(DeliveryEvent.kind)).all()
    assert {(row.attempt, row.reason, row.code) for row in rows} == {(0, "no_connection", None)}
    assert all(row.sort_key >= int(begin) + 60 for row in rows)
    assert kinds == [("unreachable", 12)]
    # They come back when it is time, each with the Message-ID that nobody has seen yet.
    exim.destinations = exim.command("catcher", "destinations", "far-s1", "--port", str(exim.far), "--play", str(exim.play), port=exim.far)
    fall_due(engine)
    session(world, server, "run-2").run()
    assert world.states() == {State.DELIVERED: 12}
    assert world.copies() == dict.fromkeys(range(1, 13), 1)
    world.check_counters()


def fall_due(engine: sa.Engine) -> None:
    """Let the time come at which domains are tried again, and their rows with them."""

    def work(connection: sa.Connection) -> None:
        connection.execute(sa.update(DomainHealth).values(dead_until=database_now(connection)))
        connection.execute(sa.update(Delivery).where(Delivery.state == int(State.DEFERRED)).values(sort_key=int(time.time())))

    transact(engine, work)


def times_tried(world: World, server: ServerInfo, domain: str) -> int:
    """How often Exim has met silence at the domain."""
    return world.folders(server.key).journal.read_text().count(f"@{domain}>: Could not complete recipient verify callout")


@pytest.mark.parametrize("database_url", ["mariadb"], indirect=True)
def test_a_silent_domain_is_met_once_asked_later_and_delivered_to_when_it_answers(engine: sa.Engine, tmp_path: Path, running: Servers) -> None:
    """Forty of its recipients in one lane with forty others, which do not wait for it."""
    world = make_world(engine, tmp_path / "home", recipients=320, kind="exim", linger_seconds=1)
    server = world.server(connections=4)
    some = sa.update(Contact).where(Contact.provider == "google", Contact.id % 8 == 1)
    silent = {"email": sa.func.concat("person", Contact.id, "@silent.test"), "address": sa.func.concat("person", Contact.id, "@silent.test")}
    transact(engine, lambda connection: connection.execute(some.values(domain="silent.test", **silent)))
    with silent_port() as port:
        exim = running.start(world, server, write_play(tmp_path / "play.toml"), f"silent.test=127.0.0.1:{port}")
        begin = time.monotonic()
        session(world, server).run()
        # 5 s for the one connection that waits, and not ten times that.
        assert time.monotonic() - begin < 50
        assert world.states() == {State.DELIVERED: 280, State.DEFERRED: 40}
        assert times_tried(world, server, "silent.test") == 1
        with reading(engine) as connection:
            health = connection.execute(sa.select(DomainHealth.domain, DomainHealth.failures, DomainHealth.dead_until)).one()
            kept = connection.execute(sa.select(Delivery.reason, Delivery.attempt, Delivery.sort_key).where(Delivery.state == int(State.DEFERRED))).all()
        assert (health.domain, health.failures) == ("silent.test", 1)
        assert {(row.reason, row.attempt) for row in kept} == {("no_connection", 0)}
        assert sum(row.sort_key >= int(health.dead_until.timestamp()) for row in kept) >= 39
        # Due again, and silent still: one of them asks.
        fall_due(engine)
        session(world, server, "run-2").run()
        assert world.states() == {State.DELIVERED: 280, State.DEFERRED: 40}
        assert times_tried(world, server, "silent.test") == 2
        world.check_counters()
    late = exim.command("catcher", "destinations", "late", "--port", str(port), "--play", str(exim.play), port=port)
    try:
        fall_due(engine)
        session(world, server, "run-3").run()
        # One has asked and was answered. Those of its claim come by themselves later; those that were claimed after the answer have come already.
        states = world.states()
        assert states.keys() == {State.DELIVERED, State.DEFERRED}
        assert 281 <= states[State.DELIVERED] < 320
        with reading(engine) as connection:
            assert connection.execute(sa.select(DomainHealth.domain)).all() == []
        fall_due(engine)
        session(world, server, "run-4").run()
    finally:
        late.terminate()
        late.wait(120)
    assert world.states() == {State.DELIVERED: 320}
    assert world.copies() == dict.fromkeys(range(1, 321), 1)
    world.check_counters()
