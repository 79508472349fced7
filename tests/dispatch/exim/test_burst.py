"""Burst mode through real Exim: what holds in cutthrough mode holds here, and connections are used for many messages."""

from __future__ import annotations

import datetime as dt
import os
import random
import signal
import threading
import time
from pathlib import Path

import pytest
import sqlalchemy as sa

from mail_pipelines.contacts import consent
from mail_pipelines.database.engine import reading, transact
from mail_pipelines.database.models import DeliveryEvent, State
from mail_pipelines.dispatch import audit, burst, servers
from mail_pipelines.dispatch.session import journal_of
from tests.dispatch.sessions import SessionProcess
from tests.dispatch.test_crashes import (  # noqa: F401 (collected here for the other mode)
    check_promise,
    finish,
    settle,
    test_a_withdrawn_permit_stops_a_sender_that_nobody_could_kill,
    test_a_zombie_sender_sends_nothing_after_its_lease,
)
from tests.dispatch.test_session import (  # noqa: F401 (collected here for the other mode)
    Start,
    session,
    start,
    test_a_server_that_never_answers_ends_the_session_with_everything_unsent,
    test_refusals_end_as_bounced_and_deferrals_come_back,
    test_refusals_keep_the_destinations_code_and_words,
    test_silence_and_drops_after_the_body_are_unknown_and_never_sent_again,
    test_the_message_names_its_recipient_and_its_sender,
    test_two_runs_on_one_shard_send_nothing_twice_and_keep_the_limits,
)
from tests.dispatch.world import Servers, World, make_world, write_play
from tests.parts.processes import wait_for

pytestmark = [pytest.mark.server, pytest.mark.timeout(120), pytest.mark.parametrize("database_url", ["mariadb"], indirect=True)]

ONE = ("google.test",)


@pytest.fixture
def kind() -> str:
    return "burst"


def test_connections_are_used_for_many_messages(engine: sa.Engine, tmp_path: Path, kind: str, running: Servers) -> None:
    world = make_world(engine, tmp_path / "home", recipients=200, kind=kind, domains=ONE)
    server = world.server(connections=2, messages_per_connection=40)
    exim = running.start(world, server, write_play(tmp_path / "play.toml"))
    report = session(world, server).run()
    assert report.reason == "the shard is final"
    assert world.states() == {State.DELIVERED: 200}
    assert world.copies() == dict.fromkeys(range(1, 201), 1)
    assert 200 / 40 <= exim.at_destinations() <= 30
    assert world.open_claims() == 0
    world.check_counters()


def test_both_modes_side_by_side_raise_no_alarm(engine: sa.Engine, tmp_path: Path, kind: str, running: Servers) -> None:
    """Exim's own words say how each message went; log and ledger agree; only where `>>` is expected is `=>` an alarm."""
    world = make_world(engine, tmp_path / "home", recipients=80, kind=kind)
    server = world.server()
    servers.set_limits(engine, None, "other", {"mode": "cutthrough", "connections": 4})
    servers.set_limits(engine, None, "google", {"mode": "cutthrough", "connections": 4})
    play = write_play(tmp_path / "play.toml", refuse_percent=10, refuse_body_percent=10, greylist_percent=20, greylist_seconds=1)
    exim = running.start(world, server, play)
    assert session(world, server).run().reason == "the shard is final"
    log = exim.folders.journal.read_text().splitlines()
    places = [(flag, provider) for flag in (" => ", " >> ") for provider in ("google", "small", "yahoo")]
    by_provider = {place: sum(all(word in line for word in place) for line in log) for place in places}
    assert {place for place, count in by_provider.items() if count} == {(" >> ", "google"), (" >> ", "small"), (" => ", "yahoo")}
    found = audit.run(engine, world.settings, server, journal_of(exim.folders, server.kind), dt.datetime.now(dt.UTC) + dt.timedelta(seconds=2))
    assert (found.alarms, found.bad_lines, found.unknown_forms, found.disagreements) == (0, 0, 0, {})
    assert found.outcomes["delivered"] == world.states()[State.DELIVERED] == len(world.copies())


