"""A claim hands out a row once, only while everything allows it, and what it debits comes back if nothing was offered."""

from __future__ import annotations

import datetime as dt
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from mail_pipelines.campaigns import resending
from mail_pipelines.campaigns.states import CampaignState
from mail_pipelines.contacts import consent
from mail_pipelines.contacts.addresses import parse
from mail_pipelines.database.engine import is_mysql, reading, transact
from mail_pipelines.database.models import Claim, Contact, Delivery, DeliveryEvent, LedgerGeneration, State, Suppression
from mail_pipelines.delivery.events import mask_addresses
from mail_pipelines.delivery.recording import LedgerConflict, Result, record
from mail_pipelines.delivery.transitions import MOVES, may_move
from mail_pipelines.dispatch import registry, servers
from mail_pipelines.dispatch.claims import Memory, NothingClaimed, OpenClaim, WrongServer
from tests.dispatch.world import World, make_world


@pytest.fixture
def world(engine: sa.Engine, tmp_path: Path) -> World:
    return make_world(engine, tmp_path / "home", recipients=40)


@pytest.fixture
def server(world: World) -> servers.ServerInfo:
    server = world.server()
    world.grant(server)
    return server


def claim(world: World, server: servers.ServerInfo, **options: Any) -> Any:
    return world.claim(server, **options)


def finish(world: World, opened: OpenClaim, *results: Result) -> Counter[State]:
    return transact(world.engine, lambda connection: record(connection, opened.ref, results, claim_state="open"))


def test_rows_are_claimed_once_in_order_of_engagement(world: World, server: servers.ServerInfo) -> None:
    first = claim(world, server, limit=4)
    second = claim(world, server, limit=100)
    assert sorted(row.contact_id for row in first.rows) == [1, 5, 9, 13]
    taken = [row.contact_id for row in (*first.rows, *second.rows)]
    assert len(taken) == len(set(taken)) == 10
    assert claim(world, server) == NothingClaimed("nothing is due", only_here=True)
    world.check_counters()


def test_eight_claimers_at_once_share_the_rows_without_overlap(engine: sa.Engine, tmp_path: Path) -> None:
    world = make_world(engine, tmp_path / "home", recipients=800)
    fleet = [world.server(f"s{number}") for number in range(8)]
    for server in fleet:
        world.grant(server)
    taken: list[int] = []

    def work(server: servers.ServerInfo) -> None:
        while isinstance(opened := claim(world, server, limit=7), OpenClaim):
            taken.extend(row.contact_id for row in opened.rows)

    threads = [threading.Thread(target=work, args=(server,)) for server in fleet]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    # The last rows may have been skipped as locked by everybody at once; a further claim finds them.
    while isinstance(rest := claim(world, fleet[0], limit=100), OpenClaim):
        taken.extend(row.contact_id for row in rest.rows)
    assert sorted(taken) == [number for number in range(1, 801) if number % 4 == 1]
    world.check_counters()


def test_a_provider_without_rows_does_not_hide_the_rows_of_another(world: World, server: servers.ServerInfo) -> None:
    """Failure scenario 10: a claim for a provider without open rows must not lock those of others."""
    other = world.server("s2")
    world.grant(other)
    with world.engine.connect().execution_options(writing=world.engine.dialect.name != "sqlite") as connection:
        found = connection.execute(
            sa.select(Delivery.contact_id)
            .where(Delivery.campaign_id == 1, Delivery.shard == 0, Delivery.provider == "apple", Delivery.state == 0)
            .order_by(Delivery.sort_key)
            .with_for_update(skip_locked=True)
        ).all()
        assert found == []
        assert len(claim(world, other, provider="microsoft", limit=10).rows) == 10


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"state": "paused"}, "the campaign is paused"),
        ({"state": "cancelled"}, "the campaign is cancelled"),
        ({"state": "finished"}, "the campaign is finished"),
        ({"state": "draft"}, "the campaign is draft"),
        ({"expire_at": dt.datetime(2020, 1, 1, tzinfo=dt.UTC)}, "the campaign has expired"),
    ],
)
def test_nothing_is_claimed_unless_the_campaign_is_sending(world: World, server: servers.ServerInfo, change: dict[str, Any], reason: str) -> None:
    world.set_campaign(**change)
    answer = claim(world, server)
    assert (answer.reason, answer.ends_session) == (reason, True)
    assert world.states() == {State.PENDING: 40}


