"""A greylisted row is offered again by the server that was greylisted: in claims, in what is due, in the runs that are asked for, at the far end."""

from __future__ import annotations

import datetime as dt
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import pytest
import sqlalchemy as sa

from mail_pipelines.database.engine import database_now, reading, transact
from mail_pipelines.database.models import SENDING_STATES, Allotment, Claim, Contact, Delivery, Server, State
from mail_pipelines.delivery import resolving
from mail_pipelines.delivery.recording import Result, record
from mail_pipelines.dispatch import due, openings, servers
from mail_pipelines.dispatch.catcher import log
from mail_pipelines.dispatch.claims import NothingClaimed, OpenClaim
from mail_pipelines.dispatch.greylisting import REASON, WAIT_SECONDS
from mail_pipelines.dispatch.journal import Kind
from mail_pipelines.dispatch.openings import Opening
from mail_pipelines.dispatch.registry import ServerState
from mail_pipelines.messages.tokens import read_delivery
from tests.dispatch.test_session import session
from tests.dispatch.world import Servers, World, make_world, write_play

PLACE = (0, "google")
Two = tuple[servers.ServerInfo, servers.ServerInfo]
NOTHING = NothingClaimed("nothing is due", only_here=True)


@pytest.fixture
def world(engine: sa.Engine, tmp_path: Path) -> World:
    """Five rows, all of them to google."""
    return make_world(engine, tmp_path / "home", recipients=5, domains=("google.test",))


@pytest.fixture
def two(world: World) -> Two:
    """Two servers with grants that have just beaten."""
    found = world.server("s1"), world.server("s2")
    for server in found:
        world.grant(server)
    transact(world.engine, lambda connection: connection.execute(sa.update(Server).values(heartbeat_at=dt.datetime.now(dt.UTC))))
    return found


def taken(claim: OpenClaim | NothingClaimed) -> int:
    return len(claim.rows) if isinstance(claim, OpenClaim) else 0


def end(world: World, claim: OpenClaim | NothingClaimed, state: State, reason: str = "", *, settling: bool = False, contacts: range = range(1, 100)) -> None:
    """Record a claim: these contacts end so, the others delivered. `settling`: as a settler does for a sender that is gone."""
    assert isinstance(claim, OpenClaim)
    with reading(world.engine) as connection:
        second = int(database_now(connection).timestamp())
    results = [
        # A greylisting is no attempt (`settlement.result_of`).
        Result(
            row.contact_id,
            row.attempt,
            state,
            451 if reason else None,
            None,
            reason,
            due=second if state is State.DEFERRED else None,
            asked=reason != REASON,
        )
        if row.contact_id in contacts
        else Result(row.contact_id, row.attempt, State.DELIVERED, 250)
        for row in claim.rows
    ]

    def work(connection: sa.Connection) -> None:
        if settling:
            connection.execute(sa.update(Claim).where(Claim.id == claim.ref.id).values(state="settling"))
        record(connection, claim.ref, results, claim_state="settling" if settling else "open")

    transact(world.engine, work)


def by_its_sender(world: World, server: servers.ServerInfo) -> None:
    end(world, world.claim(server), State.DEFERRED, REASON)


def by_a_settler(world: World, server: servers.ServerInfo) -> None:
    end(world, world.claim(server), State.DEFERRED, REASON, settling=True)


def by_an_audit(world: World, server: servers.ServerInfo) -> None:
    end(world, world.claim(server), State.UNKNOWN, "no_outcome")
    now = dt.datetime.now(dt.UTC)
    results = [Result(contact, 0, State.DEFERRED, 451, None, REASON, due=int(now.timestamp())) for contact in range(1, 6)]
    transact(world.engine, lambda connection: resolving.resolve(connection, world.campaign_id, server.id, results, resolving.Source("journal"), now))


def fell_due(world: World, seconds_ago: int, *, contacts: range = range(1, 100)) -> None:
    """Move the moment in which rows fell due."""
    moment = int(time.time()) - seconds_ago
    changed = sa.update(Delivery).where(Delivery.state == int(State.DEFERRED), Delivery.contact_id.in_(contacts)).values(sort_key=moment)
    transact(world.engine, lambda connection: connection.execute(changed))


def due_for(world: World, server: servers.ServerInfo | None = None) -> float | None:
    with reading(world.engine) as connection:
        return due.due_times(connection, world.campaign_id, 0, server_id=server.id if server else None).get(PLACE)


def senders(world: World) -> dict[tuple[int, str], set[int] | None]:
    with reading(world.engine) as connection:
        return due.senders(connection, world.campaign_id, time.time())


