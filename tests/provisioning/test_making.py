"""A server is made, and given back, step by step: on hosts that a real command makes, and that are really entered by SSH."""

from __future__ import annotations

import datetime as dt
import os
import signal
import threading
from dataclasses import replace

import pytest
import sqlalchemy as sa

from mail_pipelines.database import models
from mail_pipelines.database.engine import reading, transact
from mail_pipelines.dispatch import registry, servers
from mail_pipelines.domains import store as domains
from mail_pipelines.domains.domain import Names
from mail_pipelines.provisioning import making, steps, store
from mail_pipelines.provisioning.finding import Finding
from mail_pipelines.provisioning.interfaces import ProvisioningError
from mail_pipelines.provisioning.sources.inventory import Inventory
from mail_pipelines.provisioning.states import FAILS, IN_SERVICE, MAKING, PATH, RETIRES, At, State, Step
from tests.parts.kills import COMMITS, killed_at
from tests.provisioning.world import World

SQLITE = pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
# Of the first server.
NAMES = ("mx1.example.com. 3600 IN A 127.0.0.1", "1.0.0.127.in-addr.arpa. 3600 IN PTR mx1.example.com.")


def test_the_table_leads_from_every_place_to_an_end() -> None:
    for start in (At(State.REQUESTED, Step.RESERVE), FAILS, RETIRES):
        at, seen = start, set()
        while at.step is not Step.NONE:
            assert at not in seen
            seen.add(at)
            at = PATH[at]
        assert at.state in (State.ACTIVE, State.RETIRED, State.FAILED)
    # Each step can be done, and each state but the ends has some.
    assert {at.step for at in PATH} == set(making.DO)
    assert {at.state for at in PATH} == set(State) - IN_SERVICE - {State.RETIRED}
    assert {at.state for at in PATH if at.state in MAKING} == MAKING


def test_a_server_is_made_serves_and_is_given_back(world: World) -> None:
    key = world.request()
    made = world.advance(key)
    assert (key, made.state, made.step) == ("mx1", State.ACTIVE, Step.NONE)
    assert world.server_state("mx1") == "active"
    north, south = world.hosters
    assert (north.created, north.hosts, south.created) == (["mx1"], ["mx1"], [])
    assert world.zone.lines == set(NAMES)
    assert made.ordered_at is not None
    assert made.created_at is not None
    assert made.ordered_at <= made.created_at

    transact(world.engine, lambda connection: store.give_back(connection, key, "not wanted"))
    gone = world.advance(key)
    assert (gone.state, gone.step) == (State.RETIRED, Step.NONE)
    world.nothing_is_left(key)


@SQLITE
def test_names_go_on_after_those_there_are(world: World) -> None:
    servers.register(world.engine, "mx7", kind="exim", host="127.0.0.1", port=2525, now=dt.datetime.now(dt.UTC))
    assert [world.request(), world.request()] == ["mx8", "mx9"]


@SQLITE
def test_a_server_that_somebody_has_registered_by_that_name_is_left_alone(world: World) -> None:
    key = world.request()
    servers.register(world.engine, key, kind="exim", host="127.0.0.1", port=25, now=dt.datetime.now(dt.UTC))
    ended = world.advance(key)
    assert ended.reason == "equip: somebody else has registered a server mx1"
    assert world.server_state(key) == "active"
    assert world.hosters[0].hosts == []
    with reading(world.engine) as connection:
        assert servers.find(connection, key).port == 25


# --- killed -----------------------------------------------------------------------------------------------------


@SQLITE
@pytest.mark.timeout(900)
def test_killed_at_any_step_and_started_again_it_finishes_the_same_host(world: World, database_url: str) -> None:
    """Before each commit of the way: what a step does outside the database is done by then, and not recorded."""
    world.set(at_once=1000, most=1000)
    world.zone.quick = True
    north, _ = world.hosters
    step, killed = 0, True
    while killed:
        step += 1
        key = world.request()

        def work(engine: sa.Engine, _one_more: object, key: str = key) -> None:
            making.advance(replace(world.parts, engine=engine), key, lambda _: None)

        killed = killed_at(step, database_url, work, COMMITS)
        assert killed or world.provision(key).state is State.ACTIVE
        assert world.to_the_end(key).state is State.ACTIVE, key
        assert north.created.count(key) == 1, (step, key)
        # Given back at once: the machine need not run all of them.
        transact(world.engine, lambda connection, key=key: store.give_back(connection, key, "next"))  # type: ignore[misc]
        world.to_the_end(key)
    assert north.hosts == []
    # Each of seven steps is recorded before and after it.
    assert step > 14