def test_suppressed_unsubscribed_and_erased_people_are_not_handed_out(world: World, server: servers.ServerInfo) -> None:
    now = dt.datetime.now(dt.UTC)

    def work(connection: sa.Connection) -> None:
        consent.suppress(connection, [parse("person1@google.test").hash], reason="complaint", now=now)
        consent.unsubscribe(connection, [5], scope="all", now=now)
        consent.erase(connection, 9, now=now)
        consent.suppress(connection, [parse("person13@google.test").hash], reason="manual", scope_kind="brand", scope_id=1, now=now)
        # Another brand's suppression does not count.
        consent.suppress(connection, [parse("person17@google.test").hash], reason="manual", scope_kind="brand", scope_id=2, now=now)

    transact(world.engine, work)
    opened = claim(world, server)
    assert sorted(row.contact_id for row in opened.rows) == [17, 21, 25, 29, 33, 37]
    assert world.states()[State.SUPPRESSED] == 4
    world.check_counters()


def test_a_suppressed_domain_is_not_handed_out(world: World, server: servers.ServerInfo) -> None:
    transact(world.engine, lambda connection: consent.suppress_domain(connection, "google.test", reason="manual", now=dt.datetime.now(dt.UTC)))
    assert claim(world, server).rows == ()
    assert world.states()[State.SUPPRESSED] == 10
    assert world.open_claims() == 0


def test_a_changed_address_goes_back_to_the_queue_of_its_new_provider(world: World, server: servers.ServerInfo) -> None:
    moved, taken = parse("new@yahoo.test"), parse("person3@yahoo.test")

    def work(connection: sa.Connection) -> None:
        connection.execute(
            sa.update(Contact)
            .where(Contact.id == 1)
            .values(email=moved.email, address=moved.address, address_hash=moved.hash, domain=moved.domain, provider="yahoo")
        )
        # Contact 3 gives its address away to contact 5, whose own row then would be a second copy.
        connection.execute(sa.delete(Contact).where(Contact.id == 2))
        connection.execute(sa.update(Contact).where(Contact.id == 5).values(address_hash=parse("person2@microsoft.test").hash, provider="microsoft"))

    transact(world.engine, work)
    opened = claim(world, server)
    assert sorted(row.contact_id for row in opened.rows) == [9, 13, 17, 21, 25, 29, 33, 37]
    yahoo = claim(world, server, provider="yahoo")
    assert 1 in [row.contact_id for row in yahoo.rows]
    assert next(row.email for row in yahoo.rows if row.contact_id == 1) == "new@yahoo.test"
    with reading(world.engine) as connection:
        assert connection.execute(sa.select(Delivery.state, Delivery.reason).where(Delivery.contact_id == 5)).one() == (
            int(State.SUPPRESSED),
            "duplicate_address",
        )
    assert taken.hash != moved.hash
    world.check_counters()