def runs(world: World) -> list[Opening]:
    with reading(world.engine) as connection:
        return openings.find(connection, dt.datetime.now(dt.UTC), slots=2, heartbeat_seconds=60, in_flight=())


# --- claims -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("deferred", [by_its_sender, by_a_settler, by_an_audit])
def test_greylisted_rows_are_claimed_by_the_server_that_was_greylisted(world: World, two: Two, deferred: Callable[[World, servers.ServerInfo], None]) -> None:
    one, other = two
    deferred(world, one)
    assert world.claim(other) == NOTHING
    assert taken(world.claim(one)) == 5
    world.check_counters()


def test_four_hours_after_they_fell_due_any_server_claims_them(world: World, two: Two) -> None:
    one, other = two
    by_its_sender(world, one)
    fell_due(world, WAIT_SECONDS - 60)
    assert world.claim(other) == NOTHING
    fell_due(world, WAIT_SECONDS + 1, contacts=range(1, 4))
    assert taken(world.claim(other)) == 3
    assert taken(world.claim(one)) == 2


@pytest.mark.parametrize("state", [state for state in ServerState if state not in SENDING_STATES])
def test_rows_of_a_server_that_may_not_send_wait_for_nobody(world: World, two: Two, state: str) -> None:
    one, other = two
    by_its_sender(world, one)
    transact(world.engine, lambda connection: connection.execute(sa.update(Server).where(Server.id == one.id).values(state=state)))
    assert due_for(world, other) == due_for(world)
    assert senders(world) == {PLACE: None}
    assert taken(world.claim(other)) == 5


def test_rows_of_a_server_that_was_removed_wait_for_nobody(world: World, two: Two) -> None:
    one, other = two
    by_its_sender(world, one)
    transact(world.engine, lambda connection: connection.execute(sa.delete(Server).where(Server.id == one.id)))
    assert taken(world.claim(other)) == 5


def test_other_deferrals_come_from_any_server(world: World, two: Two) -> None:
    one, other = two
    end(world, world.claim(one), State.DEFERRED, "transient")
    assert taken(world.claim(other)) == 5


@pytest.mark.parametrize("settling", [False, True])
def test_a_row_that_is_given_back_unoffered_stays_with_its_server(world: World, two: Two, settling: bool) -> None:
    one, other = two
    world.stop_the_clock()
    end(world, world.claim(one, limit=3), State.DEFERRED, REASON)
    end(world, world.claim(one, limit=4), State.PENDING, settling=settling)
    # That it had never been offered, it may be by anybody.
    assert world.states() == {State.DEFERRED: 3, State.PENDING: 2}
    world.check_counters()
    assert world.usage(one, "google") == dict.fromkeys((900, 3600, 86400), 3)
    assert senders(world) == {PLACE: None}
    assert taken(world.claim(other)) == 2
    assert senders(world) == {PLACE: {one.id}}
    assert taken(world.claim(one)) == 3
    world.check_counters()


def test_rows_that_wait_for_another_server_hold_nobody_up(world: World, two: Two) -> None:
    """They were due first, and one more than fits into a claim."""
    one, other = two
    by_its_sender(world, one)
    fell_due(world, 60, contacts=range(1, 4))
    transact(world.engine, lambda connection: connection.execute(sa.update(Delivery).where(Delivery.contact_id > 3).values(reason="transient")))
    claim = world.claim(other, limit=2)
    assert isinstance(claim, OpenClaim)
    assert sorted(row.contact_id for row in claim.rows) == [4, 5]
    assert taken(world.claim(one)) == 3


def test_under_a_new_address_nobody_was_greylisted(world: World, two: Two) -> None:
    one, other = two
    by_its_sender(world, one)
    moved = {"email": "new@yahoo.test", "address": "new@yahoo.test", "address_hash": b"n" * 16, "domain": "yahoo.test", "provider": "yahoo"}
    transact(world.engine, lambda connection: connection.execute(sa.update(Contact).where(Contact.id == 1).values(moved)))
    assert taken(world.claim(one)) == 4
    grant = {"campaign_id": world.campaign_id, "provider": "yahoo", "granted": 9, "used": 0}
    slot = int(time.time()) // 900 * 900
    rows = [grant | {"server_id": other.id, "slot_start": start} for start in (slot, slot + 900)]
    transact(world.engine, lambda connection: connection.execute(sa.insert(Allotment), rows))
    assert taken(world.claim(other, provider="yahoo")) == 1


# --- what is due, and for whom ------------------------------------------------------------------------------------


