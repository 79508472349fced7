"""A session that is asked to end: nothing more is offered, what is in flight is finished, the rest is released. The second time it ends at once."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path

import pytest
import sqlalchemy as sa

from mail_pipelines.database.models import State
from mail_pipelines.dispatch.interruption import SIGNALS, on_first_signal
from tests.dispatch.sessions import SessionProcess
from tests.dispatch.test_session import session
from tests.dispatch.world import Servers, make_world, write_play
from tests.parts.processes import wait_for

RECIPIENTS = 240
# One provider, so that its connections bound the pace.
DOMAINS = ("google.test",)


@pytest.mark.server
@pytest.mark.timeout(480)
@pytest.mark.parametrize(
    ("database_url", "kind", "number"),
    [("sqlite", "catcher", signal.SIGINT), ("mariadb", "exim", signal.SIGTERM), ("mariadb", "burst", signal.SIGTERM)],
    indirect=["database_url"],
)
def test_a_session_ends_in_order_at_the_first_signal(engine: sa.Engine, tmp_path: Path, kind: str, running: Servers, number: signal.Signals) -> None:
    """Destinations answer late, so that at each moment some messages are at theirs."""
    world = make_world(engine, tmp_path / "home", recipients=RECIPIENTS, kind=kind, domains=DOMAINS)
    server = world.server(connections=10, per_second=500.0)
    running.start(world, server, write_play(tmp_path / "play.toml", reply_seconds=[0.3, 0.3]))
    process = SessionProcess(world, server.key, "run-1")
    wait_for(lambda: len(world.copies()) > 20, what="messages under way")
    process.signal(number)
    assert process.wait(90) == "asked to end"
    states = world.states()
    assert states.keys() <= {State.DELIVERED, State.PENDING}
    assert 20 < states[State.DELIVERED] == len(world.copies()) < RECIPIENTS
    assert set(world.copies().values()) == {1}
    assert world.open_claims() == 0
    world.check_counters()
    # What was released is sent by the next session.
    assert session(world, server, "run-2").run().reason == "the shard is final"
    assert world.states() == {State.DELIVERED: RECIPIENTS}
    assert world.copies() == dict.fromkeys(range(1, RECIPIENTS + 1), 1)


@pytest.mark.server
@pytest.mark.timeout(480)
@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_the_second_signal_ends_it_at_once(engine: sa.Engine, tmp_path: Path, kind: str, running: Servers) -> None:
    """While it waits for a destination that says nothing."""
    world = make_world(engine, tmp_path / "home", recipients=20, kind=kind)
    server = world.server()
    running.start(world, server, write_play(tmp_path / "play.toml", silent_percent=100, silent_seconds=15))
    process = SessionProcess(world, server.key, "run-1")
    wait_for(lambda: world.states()[State.CLAIMED] > 0, what="a claim")
    wait_for(lambda: any(world.folders(server.key).permits.iterdir()), what="a permit")

    def ended() -> bool:
        # Signals that come before the first one is seen are one.
        process.process.terminate()
        return not process.process.is_alive()

    wait_for(ended, seconds=60, what="the end")
    assert process.process.exitcode == -signal.SIGTERM


def test_handlers_are_as_before_after_the_first_signal_and_after_the_block() -> None:
    heard: list[int] = []
    before = [signal.signal(number, lambda number, _: heard.append(number)) for number in SIGNALS]
    try:
        own = [signal.getsignal(number) for number in SIGNALS]
        requests: list[str] = []
        with on_first_signal(lambda: requests.append("end")):
            os.kill(os.getpid(), signal.SIGTERM)
            assert (requests, heard) == (["end"], [])
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGINT)
            assert (requests, heard) == (["end"], [signal.SIGTERM, signal.SIGINT])
        with on_first_signal(lambda: None):
            pass
        assert [signal.getsignal(number) for number in SIGNALS] == own
    finally:
        for number, handler in zip(SIGNALS, before, strict=True):
            signal.signal(number, handler)


def test_a_thread_has_no_signals_to_take() -> None:
    before = [signal.getsignal(number) for number in SIGNALS]
    seen: list[object] = []

    def work() -> None:
        with on_first_signal(lambda: None):
            seen.extend(signal.getsignal(number) for number in SIGNALS)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == before