@SQLITE
@pytest.mark.timeout(900)
def test_killed_at_any_step_of_its_removal_nothing_is_left(world: World, database_url: str) -> None:
    step, killed = 0, True
    while killed:
        step += 1
        key = world.request()
        world.to_the_end(key)
        transact(world.engine, lambda connection, key=key: store.give_back(connection, key, "not wanted"))  # type: ignore[misc]

        def work(engine: sa.Engine, _one_more: object, key: str = key) -> None:
            making.advance(replace(world.parts, engine=engine), key, lambda _: None)

        killed = killed_at(step, database_url, work, COMMITS)
        assert world.to_the_end(key).state is State.RETIRED
        world.nothing_is_left(key)
    assert step > 10


@SQLITE
def test_a_command_whose_caller_was_killed_is_waited_for_and_its_host_taken(world: World, database_url: str) -> None:
    """The orphan cannot be found at the hoster yet when the next run looks: without its lock there would be two hosts."""
    north, _ = world.hosters
    key = world.request()
    (north.folder / "slow").touch()
    world.killed_at(key, database_url, north.folder / "asked", "the command to have begun")
    assert world.provision(key).at == At(State.PROVISIONING, Step.CREATE)
    ended: list[State] = []
    again = threading.Thread(target=lambda: ended.append(world.advance(key).state))
    again.start()
    # It stands before the lock, and has asked for nothing.
    again.join(0.5)
    assert again.is_alive()
    assert north.created == []
    (north.folder / "slow").unlink()
    again.join(120)
    assert ended == [State.ACTIVE]
    assert north.created == [key]


# --- failures ---------------------------------------------------------------------------------------------------


