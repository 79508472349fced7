"""The registry of servers: each move of the table and no other, servers that go without a loss, and what is shown of one."""

from __future__ import annotations

import datetime as dt
import re
import threading
import time
from pathlib import Path

import pytest
import sqlalchemy as sa

from mail_pipelines.commands import context
from mail_pipelines.database.engine import reading, transact
from mail_pipelines.database.models import State
from mail_pipelines.dispatch import audit, last_error, registry, servers, settlement
from mail_pipelines.dispatch.claims import OpenClaim
from mail_pipelines.dispatch.files import DispatchError
from mail_pipelines.dispatch.registry import LOST_AFTER, MOVES, ServerState, ServerStateError, Watch
from mail_pipelines.dispatch.session import Report, journal_of
from tests.dispatch.test_hold_commands import says
from tests.dispatch.test_session import session
from tests.dispatch.world import Running, Servers, World, make_world, write_play
from tests.parts.processes import wait_for

NOW = dt.datetime(2026, 3, 2, 9, 0, tzinfo=dt.UTC)
MINUTE = dt.timedelta(minutes=1)


@pytest.fixture
def world(engine: sa.Engine, tmp_path: Path, kind: str) -> World:
    context.settings.cache_clear()
    return make_world(engine, tmp_path / "home", recipients=40, kind=kind)


def state_of(world: World, key: str = "s1") -> ServerState:
    with reading(world.engine) as connection:
        return ServerState(servers.find(connection, key).state)


@pytest.mark.parametrize("source", ServerState)
def test_every_move_of_the_table_is_made_and_no_other(world: World, source: ServerState) -> None:
    world.server()
    for verb, move in MOVES.items():
        world.set_server("s1", state=source.value)
        if source in move.sources:
            assert transact(world.engine, lambda connection, verb=verb: registry.move(connection, "s1", verb)) is move.target
            assert state_of(world) is move.target
        else:
            with pytest.raises(ServerStateError, match=f"server s1 is {source}, so it cannot become {move.target}; possible: "):
                transact(world.engine, lambda connection, verb=verb: registry.move(connection, "s1", verb))
            assert state_of(world) is source


def test_moves_as_an_operator_makes_them(world: World) -> None:
    world.server()
    assert says("server", "pause", "s1") == "server s1 is paused\n"
    assert says("server", "drain", "s1") == "server s1 is draining\n"
    assert says("server", "activate", "s1") == "server s1 is active\n"
    with pytest.raises(ServerStateError, match="server s1 is active, so it cannot become retired; possible: pause → paused, drain → draining"):
        says("server", "retire", "s1")
    with pytest.raises(DispatchError, match="no server is called 's2'"):
        says("server", "pause", "s2")


# --- at work ------------------------------------------------------------------------------------------------------


@pytest.fixture
def at_work(engine: sa.Engine, tmp_path: Path, kind: str, running: Servers) -> tuple[World, Running]:
    """A server with more to send than it can in a test."""
    context.settings.cache_clear()
    world = make_world(engine, tmp_path / "home", recipients=1500, kind=kind)
    server = world.server(connections=3 if kind == "burst" else 8, per_second=20.0)
    return world, running.start(world, server, write_play(tmp_path / "play.toml"))


@pytest.mark.server
@pytest.mark.crosswise
@pytest.mark.parametrize("verb", ["pause", "drain"])
def test_a_server_taken_out_at_full_speed_ends_what_it_has_in_hand(at_work: tuple[World, Running], verb: str) -> None:
    world, mail_server = at_work
    reports: list[Report] = []
    thread = threading.Thread(target=lambda: reports.append(session(world, mail_server.server).run()))
    thread.start()
    wait_for(lambda: len(world.kept()) > 60, what="sending")
    said_at = time.time()
    state = says("server", verb, "s1").split()[-1]
    thread.join(60)
    assert [report.reason for report in reports] == [f"server s1 is {state}"]
    bound = 5 if world.kind != "burst" or verb == "pause" else 15
    assert [message.at - said_at for message in world.kept() if message.at > said_at + bound] == []
    assert set(world.states()) == {State.DELIVERED, State.PENDING}
    assert world.open_claims() == 0
    assert session(world, mail_server.server, "run-2").run().claimed == 0
    if verb == "drain":
        assert "state drained" in says("server", "show", "s1")
        with pytest.raises(ServerStateError, match="its log has lines that were not read"):
            retire_when_told(world)
        # Exim says a message is done after it has said that it is delivered, so the log may still grow by some lines.
        wait_for(lambda: retires_once_read(world, mail_server), seconds=60, what="the end of the log is read")
        assert state_of(world) is ServerState.RETIRED
    else:
        says("server", "activate", "s1")
        assert isinstance(world.claim(mail_server.server, limit=1), OpenClaim)
    world.check_counters()


def beat_tells(world: World, offset: int) -> bool:
    with reading(world.engine) as connection:
        return ((servers.find(connection, "s1").health or {}).get("journal") or [0, 0])[1] == offset


def retire_when_told(world: World) -> None:
    """The end of the log is known from the next beat on."""
    wait_for(lambda: beat_tells(world, world.folders("s1").journal.stat().st_size), seconds=30, what="a beat")
    says("server", "retire", "s1")


