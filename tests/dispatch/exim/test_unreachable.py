"""A destination that cannot be asked about a message has not refused it."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import sqlalchemy as sa

from mail_pipelines.database.engine import reading
from mail_pipelines.database.models import Delivery, DeliveryEvent, State
from tests.dispatch.test_session import session
from tests.dispatch.world import Servers, make_world, write_play

pytestmark = pytest.mark.server


@pytest.mark.parametrize("kind", ["exim", "burst"])
def test_no_connection_costs_no_attempt(engine: sa.Engine, tmp_path: Path, kind: str, running: Servers) -> None:
    world = make_world(engine, tmp_path / "home", recipients=12, kind=kind, first_retry_seconds=3, linger_seconds=1)
    server = world.server()
    exim = running.start(world, server, write_play(tmp_path / "play.toml"))
    exim.destinations.terminate()
    exim.destinations.wait(20)
    begin = time.time()
    session(world, server).run()
    assert world.states() == {State.DEFERRED: 12}
    with reading(engine) as connection:
        rows = connection.execute(sa.select(Delivery.attempt, Delivery.reason, Delivery.code, Delivery.sort_key)).all()
        kinds = connection.execute(sa.select(DeliveryEvent.kind, sa.func.count()).group_by(DeliveryEvent.kind)).all()
    assert {(row.attempt, row.reason, row.code) for row in rows} == {(0, "no_connection", None)}
    assert all(row.sort_key >= int(begin) + 3 for row in rows)
    assert kinds == [("unreachable", 12)]
    # They come back by themselves, each with the Message-ID that nobody has seen yet.
    exim.destinations = exim.command("catcher", "destinations", "far-s1", "--port", str(exim.far), "--play", str(exim.play), port=exim.far)
    while world.states() != {State.DELIVERED: 12}:
        assert time.time() < begin + 60
        session(world, server, f"run-{time.time_ns()}").run()
    assert world.copies() == dict.fromkeys(range(1, 13), 1)
    world.check_counters()
