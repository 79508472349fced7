"""The database fails over to a replica that lacks the last seconds: nothing is sent before the ledger has been completed from the servers' logs."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa

from mail_pipelines.database import migrate
from mail_pipelines.database.engine import create_engine, reading
from mail_pipelines.database.models import LedgerGeneration, State
from mail_pipelines.dispatch.claims import Memory, WrongServer
from mail_pipelines.doctor.central import check_failover
from tests.dispatch.sessions import SessionProcess
from tests.dispatch.test_crashes import states_by_contact
from tests.dispatch.test_recovery import _settings_of_this_test, recover_and_finish  # noqa: F401
from tests.dispatch.world import Servers, make_world, write_play
from tests.parts.processes import wait_for
from tests.parts.replication import Replicated


@pytest.fixture
def replicated(tmp_path: Path) -> Iterator[Replicated]:
    started = Replicated(tmp_path / "databases")
    yield started
    started.stop()


@pytest.mark.server
@pytest.mark.timeout(560)
def test_a_replica_that_lacks_the_last_seconds_repeats_nothing(replicated: Replicated, tmp_path: Path, kind: str, running: Servers) -> None:
    recipients = 1000
    os.environ["MAIL_PIPELINES_SERVER__HEARTBEAT_SECONDS"] = "1"
    engine = create_engine(replicated.primary.database())
    migrate.upgrade(engine)
    world = make_world(engine, tmp_path / "home", recipients=recipients, kind=kind)
    play = write_play(tmp_path / "play.toml", reply_seconds=[0.05, 0.3], refuse_percent=4, greylist_percent=6, greylist_seconds=2)
    # So slow that there is enough left after the cut, however long that takes.
    fleet = [world.server(key, connections=6, per_second=6.0) for key in ("s1", "s2")]
    for server in fleet:
        # One that has not beaten for three seconds would be granted nothing.
        world.grant(server)
    started = [running.start(world, server, play) for server in fleet]
    sessions = [SessionProcess(world, server.key, f"first-{server.key}") for server in fleet]
    wait_for(lambda: len(world.kept()) > 50, what="sending")
    replicated.catch_up()
    replicated.cut()
    at_cut = len(world.kept())
    wait_for(lambda: len(world.kept()) > at_cut + 500, seconds=90, what="sending")
    replicated.fail_over()

    for session in sessions:
        session.process.join(90)
        assert session.process.exitcode is not None
    mailed = world.copies()
    unsent = [contact for contact, state in states_by_contact(world).items() if state in (State.PENDING, State.DEFERRED)]
    assert len([contact for contact in unsent if contact in mailed]) > 50
    with reading(engine) as connection:
        (finding,) = check_failover(connection)
        memory = Memory(connection.execute(sa.select(LedgerGeneration.generation)).scalar_one())
    assert "mail-pipelines recover" in finding.remedy
    for server in fleet:
        with pytest.raises(WrongServer, match="is not the one the ledger was on"):
            world.claim(server, memory=memory)
        with pytest.raises(AssertionError):
            SessionProcess(world, server.key, f"no-{server.key}").wait()
    assert world.copies() == mailed
    for server in started:
        server.process.terminate()
        server.process.wait(60)

    world.limit(connections=6, per_second=60.0)
    states = recover_and_finish(world, started, recipients)
    assert Counter(states.values())[State.UNKNOWN] <= 48
    with reading(engine) as connection:
        assert list(check_failover(connection)) == []
    engine.dispose()