@SQLITE
@pytest.mark.parametrize("bad", [step for (state, step) in PATH if state in MAKING and step is not Step.RESERVE])
def test_a_step_that_fails_is_tried_again_and_then_rolled_back(world: World, bad: Step, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever there is of the server is removed, and its reason kept; a source that is not to blame goes on being used."""
    real, tried = making.DO[bad], []

    def fails(parts, provision, say):  # type: ignore[no-untyped-def]
        tried.append(provision.attempt)
        # After all of its work, as late as it can fail.
        real(parts, provision, say)
        raise ProvisioningError("the disk is full")

    monkeypatch.setitem(making.DO, bad, fails)
    key = world.request()
    ended = world.to_the_end(key)
    assert tried == [0, 1]
    assert (ended.state, ended.step, ended.reason) == (State.FAILED, Step.NONE, f"{bad}: the disk is full")
    world.nothing_is_left(key)
    with reading(world.engine) as connection:
        # Only of a host that cannot be made the source is to blame.
        assert set(store.set_aside(connection)) == ({"north"} if bad is Step.CREATE else set())


@SQLITE
@pytest.mark.parametrize("bad", [step for (state, step) in PATH if state is State.FAILED])
def test_a_step_of_the_removal_that_fails_is_tried_until_nothing_costs_any_more(world: World, bad: Step, monkeypatch: pytest.MonkeyPatch) -> None:
    key = world.request()
    monkeypatch.setattr(world.verifier, "findings", [Finding("heartbeat", False, "Exim does not start")])
    real, tried = making.DO[bad], []

    def fails(parts, provision, say):  # type: ignore[no-untyped-def]
        tried.append(provision.attempt)
        if len(tried) < 6:
            raise ProvisioningError("the hoster does not answer")
        return real(parts, provision, say)

    monkeypatch.setitem(making.DO, bad, fails)
    ended = world.to_the_end(key)
    assert tried == [0, 1, 2, 3, 4, 5]
    # Why it was given up stays.
    assert (ended.state, ended.step, ended.reason) == (State.FAILED, Step.NONE, "verify: heartbeat: Exim does not start")
    world.nothing_is_left(key)


@SQLITE
@pytest.mark.parametrize("then", [None, ProvisioningError("the disk is full"), steps.Waits("for the DNS")], ids=["done", "failed", "waits"])
def test_a_server_that_was_given_up_while_it_is_being_made_goes(world: World, then: Exception | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the step comes to, at which it was."""
    key, real = world.request(), making.DO[Step.PLAY]

    def play(parts, provision, say):  # type: ignore[no-untyped-def]
        transact(world.engine, lambda connection: store.give_back(connection, key, "given up by hand"))
        if then is not None:
            raise then
        return real(parts, provision, say)

    monkeypatch.setitem(making.DO, Step.PLAY, play)
    ended = world.advance(key)
    assert (ended.state, ended.step, ended.reason) == (State.FAILED, Step.NONE, "given up by hand")
    world.nothing_is_left(key)


@SQLITE
def test_a_host_that_does_not_answer_is_given_back(world: World) -> None:
    north, _ = world.hosters
    world.set(boot_seconds=0.2)
    key = world.request()
    real = making.DO[Step.EQUIP]

    def equip(parts, provision, say):  # type: ignore[no-untyped-def]
        os.kill(int((north.folder / "hosts" / key / "pid").read_text()), signal.SIGKILL)
        return real(parts, provision, say)

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(making.DO, Step.EQUIP, equip)
        ended = world.to_the_end(key)
    assert ended.state is State.FAILED
    assert "does not answer by SSH" in (ended.reason or "")
    world.nothing_is_left(key)


# --- sources ----------------------------------------------------------------------------------------------------


@SQLITE
def test_a_source_that_has_no_host_is_set_aside_and_the_next_is_used(world: World) -> None:
    north, south = world.hosters
    north.trouble('{"create": [3, "quota exceeded"]}')
    first = world.advance(world.request("many mails"))
    assert first.state is State.FAILED
    assert first.reason is not None
    assert "quota exceeded" in first.reason
    # Another one was asked for in its place, and comes from the other source.
    assert (world.provision("mx2").state, world.provision("mx2").why) == (State.REQUESTED, "many mails")
    assert world.advance("mx2").state is State.ACTIVE
    assert (north.created, south.created) == ([], ["mx2"])
    with reading(world.engine) as connection:
        assert "quota exceeded" in store.set_aside(connection)["north"]
    # Until somebody says otherwise.
    transact(world.engine, lambda connection: store.use_again(connection, "north"))
    north.no_trouble()
    assert world.advance(world.request()).source == "north"


@SQLITE
def test_a_source_whose_hosts_cannot_send_is_set_aside(world: World) -> None:
    north, south = world.hosters
    world.verifier.findings = [Finding("port 25", False, "nobody answers")]
    assert world.advance(world.request()).reason == "verify: port 25: nobody answers"
    world.nothing_is_left("mx1")
    world.verifier.findings = []
    assert world.advance("mx2").state is State.ACTIVE
    assert (north.hosts, south.hosts) == ([], ["mx2"])


@SQLITE
def test_a_listed_address_is_its_hosts_and_two_in_a_day_are_the_sources(world: World) -> None:
    world.verifier.findings = [Finding("block lists", False, "192.0.2.9 is listed by bl.test")]

    def aside() -> list[str]:
        with reading(world.engine) as connection:
            return list(store.set_aside(connection))

    assert world.advance(world.request()).reason == "verify: block lists: 192.0.2.9 is listed by bl.test"
    world.nothing_is_left("mx1")
    assert aside() == []
    # Another one of the same source is asked for, whose address is another.
    assert world.advance("mx2").source == "north"
    assert aside() == ["north"]
    world.verifier.findings = []
    found = world.advance("mx3")
    assert (found.state, found.source) == (State.ACTIVE, "south")
    assert set(world.all()) == {"mx1", "mx2", "mx3"}


@SQLITE
def test_a_source_that_switches_hosts_off_is_set_aside(world: World) -> None:
    north, _ = world.hosters
    world.set(boot_seconds=0.1, attempts=1)
    real = making.DO[Step.EQUIP]

    def equip(parts, provision, say):  # type: ignore[no-untyped-def]
        north.shut()
        return real(parts, provision, say)

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(making.DO, Step.EQUIP, equip)
        world.advance(world.request())
    with reading(world.engine) as connection:
        assert list(store.set_aside(connection)) == ["north"]
    assert world.provision("mx2").state is State.REQUESTED


@SQLITE
def test_when_all_sources_are_out_of_hosts_the_server_fails_with_each_reason(world: World) -> None:
    for one in world.hosters:
        one.trouble('{"create": [3, "no more"]}')
    assert world.advance(world.request()).state is State.FAILED
    assert world.advance("mx2").state is State.FAILED
    # Nobody asks for a third: there is no source left.
    assert set(world.all()) == {"mx1", "mx2"}
    last = world.advance(world.request())
    assert last.state is State.FAILED
    assert last.reason is not None
    assert last.reason.startswith(
        "reserve: no host to be had: north is set aside: mx1, create: the command of north could not create (status 3): no more; south is"
    )
    assert last.ordered_at is None


@SQLITE
def test_a_list_of_hosts_gives_each_one_once(world: World) -> None:
    north, _ = world.hosters
    made = [north.source().create(order) for order in (_order("a"), _order("b"))]
    world.use(Inventory("rack", made))
    first, second, third = world.request(), world.request(), world.request()
    assert world.advance(first).host == made[0]
    assert world.advance(second).host == made[1]
    assert "all 2 hosts of rack are taken" in (world.advance(third).reason or "")
    # Given back, it is free, and nothing of the first server is on it any more.
    transact(world.engine, lambda connection: store.give_back(connection, first, "not wanted"))
    assert world.advance(first).state is State.RETIRED
    assert not (world.place / first).exists()
    assert world.advance(world.request()).host == made[0]


@SQLITE
def test_a_host_of_a_list_that_failed_is_left_alone_for_a_day(world: World) -> None:
    north, _ = world.hosters
    made = [north.source().create(order) for order in (_order("a"), _order("b"))]
    world.use(Inventory("rack", made))
    world.verifier.findings = [Finding("heartbeat", False, "no room for the log")]
    world.to_the_end(world.request())
    world.verifier.findings = []
    assert world.to_the_end(world.request()).host == made[1]


# --- money and numbers ------------------------------------------------------------------------------------------


@SQLITE
def test_the_budget_of_the_month_is_kept(world: World) -> None:
    north, _ = world.hosters
    # A month has 672 hours or more: each server costs at most 1 in what is left of it, however old the month is.
    dear = north.source(cost_per_hour=1.0)
    world.use(dear)
    world.set(budget=0.0)
    refused = world.advance(world.request())
    assert refused.state is State.FAILED
    assert "above provisioning.budget" in (refused.reason or "")
    assert north.created == []
    world.set(budget=1_000_000.0)
    assert world.advance(world.request()).state is State.ACTIVE


@SQLITE
def test_no_more_are_made_than_may_be(world: World) -> None:
    world.set(at_once=1, most=2)
    world.zone.quick = False
    first, second = world.request(), world.request()
    assert world.advance(first).state is State.WAITING_DNS
    # One is being made: this one waits, and takes no attempt.
    waits = world.advance(second)
    assert (waits.at, waits.attempt) == (At(State.REQUESTED, Step.RESERVE), 0)
    assert "provisioning.at_once" in (waits.reason or "")
    world.zone.quick = True
    assert world.advance(first).state is State.ACTIVE
    assert world.advance(second).state is State.ACTIVE
    assert "provisioning.most is 2" in (world.advance(world.request()).reason or "")


# --- DNS --------------------------------------------------------------------------------------------------------


@SQLITE
def test_it_waits_for_the_dns_with_the_exact_records_and_goes_on_by_itself(world: World) -> None:
    world.zone.quick = False
    key = world.request()
    waits = world.advance(key)
    assert (waits.state, waits.records) == (State.WAITING_DNS, list(NAMES))
    assert world.server_state(key) == "provisioning"
    with reading(world.engine) as connection:
        assert [one.key for one in store.due(connection, dt.datetime.now(dt.UTC) + dt.timedelta(seconds=5))] == [key]
    world.zone.write(set(NAMES))
    assert world.advance(key).state is State.ACTIVE
    assert world.provision(key).records is None


@SQLITE
def test_it_gives_up_waiting_for_the_dns_after_the_set_time(world: World) -> None:
    world.zone.quick = False
    key = world.request()
    world.advance(key)
    long_ago = dt.datetime.now(dt.UTC) - dt.timedelta(hours=73)
    transact(world.engine, lambda connection: connection.execute(sa.update(models.Provision).values(state_at=long_ago)))
    ended = world.advance(key)
    assert ended.state is State.FAILED
    assert "have not appeared within 72 h" in (ended.reason or "")
    world.nothing_is_left(key)


@SQLITE
@pytest.mark.parametrize("served", [True, False])
def test_the_keys_of_a_server_that_has_sent_stay_in_the_dns_and_its_names_go(world: World, served: bool) -> None:
    """Mail that it has signed is verified days later. One that could not be made has signed nothing."""
    sending = world.settings.sending.model_copy(update={"token_key": "a key for tests", "allow_unverified": True})
    dns = world.settings.dns.model_copy(update={"spf_include": "spf.example.com"})
    world.parts = replace(world.parts, settings=world.settings.model_copy(update={"sending": sending, "dns": dns}))
    domains.add(world.engine, Names.of("shop.test"), world.settings.token_key(), dt.datetime.now(dt.UTC))
    world.verifier.findings = [] if served else [Finding("heartbeat", False, "Exim does not start")]
    server = world.request()
    if world.to_the_end(server).state is State.ACTIVE:
        transact(world.engine, lambda connection: store.give_back(connection, server, "not wanted"))
        world.advance(server)
    world.nothing_is_left(server)
    assert len([line for line in world.zone.lines if "._domainkey.shop.test. " in line]) == served
    assert 'spf.example.com. 3600 IN TXT "v=spf1 ~all"' in world.zone.lines


# --- leaving ----------------------------------------------------------------------------------------------------


@SQLITE
def test_a_server_with_open_claims_is_waited_for(world: World) -> None:
    key = world.request()
    world.advance(key)
    with reading(world.engine) as connection:
        server = servers.find(connection, key)
    now = dt.datetime.now(dt.UTC)
    place = {"campaign_id": 1, "shard": 0, "provider": "google", "server_id": server.id, "run_id": "-", "size": 1, "state": "open"}
    values = place | {"incarnation": "-", "boot_id": "-", "journal_inode": 1, "journal_offset": 0, "opened_at": now, "lease_until": now}
    transact(world.engine, lambda connection: connection.execute(sa.insert(models.Claim).values(id=5, **values)))
    transact(world.engine, lambda connection: store.give_back(connection, key, "not wanted"))
    waits = world.advance(key)
    assert waits.at == At(State.DRAINING, Step.SETTLE)
    assert "1 claims are open" in (waits.reason or "")
    assert world.server_state(key) == "draining"
    transact(world.engine, lambda connection: connection.execute(sa.update(models.Claim).values(state="closed", closed_at=now)))
    assert world.advance(key).state is State.RETIRED
    world.nothing_is_left(key)


@SQLITE
def test_a_lost_server_whose_host_the_hoster_has_switched_off_sets_its_source_aside(world: World) -> None:
    north, _ = world.hosters
    key = world.request()
    world.advance(key)
    north.shut()
    registry.lose(world.engine, key)
    transact(world.engine, lambda connection: store.give_back(connection, key, "lost"))
    assert world.advance(key).state is State.RETIRED
    with reading(world.engine) as connection:
        assert "the hoster has switched it off" in store.set_aside(connection)["north"]


def _order(name: str):  # type: ignore[no-untyped-def]
    from mail_pipelines.provisioning import ssh_keys
    from mail_pipelines.provisioning.interfaces import Order

    return Order(name, "", ssh_keys.generate())
