"""Burst mode through real Exim: what holds in cutthrough mode holds here, and connections are used for many messages."""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import os
import random
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from mail_pipelines.contacts import consent
from mail_pipelines.database.engine import reading, transact
from mail_pipelines.database.models import DeliveryEvent, State
from mail_pipelines.dispatch import audit, burst, servers
from mail_pipelines.dispatch.exim import runners
from mail_pipelines.dispatch.journal import Kind
from mail_pipelines.dispatch.session import Report, journal_of
from tests.dispatch.sessions import SessionProcess
from tests.dispatch.test_crashes import (  # noqa: F401 (the tests are collected here for this mode)
    check_promise,
    finish,
    settle,
    test_killed_senders_neither_lose_nor_repeat,
    test_killed_servers_neither_lose_nor_repeat,
    withdraw_permits_of,
)
from tests.dispatch.test_session import STOPS, Stop, go_on, pause, session
from tests.dispatch.world import Attack, Servers, make_world, write_play
from tests.parts.processes import wait_for

pytestmark = [pytest.mark.server, pytest.mark.timeout(600), pytest.mark.parametrize("database_url", ["mariadb"], indirect=True)]

ONE = ("google.test",)


@pytest.fixture
def kind() -> str:
    return "burst"


@pytest.fixture
def on_senders() -> Attack:
    return Attack(recipients=300, kills=3, connections=8, per_second=150.0, domains=ONE, linger_seconds=1)


@pytest.fixture
def on_servers() -> Attack:
    return Attack(recipients=200, kills=2, connections=8, per_second=120.0, domains=ONE, linger_seconds=1)


