"""Promise 1, attacked: whatever is killed, stopped or started twice, nobody is lost and nobody is mailed twice.

All counts are taken at the far end: from what the catchers keep, not from what we believe we sent. Destinations answer
late, drop connections and fall silent, so the dangerous moment (final dot sent, answer not heard) is hit all the time.
"""

from __future__ import annotations

import contextlib
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from mail_pipelines.database.engine import database_now, reading, transact
from mail_pipelines.database.models import Claim, Delivery, State
from mail_pipelines.dispatch import last_error, permit, settlement
from mail_pipelines.dispatch.files import AlreadyRunning, only_one
from mail_pipelines.dispatch.servers import ServerInfo
from mail_pipelines.dispatch.session import journal_of
from tests.dispatch.sessions import SessionProcess
from tests.dispatch.world import Attack, Running, Servers, World, make_world, write_play
from tests.parts.processes import wait_for

pytestmark = [pytest.mark.timeout(600), pytest.mark.server]


def settle(world: World, catcher: Running, wait_seconds: float = 20) -> settlement.Settled:
    journal = journal_of(catcher.folders, catcher.server.kind)
    key = world.settings.token_key()
    return settlement.settle_all(world.engine, world.sender(catcher.server), catcher.folders, journal, world.settings.sending, key, wait_seconds=wait_seconds)


def settle_all(world: World, catcher: Running) -> None:
    """Settle until no claim is open. The server's own settler, which comes by every few seconds, may be at one of them."""
    wait_for(lambda: settle(world, catcher) and not world.open_claims(), seconds=60, what="settlement")


def kill_both(run: SessionProcess, catcher: Running) -> int:
    """SIGKILL a session at work and its server so that neither notices the other's end, and nobody settles yet; returns how many claims are open."""
    claims = run.stop_at_work()
    catcher.kill()
    run.kill()
    return claims


def ended_by_the_settler(catcher: Running) -> None:
    """The server's settler was quicker than the session `sleeper`, which found its claim closed."""
    error = last_error.read(catcher.folders) or {}
    assert (error.get("what"), "no longer open" in error.get("text", "")) == ("session sleeper", True), error


def states_by_contact(world: World) -> dict[int, State]:
    with reading(world.engine) as connection:
        return {row.contact_id: State(row.state) for row in connection.execute(sa.select(Delivery.contact_id, Delivery.state))}


def check_promise(world: World, recipients: int) -> dict[int, State]:
    """Nobody twice; everybody either arrived, or is bounced or unknown; everyone called delivered did arrive."""
    copies = world.copies()
    states = states_by_contact(world)
    assert {contact: count for contact, count in copies.items() if count > 1} == {}
    assert len(states) == recipients
    lost = [contact for contact, state in states.items() if contact not in copies and state not in (State.UNKNOWN, State.BOUNCED)]
    assert lost == []
    assert [contact for contact, state in states.items() if state is State.BOUNCED and contact in copies] == []
    world.check_counters()
    return states


def finish(world: World, catcher: Running) -> None:
    """Let undisturbed sessions do the rest."""
    for number in range(20):
        reason = SessionProcess(world, catcher.server.key, f"rest-{number}").wait()
        if not set(states_by_contact(world).values()) & {State.PENDING, State.CLAIMED, State.DEFERRED}:
            return
    raise AssertionError(f"not finished: {reason}, {world.states()}")


def attacked(engine: sa.Engine, home: Path, kind: str, attack: Attack) -> tuple[World, ServerInfo]:
    world = make_world(engine, home, kind=kind, recipients=attack.recipients, domains=attack.domains, linger_seconds=attack.linger_seconds)
    return world, world.server(connections=attack.connections, per_second=attack.per_second)


