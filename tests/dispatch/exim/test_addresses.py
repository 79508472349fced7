"""Two servers of one host, each with a sending address of its own, through one Exim."""

from __future__ import annotations

import datetime as dt
import signal
import smtplib
from collections import Counter
from pathlib import Path

import pytest
import sqlalchemy as sa

from mail_pipelines.database.engine import reading
from mail_pipelines.database.models import Claim, Delivery, Server, State
from mail_pipelines.dispatch import audit, permit, servers
from mail_pipelines.dispatch.journal import Kind
from mail_pipelines.dispatch.session import journal_of
from tests.dispatch.sessions import SessionProcess
from tests.dispatch.test_crashes import check_promise
from tests.dispatch.world import Servers, World, make_world, write_play
from tests.parts.processes import wait_for

# What is of interest happens on the host, whatever the database is.
pytestmark = [pytest.mark.server, pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)]
FROM = {"s1": ("127.0.0.11", "s1.example.test"), "s2": ("127.0.0.12", "s2.example.test")}


def session(world: World, key: str, name: str = "run") -> SessionProcess:
    return SessionProcess(world, key, f"{name}-{key}", int(key[1]) - 1, MAIL_PIPELINES_SERVER=key)


def senders(world: World) -> dict[int, str]:
    """By contact the server that has last had it."""
    with reading(world.engine) as connection:
        query = sa.select(Delivery.contact_id, Server.key).join(Server, Server.id == Delivery.server_id)
        return {row.contact_id: row.key for row in connection.execute(query)}


def audited(world: World, key: str) -> audit.Audit:
    with reading(world.engine) as connection:
        info = servers.find(connection, key)
    # Later than the last line, which may be read then.
    return audit.run(world.engine, world.settings, info, journal_of(world.folders(key), "exim"), dt.datetime.now(dt.UTC) + dt.timedelta(minutes=1))


@pytest.mark.parametrize("kind", ["exim", "burst"])
def test_each_server_sends_from_its_own_address_by_its_own_name_and_limits(engine: sa.Engine, tmp_path: Path, kind: str, running: Servers) -> None:
    recipients, rates = 160, {"s1": 20.0, "s2": 10.0}
    world = make_world(engine, tmp_path / "home", recipients=recipients, shards=2, kind=kind, domains=("small.test",))
    limits = {key: {"connections": 4, "per_second": rate} for key, rate in rates.items()}
    exim, worlds = running.start_two(world, write_play(tmp_path / "play.toml"), **limits)
    # The slower one begins: the other one would have sent all before it comes, if it comes late.
    slower = session(world, "s2")
    wait_for(lambda: len(world.kept()) > 0, what="its first mail")
    for one in (session(world, "s1"), slower):
        one.wait()
    assert world.states() == {State.DELIVERED: recipients}
    assert world.copies() == dict.fromkeys(range(1, recipients + 1), 1)
    world.check_counters()

    of = senders(world)
    at: dict[str, list[float]] = {key: [] for key in FROM}
    ring = world.ring()
    for message in world.kept():
        token, signer = ring.read_delivery(message.token)
        key = of[token.contact_id]
        assert signer == worlds[key].server(key).id
        at[key].append(message.at)
        assert (message.peer, message.permit) == FROM[key]
        assert message.sender == f"b+{message.token}@bounces.example.test"
        assert f"Received: from localhost by {FROM[key][1]} with esmtp id".encode() in message.data()
        assert f"Message-ID: <{message.token}@".encode().lower() in message.data().lower()
    # What has been put off for a moment may catch up; more than both together would make of each never.
    for key, rate in rates.items():
        times = sorted(at[key])
        assert len(times) > 1
        assert len(times) - 1 <= (times[-1] - times[0] + 0.5) * rate * 1.1

    # One log, of which each server's audit counts its own lines.
    assert worlds["s1"].folders("s1").journal == worlds["s2"].folders("s2").journal == exim.folders.journal
    for key, one in worlds.items():
        found = audited(one, key)
        assert (found.outcomes[Kind.DELIVERED], found.alarms, found.bad_lines, found.unknown_forms) == (len(at[key]), 0, 0, 0)
        assert not found.disagreeing