def test_a_refusal_for_now_holds_up_nobody_else(engine: sa.Engine, tmp_path: Path, kind: str, running: Servers) -> None:
    """Exim keeps hints of hosts that failed. Here they must keep nobody from being tried."""
    world = make_world(engine, tmp_path / "home", recipients=40, kind=kind, domains=ONE, first_retry_seconds=1)
    server = world.server(connections=2)
    running.start(world, server, write_play(tmp_path / "play.toml", greylist_percent=50, greylist_seconds=1))
    session(world, server).run()
    assert world.states() == {State.DELIVERED: 40}
    with reading(engine) as connection:
        kinds = {row.kind for row in connection.execute(sa.select(DeliveryEvent.kind))}
    assert "unreachable" not in kinds
    assert "deferred" in kinds


def paced(world: World, running: Servers, tmp_path: Path) -> tuple[servers.ServerInfo, threading.Thread]:
    """A session at full speed, of which some has arrived. Its claims hold more than it may offer of them."""
    server = world.server(connections=4, per_second=60.0)
    running.start(world, server, write_play(tmp_path / "play.toml", reply_seconds=[0.01, 0.1]))
    thread = threading.Thread(target=session(world, server).run)
    thread.start()
    wait_for(lambda: len(world.kept()) > 60, what="sending")
    return server, thread


@pytest.mark.parametrize("state", ["paused", "cancelled"])
def test_a_stop_acts_within_a_burst(engine: sa.Engine, tmp_path: Path, kind: str, running: Servers, monkeypatch: pytest.MonkeyPatch, state: str) -> None:
    """A burst of two seconds here, so that its end comes long before all of it is sent."""
    monkeypatch.setattr(burst, "OFFER_SECONDS", 2.0)
    world = make_world(engine, tmp_path / "home", recipients=500, kind=kind, domains=ONE)
    server, thread = paced(world, running, tmp_path)
    world.set_campaign(state=state)
    stopped = time.time()
    thread.join(30)
    assert [message.at - stopped for message in world.kept() if message.at > stopped + 2 + 0.1 + 0.5] == []
    states = world.states()
    assert states[State.CLAIMED] == states[State.UNKNOWN] == 0
    if state == "paused":
        assert states[State.PENDING] > 150
        world.set_campaign(state="sending")
        servers.set_limits(engine, None, "*", {"mode": "burst", "connections": 12, "per_second": 500.0})
        assert session(world, server, "run-2").run().reason == "the shard is final"
        assert len(world.copies()) == 500
    assert set(world.copies().values()) == {1}
    world.check_counters()