def test_connections_are_used_for_many_messages_at_the_providers_pace(engine: sa.Engine, tmp_path: Path, kind: str, running: Servers) -> None:
    """Two sessions at once, which share pace and connections."""
    recipients, per_second = 160, 25.0
    world = make_world(engine, tmp_path / "home", recipients=recipients, kind=kind, domains=ONE)
    server = world.server(connections=4, per_second=per_second, messages_per_connection=40)
    exim = running.start(world, server, write_play(tmp_path / "play.toml"))
    threads = [threading.Thread(target=session(world, server, f"run-{number}").run) for number in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert world.states() == {State.DELIVERED: recipients}
    assert world.copies() == dict.fromkeys(range(1, recipients + 1), 1)
    assert recipients / 40 <= exim.at_destinations() <= recipients / 4
    times = sorted(message.at for message in world.kept())
    # A message takes a moment from its turn to its end, so a window is a little wider.
    assert max(sum(begin <= moment < begin + 1 for moment in times) for begin in times) <= per_second * 1.2 + 1
    assert world.open_claims() == 0
    world.check_counters()


def test_both_modes_side_by_side_raise_no_alarm(engine: sa.Engine, tmp_path: Path, kind: str, running: Servers) -> None:
    """Log and ledger agree on refusals with their words, on deferrals that come back, and on whom each mode has delivered."""
    world = make_world(engine, tmp_path / "home", recipients=80, kind=kind)
    server = world.server()
    for provider in ("google", "other"):
        servers.set_limits(engine, None, provider, {"mode": "cutthrough", "connections": 4})
    at_recipient, at_body = "550 5.1.1 No such user here", "554 5.7.1 Not this content"
    play: dict[str, Any] = {"refuse_percent": 15, "refusals": [at_recipient], "refuse_body_percent": 15, "body_refusals": [at_body]}
    exim = running.start(world, server, write_play(tmp_path / "play.toml", greylist_percent=20, greylist_seconds=1, **play))
    assert session(world, server).run().reason == "the shard is final"
    log = exim.folders.journal.read_text().splitlines()
    places = [(flag, domain) for flag in (" => ", " >> ") for domain in ("@google", "@small", "@yahoo", "@microsoft")]
    delivered = {place for place in places if any(all(word in line for word in place) for line in log)}
    assert delivered == {(" >> ", "@google"), (" >> ", "@small"), (" => ", "@yahoo"), (" => ", "@microsoft")}
    states = world.states()
    assert set(states) == {State.DELIVERED, State.BOUNCED}
    assert set(world.copies().values()) == {1}
    assert len(world.copies()) == states[State.DELIVERED]
    with reading(engine) as connection:
        events = connection.execute(sa.select(DeliveryEvent.kind, DeliveryEvent.code, DeliveryEvent.enhanced, DeliveryEvent.text)).all()
    assert {f"{event.code} {event.enhanced} {event.text}" for event in events if event.kind == "bounced"} == {at_recipient, at_body}
    # Exim keeps hints of hosts that failed; they have kept nobody from being tried.
    assert {event.kind for event in events} == {"bounced", "greylisted"}
    audited = audit.run(engine, world.settings, server, journal_of(exim.folders, server.kind), dt.datetime.now(dt.UTC) + dt.timedelta(seconds=2))
    aside = exim.folders.log / "set-aside.log"
    assert not aside.exists(), aside.read_text()
    assert (audited.alarms, audited.bad_lines, audited.unknown_forms, audited.disagreements) == (0, 0, 0, {})
    assert audited.outcomes[Kind.DELIVERED] == states[State.DELIVERED]


def test_silence_and_drops_after_the_body_are_unknown_and_never_sent_again(engine: sa.Engine, tmp_path: Path, kind: str, running: Servers) -> None:
    world = make_world(engine, tmp_path / "home", recipients=60, kind=kind, domains=ONE)
    server = world.server(connections=8)
    play: dict[str, Any] = {"drop_percent": 15, "silent_percent": 10, "silent_seconds": 1.5}
    running.start(world, server, write_play(tmp_path / "play.toml", **play))
    assert session(world, server).run().reason == "all open rows are with other sessions or unknown"
    states = world.states()
    assert states[State.UNKNOWN] > 3
    assert states[State.DELIVERED] + states[State.UNKNOWN] == 60
    assert session(world, server, "run-2").run().claimed == 0
    assert set(world.copies().values()) == {1}
    # About half of the unknown ones were taken at the far end.
    assert states[State.DELIVERED] < len(world.copies()) < 60


@STOPS
def test_a_stop_acts_within_five_seconds(engine: sa.Engine, tmp_path: Path, kind: str, running: Servers, stop: Stop, reason: str, left: State) -> None:
    """In the midst of a burst, at full speed, counted at the destination."""
    recipients = 450
    world = make_world(engine, tmp_path / "home", recipients=recipients, kind=kind, domains=ONE)
    server = world.server(connections=8, per_second=30.0)
    running.start(world, server, write_play(tmp_path / "play.toml", reply_seconds=[0.01, 0.1]))
    reports: list[Report] = []
    thread = threading.Thread(target=lambda: reports.append(session(world, server).run()))
    thread.start()
    wait_for(lambda: len(world.kept()) > 60, what="sending")
    stopped_at = time.time()
    stop(world)
    thread.join()
    assert [report.reason for report in reports] == [reason]
    assert [message.at - stopped_at for message in world.kept() if message.at > stopped_at + 5] == []
    states = world.states()
    assert set(states) == {State.DELIVERED, left}
    assert states[left] > 100
    assert world.open_claims() == 0
    if stop is pause:
        # Going on sends the rest, and nobody twice.
        go_on(world)
        servers.set_limits(engine, None, "*", {"mode": "burst", "connections": 12, "per_second": 500.0})
        assert session(world, server, "run-2").run().reason == "the shard is final"
        assert world.copies() == dict.fromkeys(range(1, recipients + 1), 1)
    assert set(world.copies().values()) == {1}
    assert len(world.copies()) == world.states()[State.DELIVERED]
    world.check_counters()


def test_late_suppression_acts_within_a_burst(engine: sa.Engine, tmp_path: Path, kind: str, running: Servers, monkeypatch: pytest.MonkeyPatch) -> None:
    """A burst of two seconds here, whose claim holds much more."""
    monkeypatch.setattr(burst, "OFFER_SECONDS", 2.0)
    recipients, late = 250, range(151, 201)
    world = make_world(engine, tmp_path / "home", recipients=recipients, kind=kind, domains=ONE)
    server = world.server(connections=8, per_second=30.0)
    running.start(world, server, write_play(tmp_path / "play.toml", reply_seconds=[0.01, 0.1]))
    thread = threading.Thread(target=session(world, server).run)
    thread.start()
    wait_for(lambda: len(world.kept()) > 30, what="sending")
    transact(engine, lambda connection: consent.unsubscribe(connection, list(late), scope="all", now=dt.datetime.now(dt.UTC)))
    suppressed_at = time.time()
    thread.join()
    # The destination's own time, and the last message's way there.
    after = 2 + 0.1 + 0.5
    assert [m for m in world.kept() if m.at > suppressed_at + after and int(m.recipient.removeprefix("person").partition("@")[0]) in late] == []
    copies = world.copies()
    assert set(copies.values()) == {1}
    assert set(range(1, recipients + 1)) - set(copies) <= set(late)
    assert world.states() == {State.DELIVERED: len(copies), State.SUPPRESSED: recipients - len(copies)}
    assert len(copies) < recipients
    world.check_counters()


def test_withdrawn_permits_stop_a_sender_that_nobody_could_kill(engine: sa.Engine, tmp_path: Path, kind: str, running: Servers) -> None:
    world = make_world(engine, tmp_path / "home", recipients=80, kind=kind, domains=ONE, linger_seconds=1)
    # So slow that much is still to be sent by then.
    server = world.server(connections=8, per_second=5.0)
    exim = running.start(world, server, write_play(tmp_path / "play.toml", reply_seconds=[0.05, 0.2]))
    run = SessionProcess(world, server.key, "sleeper")
    wait_for(lambda: len(world.kept()) > 20, what="sending")
    withdraw_permits_of(run, exim)
    world.limit(connections=8, per_second=60.0)
    finish(world, exim)
    check_promise(world, 80)
    assert world.states() == {State.DELIVERED: 80}


def test_what_a_dead_sender_has_left_in_the_queue_goes_nowhere(engine: sa.Engine, tmp_path: Path, kind: str, running: Servers) -> None:
    world = make_world(engine, tmp_path / "home", kind=kind, recipients=60, domains=ONE, linger_seconds=1)
    server = world.server(connections=8, per_second=60.0)
    exim = running.start(world, server, write_play(tmp_path / "play.toml", reply_seconds=[0.05, 0.2]))
    run = SessionProcess(world, server.key, "run")
    wait_for(lambda: len(world.kept()) > 10, what="sending")
    run.kill()
    settle(world, exim)
    before = len(world.kept())

    def emptied() -> bool:
        """The next runner that comes by throws away what is left."""
        for gates in exim.folders.gates.iterdir():
            asyncio.run(runners.run_queue(exim.folders.runners, gates.name, 1))
        return not list((exim.folders.run / "spool").glob("*/input/*-D"))

    wait_for(emptied, what="an empty queue")
    assert len(world.kept()) == before


def test_killed_processes_of_exim_neither_lose_nor_repeat(engine: sa.Engine, tmp_path: Path, kind: str, running: Servers) -> None:
    """Any of them, at any moment: runners, deliveries, the processes that talk to destinations, receivers."""
    recipients, kills = 100, 15
    world = make_world(engine, tmp_path / "home", recipients=recipients, kind=kind, domains=ONE, linger_seconds=1, reply_timeout_seconds=3)
    server = world.server(connections=8, per_second=60.0)
    # So slow that much is still to be sent when the last one is killed.
    exim = running.start(world, server, write_play(tmp_path / "play.toml", reply_seconds=[0.5, 1.5]))
    draw = random.Random(11)
    run = SessionProcess(world, server.key, "run")
    wait_for(lambda: len(world.kept()) > 10, what="sending")
    done = 0
    while done < kills and run.process.is_alive():
        if children := exim.children():
            with contextlib.suppress(ProcessLookupError):
                os.kill(draw.choice(children), signal.SIGKILL)
                done += 1
        time.sleep(draw.uniform(0, 0.1))  # the kill is to fall at any moment, so there is no condition to wait for
    run.wait()
    finish(world, exim)
    states = check_promise(world, recipients)
    assert 0 < sum(state is State.UNKNOWN for state in states.values()) <= done
    assert world.open_claims() == 0


def test_a_stop_of_the_server_lets_what_is_at_destinations_end(engine: sa.Engine, tmp_path: Path, kind: str, running: Servers) -> None:
    world = make_world(engine, tmp_path / "home", recipients=200, kind=kind, domains=ONE, linger_seconds=1)
    # So slow that much is still to be sent by then.
    server = world.server(connections=8, per_second=15.0)
    exim = running.start(world, server, write_play(tmp_path / "play.toml", reply_seconds=[0.05, 0.2]))
    run = SessionProcess(world, server.key, "run")
    wait_for(lambda: len(world.kept()) > 20, what="sending")
    exim.process.terminate()
    assert exim.process.wait(120) == 0
    run.wait()
    assert set(world.states()) == {State.DELIVERED, State.PENDING}
    exim.start()
    world.limit(connections=8, per_second=60.0)
    finish(world, exim)
    check_promise(world, 200)
