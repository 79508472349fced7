"""A server whose central database is far away, over a line that loses packets, keeps the promises."""

from __future__ import annotations

import os
import signal
from collections import Counter
from pathlib import Path

import pytest
import sqlalchemy as sa

from mail_pipelines.benchmarks import distance
from mail_pipelines.database.models import State
from tests.dispatch.sessions import SessionProcess
from tests.dispatch.test_crashes import check_promise, finish
from tests.dispatch.world import Servers, make_world, write_play
from tests.parts.processes import wait_for


@pytest.mark.server
@pytest.mark.timeout(400)
@pytest.mark.parametrize("database_url", ["mariadb"], indirect=True)
def test_sessions_far_from_the_centre_neither_lose_nor_repeat(engine: sa.Engine, tmp_path: Path, kind: str, running: Servers) -> None:
    world = make_world(engine, tmp_path / "home", recipients=160, kind=kind)
    server = world.server(connections=4, per_second=60.0)
    assert engine.url.port is not None
    with distance.path(engine.url.port, round_trip_seconds=0.08, loss=0.03) as port:
        os.environ["MAIL_PIPELINES_DATABASE__URL"] = engine.url.set(port=port).render_as_string(hide_password=False)
        catcher = running.start(world, server, write_play(tmp_path / "play.toml", reply_seconds=[0.05, 0.3], refuse_percent=3))
        killed = SessionProcess(world, server.key, "killed")
        wait_for(lambda: len(world.kept()) > 40, seconds=60, what="sending")
        # While they are counted it opens no more.
        killed.signal(signal.SIGSTOP)
        connections = catcher.connections()
        killed.kill()
        finish(world, catcher)
        states = check_promise(world, 160)
        assert Counter(states.values())[State.UNKNOWN] <= connections
        running.stop()