def test_many_changed_addresses_go_to_their_own_queues_by_one_statement(world: World, server: servers.ServerInfo) -> None:
    new = {1: parse("a@yahoo.test"), 5: parse("b@microsoft.test"), 9: parse("c@yahoo.test")}

    def work(connection: sa.Connection) -> None:
        for number, moved in new.items():
            values = {"email": moved.email, "address": moved.address, "address_hash": moved.hash, "domain": moved.domain}
            connection.execute(sa.update(Contact).where(Contact.id == number).values(values | {"provider": moved.domain.removesuffix(".test")}))

    transact(world.engine, work)
    updates: list[str] = []

    def note(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        if statement.startswith("UPDATE deliveries SET address_hash"):
            updates.append(statement)

    sa.event.listen(world.engine, "before_cursor_execute", note)
    assert sorted(row.contact_id for row in claim(world, server).rows) == [13, 17, 21, 25, 29, 33, 37]
    # On MariaDB it is in the procedure.
    assert len(updates) == (0 if is_mysql(world.engine) else 1)
    with reading(world.engine) as connection:
        rows = connection.execute(sa.select(Delivery.contact_id, Delivery.address_hash, Delivery.provider).where(Delivery.contact_id.in_(new))).all()
    assert {row.contact_id: (row.address_hash, row.provider) for row in rows} == {
        1: (new[1].hash, "yahoo"),
        5: (new[5].hash, "microsoft"),
        9: (new[9].hash, "yahoo"),
    }
    world.check_counters()


def test_grants_and_limits_bound_what_is_handed_out(world: World) -> None:
    server = world.server(per_hour=7)
    world.stop_the_clock()
    assert claim(world, server).reason.startswith("no grant before")
    world.grant(server, 5)
    assert len(claim(world, server).rows) == 5
    assert claim(world, server).reason.startswith("no grant before")
    assert len(claim(world, server, provider="yahoo").rows) == 5
    world.engine.dispose()
    transact(world.engine, lambda connection: connection.exec_driver_sql("UPDATE allotments SET granted = 100"))
    assert len(claim(world, server).rows) == 2
    assert claim(world, server).reason == "the limit of 7 in 3600 s is used up"
    assert world.usage(server, "google") == {900: 7, 3600: 7, 86400: 7}


def test_released_rows_give_their_debit_back_and_keep_their_place(world: World, server: servers.ServerInfo) -> None:
    world.stop_the_clock()
    opened = claim(world, server, limit=4)
    ids = [row.contact_id for row in opened.rows]
    finish(world, opened, Result(ids[0], 0, State.DELIVERED, 250), *(Result(contact, 0, State.PENDING) for contact in ids[1:]))
    assert world.usage(server, "google") == {900: 1, 3600: 1, 86400: 1}
    assert world.states() == {State.PENDING: 39, State.DELIVERED: 1}
    world.claim_from_the_first()
    again = claim(world, server, limit=3)
    assert sorted(row.contact_id for row in again.rows) == sorted(ids[1:])
    assert {row.attempt for row in again.rows} == {0}
    world.check_counters()


def test_a_deferral_comes_back_when_due_with_the_next_attempt(world: World, server: servers.ServerInfo) -> None:
    opened = claim(world, server, limit=1)
    contact = opened.rows[0].contact_id
    past = int(dt.datetime.now(dt.UTC).timestamp()) - 1
    finish(world, opened, Result(contact, 0, State.DEFERRED, 451, "4.7.1", "transient", due=past + 3600, text="451 for <someone@google.test>"))
    assert contact not in [row.contact_id for row in claim(world, server).rows]
    transact(world.engine, lambda connection: connection.execute(sa.update(Delivery).where(Delivery.contact_id == contact).values(sort_key=past)))
    again = claim(world, server)
    assert [(row.contact_id, row.attempt) for row in again.rows] == [(contact, 1)]
    # A release of an attempted row goes back as deferred and due: it is not a fresh row.
    finish(world, again, Result(contact, 1, State.PENDING))
    assert world.states()[State.DEFERRED] == 1
    with reading(world.engine) as connection:
        texts = connection.execute(sa.select(DeliveryEvent.text)).scalars().all()
    assert texts == ["451 for <***@google.test>"]
    world.check_counters()


def test_hard_bounces_suppress_the_address(world: World, server: servers.ServerInfo) -> None:
    opened = claim(world, server, limit=2)
    first, second = (row.contact_id for row in opened.rows)
    finish(
        world,
        opened,
        Result(first, 0, State.BOUNCED, 550, "5.1.1", "invalid_recipient", suppress=True),
        Result(second, 0, State.BOUNCED, 554, "5.7.1", "ip_blocked"),
    )
    with reading(world.engine) as connection:
        suppressed = connection.execute(sa.select(Suppression.address_hash, Suppression.reason)).all()
        assert suppressed == [(connection.execute(sa.select(Contact.address_hash).where(Contact.id == first)).scalar_one(), "bounce")]


def test_results_of_a_cancelled_campaign_send_nothing_back_to_the_queue(world: World, server: servers.ServerInfo) -> None:
    opened = claim(world, server, limit=3)
    world.set_campaign(state="cancelled")
    ids = [row.contact_id for row in opened.rows]
    finish(world, opened, Result(ids[0], 0, State.DELIVERED, 250), Result(ids[1], 0, State.PENDING), Result(ids[2], 0, State.DEFERRED, 451, due=1))
    assert world.states() == {State.PENDING: 37, State.DELIVERED: 1, State.CANCELLED: 2}
    world.check_counters()


def send_again(world: World, opened: OpenClaim) -> None:
    """The rows of a claim fall silent and are put in the queue a second time."""
    finish(world, opened, *(Result(row.contact_id, row.attempt, State.UNKNOWN) for row in opened.rows))
    resending.send_again(world.engine, world.campaign_id, dt.datetime.now(dt.UTC), (CampaignState.SENDING,))


@pytest.mark.parametrize("end", [State.PENDING, State.DEFERRED])
def test_a_second_copy_that_a_cancel_stopped_is_not_called_cancelled(world: World, server: servers.ServerInfo, end: State) -> None:
    """The first copy may have arrived, so nobody may later say that nothing was sent."""
    send_again(world, claim(world, server, limit=2))
    world.claim_from_the_first()
    again = claim(world, server, limit=5)
    world.set_campaign(state="cancelled")
    reply = {} if end is State.PENDING else {"code": 451, "due": 1}
    finish(world, again, *(Result(row.contact_id, row.attempt, end, **reply) for row in again.rows))
    assert world.states() == {State.PENDING: 35, State.UNRESOLVED: 2, State.CANCELLED: 3}
    world.check_counters()


def test_a_second_copy_that_must_not_go_out_is_not_called_suppressed(world: World, server: servers.ServerInfo) -> None:
    first = claim(world, server, limit=1)
    send_again(world, first)
    transact(world.engine, lambda connection: consent.suppress_domain(connection, "google.test", reason="manual", now=dt.datetime.now(dt.UTC)))
    assert claim(world, server).rows == ()
    assert world.states() == {State.PENDING: 30, State.UNRESOLVED: 1, State.SUPPRESSED: 9}
    world.check_counters()


def test_a_claim_is_recorded_once_or_not_at_all(world: World, server: servers.ServerInfo) -> None:
    opened = claim(world, server, limit=2)
    ids = [row.contact_id for row in opened.rows]
    results = [Result(contact, 0, State.DELIVERED, 250) for contact in ids]
    # One row was taken away: neither is recorded, and the claim stays open for whoever settles it.
    transact(world.engine, lambda connection: connection.execute(sa.update(Delivery).where(Delivery.contact_id == ids[0]).values(claim_id=None)))
    with pytest.raises(LedgerConflict, match="1 of 2 rows"):
        finish(world, opened, *results)
    assert world.states()[State.CLAIMED] == 2
    transact(world.engine, lambda connection: connection.execute(sa.update(Delivery).where(Delivery.contact_id == ids[0]).values(claim_id=opened.ref.id)))
    finish(world, opened, *results)
    with pytest.raises(LedgerConflict, match="no longer open"):
        finish(world, opened, *results)
    assert world.states()[State.DELIVERED] == 2
    world.check_counters()


def test_a_server_of_another_life_may_not_claim(world: World, server: servers.ServerInfo) -> None:
    (world.folders(server.key).log / "incarnation").write_text("00000000-0000-0000-0000-000000000000")
    with pytest.raises(WrongServer, match="another incarnation"):
        claim(world, server)


def test_a_paused_server_may_not_claim(world: World, server: servers.ServerInfo) -> None:
    transact(world.engine, lambda connection: registry.move(connection, server.key, "pause"))
    answer = claim(world, server)
    assert (answer.reason, answer.ends_session) == ("server s1 is paused", True)


def test_a_database_that_went_back_in_time_stops_its_servers(world: World, server: servers.ServerInfo) -> None:
    """Failure scenario 4: after a restore, rows already mailed look pending; the server remembers a claim the database does not."""
    memory = servers.recall(world.engine, world.folders(server.key))
    opened = claim(world, server, limit=2)
    newest = Memory(memory.generation, opened.ref.id)
    assert isinstance(claim(world, server, limit=2, memory=newest), OpenClaim)
    transact(world.engine, lambda connection: connection.execute(sa.delete(Claim).where(Claim.id == opened.ref.id)))
    with pytest.raises(WrongServer, match="went back in time"):
        claim(world, server, memory=newest)
    transact(world.engine, lambda connection: connection.execute(sa.update(LedgerGeneration).values(generation="another")))
    with pytest.raises(WrongServer, match="went back in time"):
        claim(world, server, memory=memory)


def test_final_states_have_no_way_out_but_for_a_bounce_that_turns_out_wrong() -> None:
    for source in State:
        for target in State:
            if source.is_final:
                assert may_move(source, target) == ((source, target) == (State.BOUNCED, State.DELIVERED))
    assert set(MOVES) == set(State)


def test_masked_texts_name_nobody() -> None:
    assert mask_addresses("550 <jo.doe@example.org>: no user jo.doe@example.org, sorry") == "550 <***@example.org>: no user ***@example.org, sorry"
