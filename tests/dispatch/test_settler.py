"""The resident settler: nobody has to start a session for what a dead one has left."""

from __future__ import annotations

from pathlib import Path

import pytest
import sqlalchemy as sa

from mail_pipelines.database.models import State
from mail_pipelines.dispatch.session import Session, journal_of
from tests.dispatch.sessions import SessionProcess
from tests.dispatch.world import Servers, make_world, write_play
from tests.parts.processes import wait_for

pytestmark = pytest.mark.server


def test_a_killed_sessions_claims_are_settled_by_the_server_itself(engine: sa.Engine, tmp_path: Path, kind: str, running: Servers) -> None:
    world = make_world(engine, tmp_path / "home", recipients=300, kind=kind)
    # So slow that much is still to be sent when it is killed.
    server = world.server(connections=6, per_second=10.0)
    running.start(world, server, write_play(tmp_path / "play.toml", reply_seconds=[0.05, 0.3]))
    run = SessionProcess(world, server.key, "run-1")
    wait_for(lambda: len(world.kept()) > 20, what="sending")
    # The server may settle what it had before anybody looks.
    run.stop_at_work()
    assert world.states()[State.CLAIMED] > 0
    run.kill()
    wait_for(lambda: world.open_claims() == 0, what="settlement")
    states = world.states()
    assert states[State.CLAIMED] == 0
    assert states[State.PENDING] > 0
    assert states[State.UNKNOWN] <= 6
    world.check_counters()


def test_a_late_line_ends_the_doubt_within_seconds(engine: sa.Engine, tmp_path: Path, kind: str, running: Servers) -> None:
    world = make_world(engine, tmp_path / "home", recipients=6, kind=kind, reply_timeout_seconds=1)
    server = world.server()
    started = running.start(world, server, write_play(tmp_path / "play.toml", reply_seconds=[4, 4]))
    Session(engine, world.settings, server, world.campaign_id, world.campaign_key, 0, "run-1", journal_of(started.folders, server.kind)).run()
    wait_for(lambda: world.states() == {State.DELIVERED: 6}, seconds=60, what="late lines")
    assert set(world.copies().values()) == {1}
    world.check_counters()