def test_a_row_that_waits_for_another_server_is_not_due_for_this_one(world: World, two: Two) -> None:
    one, other = two
    by_its_sender(world, one)
    fell_due(world, 100)
    moment = due_for(world)
    assert moment is not None
    assert time.time() - 110 < moment < time.time() - 90
    assert due_for(world, one) == moment
    assert due_for(world, other) == moment + WAIT_SECONDS
    assert senders(world) == {PLACE: {one.id}}
    with reading(world.engine) as connection:
        assert due.next_due(connection, world.campaign_id, 0) == moment
    # A later row that waits for nobody comes before that.
    transact(
        world.engine,
        lambda connection: connection.execute(sa.update(Delivery).where(Delivery.contact_id == 5).values(reason="transient", sort_key=int(moment) + 50)),
    )
    assert due_for(world, other) == moment + 50
    assert senders(world) == {PLACE: None}
    fell_due(world, WAIT_SECONDS + 1)
    assert due_for(world, other) == due_for(world)


def test_each_server_has_its_own_rows(world: World, two: Two) -> None:
    one, other = two
    end(world, world.claim(one, limit=2), State.DEFERRED, REASON)
    end(world, world.claim(other), State.DEFERRED, REASON)
    assert senders(world) == {PLACE: {one.id, other.id}}
    assert (taken(world.claim(one)), taken(world.claim(other))) == (2, 3)
    assert senders(world) == {}


def test_pending_rows_are_due_for_every_server(world: World, two: Two) -> None:
    one, other = two
    end(world, world.claim(one, limit=2), State.DEFERRED, REASON)
    assert (due_for(world, one), due_for(world, other)) == (0, 0)
    assert senders(world) == {PLACE: None}


def test_runs_are_asked_for_on_the_server_for_which_rows_wait(world: World, two: Two) -> None:
    one, other = two
    for mine in (other, one):
        by_its_sender(world, mine)
        assert runs(world) == [Opening("spring", 0, mine.key)]
        transact(world.engine, lambda connection: connection.execute(sa.update(Delivery).values(state=int(State.DEFERRED), reason=None)))
    by_its_sender(world, one)
    # Without a grant of its own there is nothing to start, and no other server would find anything.
    transact(world.engine, lambda connection: connection.execute(sa.update(Allotment).where(Allotment.server_id == one.id).values(granted=0)))
    assert runs(world) == []
    fell_due(world, WAIT_SECONDS + 1)
    assert runs(world) == [Opening("spring", 0, other.key)]
    fell_due(world, -60)
    assert runs(world) == []


# --- sessions -----------------------------------------------------------------------------------------------------


@pytest.mark.server
def test_a_session_ends_at_once_if_all_rows_wait_for_another_server(world: World, two: Two) -> None:
    one, other = two
    by_its_sender(world, one)
    begin = time.monotonic()
    report = session(world, other).run()
    assert (report.reason, report.claims, report.open_rows) == ("nothing falls due soon", 0, 5)
    assert time.monotonic() - begin < world.settings.sending.linger_seconds


@pytest.mark.server
def test_whoever_greylists_hears_again_from_the_same_server(engine: sa.Engine, tmp_path: Path, kind: str, running: Servers) -> None:
    """Two servers, each with destinations of its own, which so know a recipient by the server it comes from; counted there."""
    world = make_world(engine, tmp_path / "home", recipients=120, kind=kind, domains=("google.test", "small.test"), first_retry_seconds=2)
    play = write_play(tmp_path / "play.toml", greylist_percent=100, greylist_seconds=1)
    # Neither has offered all before the other has begun.
    both = [world.server(key, connections=2, per_second=10.0) for key in ("s1", "s2")]
    for server in both:
        running.start(world, server, play)
    threads = [threading.Thread(target=session(world, server, f"run-{server.key}").run) for server in both]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    # One of them may have ended while its last rows were not due yet.
    for server in both:
        session(world, server, f"last-{server.key}").run()
    assert world.states() == {State.DELIVERED: 120}
    heard: defaultdict[int, list[tuple[str, Kind]]] = defaultdict(list)
    for server in both:
        far = world.folders(server.key if kind == "catcher" else f"far-{server.key}")
        for line in far.journal.read_bytes().splitlines():
            entry = log.parse(line)
            if entry is not None and entry.token is not None and entry.outcome is not None:
                heard[read_delivery(entry.token, world.settings.token_key()).contact_id].append((server.key, entry.outcome.kind))
    offers = [tuple(offered) for offered in heard.values()]
    assert set(offers) == {((key, Kind.DEFERRED), (key, Kind.DELIVERED)) for key in ("s1", "s2")}
    assert len(offers) == 120
    with reading(engine) as connection:
        attempts = connection.execute(sa.select(Delivery.attempt).distinct()).scalars().all()
    assert attempts == [0]