def test_what_is_killed_of_one_server_is_settled_without_touching_the_other(engine: sa.Engine, tmp_path: Path, running: Servers) -> None:
    recipients = 400
    world = make_world(engine, tmp_path / "home", recipients=recipients, shards=2, kind="exim")
    # One server alone would be at it for longer than the settlement of the other takes.
    limits = {key: {"connections": 4, "per_second": 5.0} for key in FROM}
    exim, worlds = running.start_two(world, write_play(tmp_path / "play.toml", reply_seconds=[0.1, 0.5]), **limits)
    first, second = (session(world, key) for key in FROM)
    wait_for(lambda: set(Counter(message.peer for message in world.kept())) == {address for address, _ in FROM.values()}, what="both servers' mail")
    second.signal(signal.SIGKILL)
    # By the process that runs Exim, with nobody else's help.
    under_way: list[set[int]] = []

    def settled() -> bool:
        under_way.append(set(open_claims(world, "s1")))
        return not open_claims(world, "s2")

    wait_for(settled, what="the settlement of what was killed")
    assert first.process.is_alive()
    # What was not offered is pending again, whatever the other server has delivered meanwhile under a key of its own.
    assert len(unknown(world)) <= limits["s2"]["connections"]
    assert {key for contact, key in senders(world).items() if contact in unknown(world)} <= {"s2"}
    # Not those of the last look: a claim has its permit a moment after it is in the ledger.
    before = set().union(*under_way[:-1])

    def keep_permits() -> bool:
        """A claim whose session is about to record it has none any more, and soon is not open either."""
        permits = {path.name.partition(".")[0] for path in worlds["s1"].folders("s1").permits.glob("c*")}
        return permits >= {f"c{claim}" for claim in before.intersection(open_claims(world, "s1"))}

    wait_for(keep_permits, what="permits of the first server's claims, or their end")
    assert first.process.is_alive()

    # Now all of it at once, in the middle of the first server's mail.
    wait_for(lambda: bool(open_claims(world, "s1")), what="the first server's mail")
    exim.kill()
    first.kill()
    exim.start()
    for key in FROM:
        servers.set_limits(engine, key, "*", {"connections": 8, "per_second": 200.0})
    finish(world)
    states = check_promise(world, recipients)
    assert set(states.values()) <= {State.DELIVERED, State.UNKNOWN}
    assert not open_claims(world, "s1") + open_claims(world, "s2")
    assert {(message.peer, message.permit) for message in world.kept()} == set(FROM.values())


def test_a_server_is_not_served_at_the_port_of_another(engine: sa.Engine, tmp_path: Path, running: Servers) -> None:
    """Its permits are not there, so that none of its mail can go out by the other's address."""
    world = make_world(engine, tmp_path / "home", recipients=1, kind="exim")
    _, worlds = running.start_two(world, write_play(tmp_path / "play.toml"))
    granted = permit.grant(worlds["s2"].folders("s2").permits, 7, seconds=600)
    replies = {}
    for key in FROM:
        with reading(engine) as connection, smtplib.SMTP("127.0.0.1", servers.find(connection, key).port, timeout=120) as client:
            client.ehlo(granted.name)
            client.mail(f"b+{'a' * 48}@bounces.example.test")
            replies[key] = client.rcpt("person1@google.test")
    granted.release()
    assert replies["s1"] == (451, f"4.7.0 no permit {granted.name}".encode())
    assert replies["s2"][0] == 250


def open_claims(world: World, key: str) -> list[int]:
    with reading(world.engine) as connection:
        query = sa.select(Claim.id).join(Server, Server.id == Claim.server_id).where(Server.key == key, Claim.state != "closed")
        return list(connection.execute(query).scalars())


def unknown(world: World) -> set[int]:
    with reading(world.engine) as connection:
        return set(connection.execute(sa.select(Delivery.contact_id).where(Delivery.state == int(State.UNKNOWN))).scalars())


def finish(world: World) -> None:
    """Let undisturbed sessions of both servers do the rest."""
    for number in range(10):
        for one in [session(world, key, f"rest-{number}") for key in FROM]:
            one.wait()
        if not set(world.states()) & {State.PENDING, State.CLAIMED, State.DEFERRED}:
            return
    raise AssertionError(world.states())