def retires_once_read(world: World, mail_server: Running) -> bool:
    """Read the log to its end and retire the server, as the hourly audit and an operator do; False if the log has grown since."""
    journal = journal_of(mail_server.folders, mail_server.server.kind)
    audit.run(world.engine, world.settings, mail_server.server, journal, dt.datetime.now(dt.UTC))
    if not beat_tells(world, journal.end().offset):
        return False
    try:
        return says("server", "retire", "s1") == "server s1 is retired\n"
    except ServerStateError as error:
        if "its log has lines that were not read" not in str(error):
            raise
        return False


def test_a_server_with_something_in_hand_does_not_retire(world: World) -> None:
    server = world.server()
    world.grant(server)
    opened = world.claim(server)
    assert isinstance(opened, OpenClaim)
    says("server", "drain", "s1")
    shown = says("server", "show", "s1")
    assert "state draining" in shown
    assert "before it retires 1 claims are open" in shown
    with pytest.raises(ServerStateError, match=r"server s1 cannot be retired yet: 1 claims are open: .* For a host that will not come back: --lost"):
        says("server", "retire", "s1")
    assert state_of(world) is ServerState.DRAINING
    assert settlement.give_up(world.engine, server.id) == len(opened.rows)
    # It has beaten once, and not since: its log may have grown.
    world.set_server("s1", heartbeat_at=dt.datetime.now(dt.UTC) - 5 * MINUTE)
    with pytest.raises(ServerStateError, match="it is silent, so nobody knows the end of its log"):
        says("server", "retire", "s1")
    world.set_server("s1", heartbeat_at=None)
    assert says("server", "retire", "s1") == "server s1 is retired\n"


@pytest.mark.parametrize("state", [ServerState.ACTIVE, ServerState.PAUSED, ServerState.LOST])
def test_a_host_that_will_not_come_back(world: World, state: ServerState) -> None:
    server = world.server()
    world.grant(server)
    opened = world.claim(server)
    assert isinstance(opened, OpenClaim)
    world.set_server("s1", state=state.value, heartbeat_at=dt.datetime.now(dt.UTC) - 5 * MINUTE)
    assert says("server", "retire", "s1", "--lost") == f"server s1 is retired; {len(opened.rows)} recipients it had in hand are unknown now\n"
    assert world.states() == {State.PENDING: 40 - len(opened.rows), State.UNKNOWN: len(opened.rows)}
    assert world.open_claims() == 0
    with pytest.raises(ServerStateError, match="server s1 is retired, so it cannot become retired; possible: nothing"):
        says("server", "retire", "s1", "--lost")
    world.check_counters()


# --- silence ------------------------------------------------------------------------------------------------------


def test_silence_is_watched_look_after_look() -> None:
    watch = Watch()
    for minute in range(30):
        watch = Watch.read(watch.write()).look(["a", *(["b"] if minute != 10 else [])], NOW + minute * MINUTE)
        assert watch.silent_for(LOST_AFTER) == set()
    watch = watch.look(["a", "b"], NOW + 30 * MINUTE)
    assert watch.silent_for(LOST_AFTER) == {"a"}
    # Nobody looked for ten minutes: what was seen before says nothing of them.
    assert watch.look(["a", "b"], NOW + 40 * MINUTE).silent_for(LOST_AFTER) == set()


# --- health -------------------------------------------------------------------------------------------------------


def test_the_last_error_names_nobody_and_is_told_by_the_next_beat(world: World) -> None:
    server = world.server()
    folders = world.folders("s1")
    heartbeat = servers.Heartbeat(world.engine, "s1", folders, 10, lambda: {"version": "Exim 4.96", "queue": 7})
    heartbeat.start()
    assert "last error" not in says("server", "show", "s1")
    last_error.keep(folders, "session run-1", DispatchError("550 <jo.doe@example.org> is not welcome"))
    heartbeat.beat()
    shown = says("server", "show", "s1")
    assert re.search(r"last error \S+ session run-1: 550 <\*\*\*@example.org> is not welcome", shown), shown
    assert "mail server Exim 4.96" in shown
    assert "queue 7 messages" in shown
    assert re.search(r"disk of its log [\d,]+ MB free", shown)
    last_error.keep(folders, "settler", ValueError("whom this names we do not know: jo"))
    assert (last_error.read(folders) or {})["text"] == "ValueError"
    assert server.key == "s1"


@pytest.mark.server
def test_a_session_that_fails_leaves_its_reason(engine: sa.Engine, tmp_path: Path, kind: str) -> None:
    """Its mail server does not run."""
    world = make_world(engine, tmp_path / "home", recipients=4, kind=kind, linger_seconds=1)
    server = world.server()
    folders = world.folders("s1")
    with pytest.raises(DispatchError, match="there is no journal"):
        session(world, server).run()
    assert "there is no journal" in (last_error.read(folders) or {})["text"]
    folders.journal.touch()
    session(world, server, "run-2").run()
    kept = last_error.read(folders) or {}
    assert kept["what"] == "session run-2"
    assert "127.0.0.1" in kept["text"]