def test_an_address_suppressed_in_mid_burst_is_not_mailed_after_it(
    engine: sa.Engine, tmp_path: Path, kind: str, running: Servers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(burst, "OFFER_SECONDS", 2.0)
    world = make_world(engine, tmp_path / "home", recipients=400, kind=kind, domains=ONE)
    _, thread = paced(world, running, tmp_path)
    late = list(range(251, 401))
    transact(engine, lambda connection: consent.unsubscribe(connection, late, scope="all", now=dt.datetime.now(dt.UTC)))
    when = time.time()
    thread.join(60)
    mailed = {contact for contact in world.copies() if contact in late}
    assert world.states() == {State.DELIVERED: 250 + len(mailed), State.SUPPRESSED: 150 - len(mailed)}
    assert [m for m in world.kept() if m.at > when + 2 + 0.1 + 0.5 and int(m.recipient.removeprefix("person").partition("@")[0]) in late] == []


def test_killed_senders_neither_lose_nor_repeat(engine: sa.Engine, tmp_path: Path, kind: str, running: Servers) -> None:
    """What a dead sender has left in the queue goes nowhere, and is in nobody's way."""
    recipients, kills, connections = 500, 6, 4
    world = make_world(engine, tmp_path / "home", kind=kind, recipients=recipients, domains=ONE)
    server = world.server(connections=connections, per_second=150.0)
    exim = running.start(world, server, write_play(tmp_path / "play.toml", reply_seconds=[0.05, 0.3], refuse_percent=3))
    draw = random.Random(1)
    unknown = 0
    for number in range(kills):
        before = len(world.kept())
        run = SessionProcess(world, server.key, f"run-{number}")
        wait_for(lambda before=before: len(world.kept()) > before, what="sending")
        time.sleep(draw.uniform(0, 0.4))  # the kill is to fall at any moment, so there is no condition to wait for
        run.kill()
        settle(world, exim)
        now_unknown = world.states()[State.UNKNOWN]
        assert now_unknown - unknown <= connections
        unknown = now_unknown
    finish(world, exim)
    check_promise(world, recipients)
    assert world.open_claims() == 0
    wait_for(lambda: not list((exim.folders.run / "spool").glob("*/input/*-D")), what="an empty queue")


def test_killed_processes_of_exim_neither_lose_nor_repeat(engine: sa.Engine, tmp_path: Path, kind: str, running: Servers) -> None:
    """Any of them, at any moment: runners, deliveries, the processes that talk to destinations, receivers."""
    recipients, kills = 240, 30
    world = make_world(engine, tmp_path / "home", recipients=recipients, kind=kind, domains=ONE, reply_timeout_seconds=3)
    server = world.server(connections=4, per_second=60.0)
    exim = running.start(world, server, write_play(tmp_path / "play.toml", reply_seconds=[0.1, 0.5]))
    draw = random.Random(11)
    run = SessionProcess(world, server.key, "run")
    wait_for(lambda: len(world.kept()) > 10, what="sending")
    done = 0
    while done < kills and run.process.is_alive():
        if children := exim.children():
            os.kill(draw.choice(children), signal.SIGKILL)
            done += 1
        time.sleep(draw.uniform(0, 0.1))  # the kill is to fall at any moment, so there is no condition to wait for
    run.wait()
    finish(world, exim)
    states = check_promise(world, recipients)
    assert 0 < sum(state is State.UNKNOWN for state in states.values()) <= done
    assert world.open_claims() == 0


def test_a_killed_exim_neither_loses_nor_repeats(engine: sa.Engine, tmp_path: Path, kind: str, running: Servers) -> None:
    recipients, kills, connections = 300, 4, 4
    world = make_world(engine, tmp_path / "home", kind=kind, recipients=recipients, domains=ONE)
    server = world.server(connections=connections, per_second=120.0)
    exim = running.start(world, server, write_play(tmp_path / "play.toml", reply_seconds=[0.05, 0.5]))
    draw = random.Random(3)
    unknown = 0
    for number in range(kills):
        before = len(world.kept())
        run = SessionProcess(world, server.key, f"run-{number}")
        wait_for(lambda before=before: len(world.kept()) > before, what="sending")
        time.sleep(draw.uniform(0, 0.4))  # any moment
        exim.kill()
        exim.start()
        run.wait()
        settle(world, exim)
        now_unknown = world.states()[State.UNKNOWN]
        assert now_unknown - unknown <= connections
        unknown = now_unknown
        if not world.states()[State.PENDING]:
            break
    finish(world, exim)
    check_promise(world, recipients)
    assert unknown > 0, "no kill hit a message at its destination: the test is too weak"


def test_a_stop_of_the_server_lets_what_is_at_destinations_end(engine: sa.Engine, tmp_path: Path, kind: str, running: Servers) -> None:
    world = make_world(engine, tmp_path / "home", recipients=200, kind=kind, domains=ONE)
    server = world.server(connections=4, per_second=100.0)
    exim = running.start(world, server, write_play(tmp_path / "play.toml", reply_seconds=[0.1, 0.5]))
    run = SessionProcess(world, server.key, "run")
    wait_for(lambda: len(world.kept()) > 20, what="sending")
    exim.process.terminate()
    assert exim.process.wait(20) == 0
    run.wait()
    assert set(world.states()) == {State.DELIVERED, State.PENDING}
    exim.start()
    finish(world, exim)
    check_promise(world, 200)