@pytest.mark.crosswise
def test_killed_senders_neither_lose_nor_repeat(engine: sa.Engine, tmp_path: Path, kind: str, running: Servers, on_senders: Attack) -> None:
    """SIGKILLs of send runs: unknown stays within the connections that were open at each kill."""
    world, server = attacked(engine, tmp_path / "home", kind, on_senders)
    catcher = running.start(world, server, write_play(tmp_path / "play.toml", reply_seconds=[0.05, 0.5], refuse_percent=3))
    draw = random.Random(1)
    unknown = 0
    for number in range(on_senders.kills):
        before = len(world.kept())
        run = SessionProcess(world, server.key, f"run-{number}")
        wait_for(lambda before=before: len(world.kept()) > before, seconds=90, what="sending")
        time.sleep(draw.uniform(0, 0.5))  # the kill is to fall at any moment, so there is no condition to wait for
        # While they are counted it opens no more.
        run.signal(signal.SIGSTOP)
        connections = min(catcher.connections(), on_senders.most_connections)
        run.kill()
        settle_all(world, catcher)
        now_unknown = world.states()[State.UNKNOWN]
        assert now_unknown - unknown <= connections, f"kill {number}: {now_unknown - unknown} unknown, {connections} connections"
        unknown = now_unknown
    finish(world, catcher)
    check_promise(world, on_senders.recipients)
    assert world.open_claims() == 0


@pytest.mark.crosswise
def test_killed_servers_neither_lose_nor_repeat(engine: sa.Engine, tmp_path: Path, kind: str, running: Servers, on_servers: Attack) -> None:
    """SIGKILLs of the mail server itself, with messages at their destinations."""
    world, server = attacked(engine, tmp_path / "home", kind, on_servers)
    catcher = running.start(world, server, write_play(tmp_path / "play.toml", reply_seconds=[0.05, 0.5]))
    draw = random.Random(3)
    unknown = 0
    for number in range(on_servers.kills):
        before = len(world.kept())
        run = SessionProcess(world, server.key, f"run-{number}")
        wait_for(lambda before=before: len(world.kept()) > before, seconds=90, what="sending")
        time.sleep(draw.uniform(0, 0.4))  # any moment
        connections = min(catcher.kill(), on_servers.most_connections)
        catcher.start()
        run.wait()
        settle_all(world, catcher)
        now_unknown = world.states()[State.UNKNOWN]
        assert now_unknown - unknown <= connections, f"kill {number}: {now_unknown - unknown} unknown, {connections} connections"
        unknown = now_unknown
        if not world.states()[State.PENDING]:
            break
    finish(world, catcher)
    check_promise(world, on_servers.recipients)
    assert unknown > 0, "no kill hit a message at its destination: the test is too weak"


@pytest.mark.crosswise
def test_kills_while_destinations_drop_and_fall_silent(engine: sa.Engine, tmp_path: Path, kind: str, running: Servers) -> None:
    """12 kills of either side with every kind of misbehaviour at once."""
    recipients, kills = 900, 12
    world = make_world(engine, tmp_path / "home", kind=kind, recipients=recipients)
    server = world.server(connections=6, per_second=120.0)
    play: dict[str, Any] = {"drop_percent": 3, "silent_percent": 2, "silent_seconds": 2, "refuse_percent": 3, "greylist_percent": 8, "greylist_seconds": 1}
    catcher = running.start(world, server, write_play(tmp_path / "play.toml", reply_seconds=[0.05, 0.4], **play))
    draw = random.Random(5)
    for number in range(kills):
        run = SessionProcess(world, server.key, f"run-{number}")
        time.sleep(draw.uniform(0.3, 1.5))  # any moment
        if draw.random() < 0.3:
            catcher.kill()
            catcher.start()
        run.kill()
    finish(world, catcher)
    states = check_promise(world, recipients)
    assert sum(state is State.DELIVERED for state in states.values()) > recipients * 0.75


