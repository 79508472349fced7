"""Promise 1 through real Exim: what is killed here is a send run, one of Exim's processes, its daemon, or all of it at once."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
from pathlib import Path

import pytest
import sqlalchemy as sa

from mail_pipelines.database.models import State
from tests.dispatch.sessions import SessionProcess
from tests.dispatch.test_crashes import (  # noqa: F401 (collected here for the other kind)
    check_promise,
    finish,
    test_a_log_that_is_not_the_log_makes_rows_unknown_and_never_pending,
    test_a_withdrawn_permit_stops_a_sender_that_nobody_could_kill,
    test_a_zombie_sender_sends_nothing_after_its_lease,
    test_killed_senders_neither_lose_nor_repeat,
    test_killed_servers_neither_lose_nor_repeat,
    test_kills_while_destinations_drop_and_fall_silent,
)
from tests.dispatch.world import Servers, make_world, write_play
from tests.parts.processes import wait_for

# As in production. What is collected here is attacked on SQLite with the catcher (`crosswise`).
pytestmark = [pytest.mark.timeout(600), pytest.mark.server, pytest.mark.parametrize("database_url", ["mariadb"], indirect=True)]


def test_killed_children_of_exim_neither_lose_nor_repeat(engine: sa.Engine, tmp_path: Path, kind: str, running: Servers) -> None:
    """SIGKILL of the process that has a message at its destination: that message is unknown, and no other one."""
    recipients, kills = 400, 15
    world = make_world(engine, tmp_path / "home", recipients=recipients, kind=kind)
    server = world.server(connections=6, per_second=60.0)
    # So slow that much is still to be sent when the last one is killed.
    exim = running.start(world, server, write_play(tmp_path / "play.toml", reply_seconds=[0.5, 1.5]))
    draw = random.Random(11)
    run = SessionProcess(world, server.key, "run")
    wait_for(lambda: len(world.kept()) > 10, what="sending")
    done = 0
    while done < kills and run.process.is_alive():
        if children := exim.children():
            # One that has ended since is none.
            with contextlib.suppress(ProcessLookupError):
                os.kill(draw.choice(children), signal.SIGKILL)
                done += 1
        time.sleep(draw.uniform(0, 0.3))  # the kill is to fall at any moment, so there is no condition to wait for
    run.wait()
    finish(world, exim)
    states = check_promise(world, recipients)
    assert done == kills
    assert 0 < sum(state is State.UNKNOWN for state in states.values()) <= kills
    assert world.open_claims() == 0


def test_a_killed_daemon_takes_no_message_with_it(engine: sa.Engine, tmp_path: Path, kind: str, running: Servers) -> None:
    """The process that watches it ends then, and Exim's children with it, each after it has written what became of its message."""
    recipients, kills = 400, 4
    world = make_world(engine, tmp_path / "home", recipients=recipients, kind=kind)
    # So slow that there is something to send for the last one, too.
    server = world.server(connections=6, per_second=6.0)
    exim = running.start(world, server, write_play(tmp_path / "play.toml", reply_seconds=[0.1, 0.5]))
    for number in range(kills):
        before = len(world.kept())
        run = SessionProcess(world, server.key, f"run-{number}")
        wait_for(lambda before=before: len(world.kept()) > before + 20, what="sending")
        os.kill(exim.daemon(), signal.SIGKILL)
        assert exim.process.wait(120) == 1
        assert "Exim ended with status -9" in (exim.folders.log / "process.log").read_text()
        run.kill()
        exim.start()
    world.limit(connections=6, per_second=60.0)
    finish(world, exim)
    states = check_promise(world, recipients)
    assert set(states.values()) == {State.DELIVERED}


def test_after_a_kill_of_the_watching_process_the_next_start_ends_its_exim(engine: sa.Engine, tmp_path: Path, kind: str, running: Servers) -> None:
    world = make_world(engine, tmp_path / "home", recipients=4, kind=kind)
    server = world.server()
    exim = running.start(world, server, write_play(tmp_path / "play.toml"))
    orphan = exim.daemon()
    exim.process.kill()
    exim.process.wait()
    exim.start()
    assert exim.daemon() != orphan
    finish(world, exim)
    assert world.states() == {State.DELIVERED: 4}
