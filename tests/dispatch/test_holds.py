"""Holds, measured at the far end: nothing of what is held leaves any server after five seconds, whatever restarts, until it is released."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import sqlalchemy as sa

from mail_pipelines.database.models import State
from mail_pipelines.dispatch import servers
from mail_pipelines.dispatch.catcher.store import Kept
from mail_pipelines.dispatch.holds import Kind
from mail_pipelines.dispatch.session import Report
from tests.dispatch.sessions import SessionProcess
from tests.dispatch.test_crashes import check_promise, finish
from tests.dispatch.test_session import session
from tests.dispatch.world import Servers, make_world, write_play
from tests.parts.processes import wait_for

pytestmark = [pytest.mark.server, pytest.mark.crosswise, pytest.mark.timeout(480)]


def by_server(message: Kept) -> bool:
    """Through s1: the folder of a catcher, or of the destinations behind an Exim."""
    return Path(message.file).parent.name in ("s1", "far-s1")


def to_provider(message: Kept) -> bool:
    return message.recipient.endswith("@google.test")


# Which messages a hold concerns, and the reasons with which sessions of both servers end.
SCOPES: dict[Kind, tuple[Callable[[Kept], bool], set[str]]] = {
    Kind.EVERYTHING: (lambda _: True, {"everything is held: look"}),
    Kind.SERVER: (by_server, {"the server is held: look", "the shard is final"}),
    Kind.PROVIDER: (to_provider, {"google is held: look"}),
}


@pytest.mark.parametrize("scope", SCOPES)
def test_a_hold_acts_within_five_seconds_at_full_speed(engine: sa.Engine, tmp_path: Path, kind: str, running: Servers, scope: Kind) -> None:
    acts_within_five_seconds(engine, tmp_path, kind, running, scope)


def acts_within_five_seconds(engine: sa.Engine, tmp_path: Path, kind: str, running: Servers, scope: Kind) -> None:
    """With two servers. What is not held goes on; what is left goes out after the release, and nothing twice."""
    concerns, reasons = SCOPES[scope]
    recipients, per_second = (700, 10.0) if kind == "burst" else (1600, 20.0)
    world = make_world(engine, tmp_path / "home", recipients=recipients, kind=kind)
    fleet = [world.server(key, connections=3 if kind == "burst" else 8, per_second=per_second) for key in ("s1", "s2")]
    for server in fleet:
        running.start(world, server, write_play(tmp_path / "play.toml"))
    reports: list[Report] = []
    threads = [threading.Thread(target=lambda server=server: reports.append(session(world, server, f"run-{server.key}").run())) for server in fleet]
    for thread in threads:
        thread.start()
    wait_for(lambda: len(world.kept()) > 60, what="sending")
    world.hold(scope)
    held_at = time.time()
    for thread in threads:
        thread.join(120)
    assert len(reports) == len(fleet)
    assert all(any(reason in report.reason for reason in reasons) for report in reports), reports
    kept = world.kept()
    late = [message for message in kept if message.at > held_at + 5]
    assert [message.at - held_at for message in late if concerns(message)] == []
    assert any(message.at > held_at for message in kept)
    states = world.states()
    if scope is Kind.SERVER:
        assert (len(late) > 50, states) == (True, {State.DELIVERED: recipients})
    else:
        assert set(states) == {State.DELIVERED, State.PENDING}
        assert states[State.PENDING] > 60
        assert bool(late) is (scope is Kind.PROVIDER)
        assert session(world, fleet[1], "still held").run().claimed == 0
        world.release(scope)
        servers.set_limits(engine, None, "*", {"mode": "burst" if kind == "burst" else "cutthrough", "connections": 12, "per_second": 500.0})
        assert session(world, fleet[0], "released").run().reason == "the shard is final"
    assert world.copies() == dict.fromkeys(range(1, recipients + 1), 1)
    assert world.open_claims() == 0
    world.check_counters()


def test_a_hold_outlives_the_restart_of_everything(engine: sa.Engine, tmp_path: Path, kind: str, running: Servers) -> None:
    recipients = 400
    world = make_world(engine, tmp_path / "home", recipients=recipients, kind=kind, linger_seconds=1)
    # So slow that it is not through with it, however long the hold takes.
    server = world.server(connections=8, per_second=8.0)
    mail_server = running.start(world, server, write_play(tmp_path / "play.toml", reply_seconds=[0.01, 0.1]))
    run = SessionProcess(world, server.key, "first")
    wait_for(lambda: len(world.kept()) > 50, what="sending")
    world.hold(Kind.EVERYTHING)
    run.kill()
    mail_server.kill()
    engine.dispose()
    mail_server.start()
    # This session settles what the dead one left, and by then nothing is on its way any more.
    assert SessionProcess(world, server.key, "second").wait() == "everything is held: look"
    before = len(world.kept())
    assert before < recipients
    for number in range(3):
        assert SessionProcess(world, server.key, f"again-{number}").wait() == "everything is held: look"
    assert len(world.kept()) == before
    assert world.open_claims() == 0
    world.release(Kind.EVERYTHING)
    world.limit(connections=8, per_second=50.0)
    finish(world, mail_server)
    check_promise(world, recipients)
    assert len(world.kept()) > before