@pytest.mark.crosswise
def test_a_zombie_sender_sends_nothing_after_its_lease(engine: sa.Engine, tmp_path: Path, kind: str, running: Servers) -> None:
    """Failure scenario 3: a sender stopped beyond its lease wakes up when others have sent its rows."""
    recipients = 400
    world = make_world(engine, tmp_path / "home", kind=kind, recipients=recipients, lease_seconds=16)
    # So slow that much is still to be sent when it is stopped.
    server = world.server(connections=6, per_second=10.0)
    catcher = running.start(world, server, write_play(tmp_path / "play.toml", reply_seconds=[0.05, 0.3]))
    zombie = SessionProcess(world, server.key, "zombie")
    wait_for(lambda: len(world.kept()) > 40, what="sending")
    zombie.stop_at_work()
    assert settle(world, catcher).claims == 0, "a claim within its lease was taken from a living holder"
    # The lease ends.
    settle_all(world, catcher)
    world.check_counters()
    # Settling has ended the stopped process; nobody is left to continue.
    zombie.process.join(60)
    with pytest.raises(ProcessLookupError):
        zombie.signal(signal.SIGCONT)
    world.limit(connections=6, per_second=60.0)
    finish(world, catcher)
    states = check_promise(world, recipients)
    assert sum(state is State.UNKNOWN for state in states.values()) <= 6
    assert zombie.process.exitcode == -signal.SIGKILL


def withdraw_permits_of(run: SessionProcess, catcher: Running) -> None:
    """While it is stopped; then wait for its end."""

    def withdrawn() -> int:
        run.signal(signal.SIGSTOP)
        # Between two claims it has none.
        if not (permits := permit.revoke_all(catcher.folders.permits)):
            run.signal(signal.SIGCONT)
        return permits

    wait_for(withdrawn, what="a permit")
    run.signal(signal.SIGCONT)
    run.process.join()
    if run.process.exitcode != 0:
        ended_by_the_settler(catcher)


@pytest.mark.crosswise
def test_a_withdrawn_permit_stops_a_sender_that_nobody_could_kill(engine: sa.Engine, tmp_path: Path, kind: str, running: Servers) -> None:
    """The fence alone: permits vanish while the sender sleeps; what it still offers is refused and goes out later, once."""
    recipients = 300
    world = make_world(engine, tmp_path / "home", kind=kind, recipients=recipients)
    # So slow that much is still to be sent by then.
    server = world.server(connections=6, per_second=8.0)
    catcher = running.start(world, server, write_play(tmp_path / "play.toml", reply_seconds=[0.05, 0.2]))
    run = SessionProcess(world, server.key, "sleeper")
    wait_for(lambda: len(world.kept()) > 40, what="sending")
    withdraw_permits_of(run, catcher)
    world.limit(connections=6, per_second=60.0)
    finish(world, catcher)
    check_promise(world, recipients)
    assert world.states() == {State.DELIVERED: recipients}


def test_a_sender_that_wakes_after_its_lease_offers_nothing_more_of_it(engine: sa.Engine, tmp_path: Path, kind: str, running: Servers) -> None:
    """Nobody has settled it yet: its own clock and the date in the permit's name stop it. It may go on with new claims. Unless the server's
    settler, which comes by every few seconds, is quicker and ends it.
    """
    recipients = 300
    world = make_world(engine, tmp_path / "home", kind=kind, recipients=recipients, lease_seconds=16)
    # So slow that much is still to be sent when it is stopped.
    server = world.server(connections=6, per_second=10.0)
    catcher = running.start(world, server, write_play(tmp_path / "play.toml", reply_seconds=[0.05, 0.2]))
    run = SessionProcess(world, server.key, "sleeper")
    wait_for(lambda: len(world.kept()) > 40, what="sending")
    run.stop_at_work()
    with reading(engine) as connection:
        lease = connection.execute(sa.select(sa.func.max(Claim.lease_until)).where(Claim.state == "open")).scalar_one()

    def over() -> bool:
        with reading(engine) as connection:
            return database_now(connection) > lease

    wait_for(over, seconds=60, what="the end of the lease")
    with contextlib.suppress(ProcessLookupError):
        run.signal(signal.SIGCONT)
    run.process.join(120)
    # It is killed as long as it holds the claim's permit.
    if run.process.exitcode not in (0, -signal.SIGKILL):
        ended_by_the_settler(catcher)
    finish(world, catcher)
    states = check_promise(world, recipients)
    assert sum(state is State.UNKNOWN for state in states.values()) <= 6


def test_two_runs_on_one_shard_and_one_of_them_killed(engine: sa.Engine, tmp_path: Path, kind: str, running: Servers) -> None:
    recipients = 900
    world = make_world(engine, tmp_path / "home", kind=kind, recipients=recipients)
    first, second = world.server("s1", connections=6), world.server("s2", connections=6)
    play = write_play(tmp_path / "play.toml", reply_seconds=[0.05, 0.3])
    near, far = running.start(world, first, play), running.start(world, second, play)
    one, two = SessionProcess(world, "s1", "one"), SessionProcess(world, "s2", "two")
    wait_for(lambda: len(world.kept()) > 100, what="sending")
    assert kill_both(one, near) > 0
    two.wait()
    # Only the owning server settles, which is away: the other one leaves the dead run's rows alone.
    assert world.open_claims() > 0
    assert settle(world, far).claims == 0
    near.start()
    finish(world, near)
    check_promise(world, recipients)


@pytest.mark.crosswise
def test_a_log_that_is_not_the_log_makes_rows_unknown_and_never_pending(engine: sa.Engine, tmp_path: Path, kind: str, running: Servers) -> None:
    """Failure scenario 2: the log disk was replaced, so silence of the new log proves nothing."""
    recipients = 300
    world = make_world(engine, tmp_path / "home", kind=kind, recipients=recipients)
    server = world.server(connections=4, per_second=80.0)
    catcher = running.start(world, server, write_play(tmp_path / "play.toml", reply_seconds=[0.1, 0.4]))
    run = SessionProcess(world, server.key, "run")
    wait_for(lambda: len(world.kept()) > 40, what="sending")
    assert kill_both(run, catcher) > 0
    claimed = world.states()[State.CLAIMED]
    journal = catcher.folders.journal
    journal.rename(journal.with_name("elsewhere"))
    catcher.start()
    settle_all(world, catcher)
    states = world.states()
    assert (states[State.CLAIMED], states[State.UNKNOWN]) == (0, claimed)
    finish(world, catcher)
    check_promise(world, recipients)


def test_a_claim_of_an_earlier_boot_is_never_sent_again(engine: sa.Engine, tmp_path: Path, kind: str, running: Servers) -> None:
    """A power loss may have taken the last lines of the log with it."""
    world = make_world(engine, tmp_path / "home", kind=kind, recipients=200)
    server = world.server(connections=4, per_second=80.0)
    catcher = running.start(world, server, write_play(tmp_path / "play.toml", reply_seconds=[0.1, 0.4]))
    run = SessionProcess(world, server.key, "run")
    wait_for(lambda: len(world.kept()) > 20, what="sending")
    kill_both(run, catcher)
    transact(engine, lambda connection: connection.execute(sa.update(Claim).where(Claim.state == "open").values(boot_id="another")))
    waiting = world.states()
    catcher.start()
    settle_all(world, catcher)
    states = world.states()
    assert states[State.PENDING] == waiting[State.PENDING]
    assert states[State.CLAIMED] == 0
    assert states[State.UNKNOWN] > 0
    check_promise_of_copies = world.copies()
    assert set(check_promise_of_copies.values()) == {1}


def test_a_second_start_of_a_server_is_refused(engine: sa.Engine, tmp_path: Path, kind: str, running: Servers) -> None:
    world = make_world(engine, tmp_path / "home", kind=kind, recipients=4)
    server = world.server()
    catcher = running.start(world, server, write_play(tmp_path / "play.toml"))
    with pytest.raises(AlreadyRunning, match="server s1 is already running"), only_one(catcher.folders.log / "lock", "server s1"):
        pass


def test_two_settlers_at_once_settle_a_claim_once(engine: sa.Engine, tmp_path: Path, kind: str, running: Servers) -> None:
    import threading

    recipients = 300
    world = make_world(engine, tmp_path / "home", kind=kind, recipients=recipients)
    server = world.server(connections=6, per_second=80.0)
    catcher = running.start(world, server, write_play(tmp_path / "play.toml", reply_seconds=[0.05, 0.3]))
    run = SessionProcess(world, server.key, "run")
    wait_for(lambda: len(world.kept()) > 40, what="sending")
    assert kill_both(run, catcher) > 0
    done: list[settlement.Settled] = []
    threads = [threading.Thread(target=lambda: done.append(settle(world, catcher))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert world.open_claims() == 0
    world.check_counters()
    catcher.start()
    finish(world, catcher)
    check_promise(world, recipients)
