"""Servers that are taken out of service by themselves, from counters to grants, alerts and the server in their place; and those that are not needed."""

from __future__ import annotations

import datetime as dt
import re
from pathlib import Path

import pytest
import sqlalchemy as sa

from mail_pipelines.alerts import causes
from mail_pipelines.capacity import health, in_force, planning, shortage, verdicts
from mail_pipelines.capacity.health_rules import Standing, rules
from mail_pipelines.capacity.new_servers import HostSources, NextSource
from mail_pipelines.commands import context
from mail_pipelines.database.engine import database_now, reading, transact
from mail_pipelines.database.models import Campaign, CampaignMinute, Provision, State
from mail_pipelines.dispatch import registry, servers
from mail_pipelines.provisioning import proposals, store
from mail_pipelines.provisioning.block_lists import Look
from mail_pipelines.provisioning.block_lists import Standing as Said
from mail_pipelines.provisioning.listing import Listing, keep, of
from mail_pipelines.provisioning.proposals import Wanted
from mail_pipelines.provisioning.states import State as Making
from mail_pipelines.sensors import capacity as sensor
from tests.capacity.test_planning import add_campaign
from tests.dispatch.test_hold_commands import says
from tests.dispatch.world import World, make_world

MINUTE = dt.timedelta(minutes=1)
KEYS = ("mx1", "mx2", "mx3")


@pytest.fixture
def world(engine: sa.Engine, tmp_path: Path) -> World:
    """Three servers that speak, of which mx1 was made here, and a campaign that is sending."""
    context.settings.cache_clear()
    world = make_world(engine, tmp_path / "home", recipients=40)
    for key in KEYS:
        world.server(key)
        world.set_server(key, heartbeat_at=now_of(world))
    made_here(world, "mx1")
    return world


def now_of(world: World) -> dt.datetime:
    with reading(world.engine) as connection:
        return database_now(connection)


def made_here(world: World, key: str, cost: float = 0.1, **values: object) -> None:
    def work(connection: sa.Connection) -> None:
        now = database_now(connection)
        old = now - dt.timedelta(days=30)
        row = {"state": "active", "step": "", "attempt": 0, "why": "", "state_at": old, "requested_at": old, "ordered_at": old, "created_at": old}
        row |= {"cost_per_hour": cost, "source": "rack", "server_id": servers.find(connection, key).id}
        connection.execute(sa.insert(Provision).values(key=key, **row | values))

    transact(world.engine, work)


def answered(world: World, at: dt.datetime, *bad: str, providers: tuple[str, ...] = ("google", "yahoo"), answers: int = 100) -> None:
    """In a minute each server has so many answers of each provider; of those of `bad` half are deferrals."""

    def work(connection: sa.Connection) -> None:
        for key in KEYS:
            server = servers.find(connection, key)
            counts = {State.DELIVERED: answers // 2, State.DEFERRED: answers // 2} if key in bad else {State.DELIVERED: answers}
            for provider in providers:
                place = {"campaign_id": 1, "minute": int(at.timestamp()) // 60, "provider": provider, "server_id": server.id}
                connection.execute(
                    sa.insert(CampaignMinute),
                    [place | {"state": int(state), "reason": "rate_limited" if state is State.DEFERRED else "", "count": n} for state, n in counts.items()],
                )

    transact(world.engine, work)


def state_of(world: World, key: str) -> str:
    with reading(world.engine) as connection:
        return servers.find(connection, key).state


def standing_of(world: World, key: str) -> Standing | None:
    with reading(world.engine) as connection:
        record = health.records(connection).get(key)
    return None if record is None else record.standing


def drained(world: World) -> dt.datetime:
    """mx1 is refused, look after look; returns when it was drained."""
    now = now_of(world)
    answered(world, now - 2 * MINUTE, "mx1")
    assert health.look(world.engine, now) == []
    said = health.look(world.engine, now + rules().confirm)
    assert said == ["server mx1 is drained: google 50 of 100 answers; yahoo 50 of 100 answers"]
    return now + rules().confirm


def told(world: World, kind: str) -> list[tuple[str, str]]:
    with reading(world.engine) as connection:
        return [(cause.text, cause.command) for cause in causes.collect(connection, world.settings) if cause.kind == kind]


def test_a_server_that_is_refused_is_drained_told_and_taken_back(world: World) -> None:
    at = drained(world)
    assert [state_of(world, key) for key in KEYS] == ["draining", "active", "active"]
    assert health.look(world.engine, at + 6 * MINUTE) == []
    ((text, command),) = told(world, "server-drained")
    assert "google 50 of 100 answers" in text
    assert command == "mail-pipelines server activate mx1"
    assert "draining (taken out)" in says("server", "list")
    assert "mx1 was taken out of service: google 50 of 100 answers" in says("server", "list")
    assert "taken out of service" in says("server", "show", "mx1")
    # Taken back, with the same answers still in the last hours. From that moment on nobody gives it back or replaces it, whenever the next look is.
    says("server", "activate", "mx1")
    assert told(world, "server-drained") == []
    with reading(world.engine) as connection:
        assert (health.gone(connection, at + rules().kept), health.drained(connection)) == ([], {})
    assert "taken out" not in says("server", "list")
    for minutes in range(12, 90, 6):
        assert health.look(world.engine, at + minutes * MINUTE) == []
    assert (state_of(world, "mx1"), standing_of(world, "mx1")) == ("active", Standing.BACK)


def test_answers_are_counted_once_and_forgotten_with_their_hours(world: World) -> None:
    now = now_of(world)
    answered(world, now - 2 * MINUTE, answers=rules().least // 2)
    health.look(world.engine, now)
    # Within five minutes nobody looks again.
    health.look(world.engine, now + 4 * MINUTE)
    answered(world, now + 3 * MINUTE, answers=10)
    health.look(world.engine, now + 5 * MINUTE)

    def sums() -> int:
        with reading(world.engine) as connection:
            found = health._sums(connection)
        assert found is not None
        return sum(answers for hour in found.hours.values() for answers, _ in hour.values())

    assert sums() == 3 * 2 * (rules().least // 2 + 10)
    health.look(world.engine, now + dt.timedelta(hours=rules().hours + 2))
    assert sums() == 0


def test_one_that_a_list_that_matters_has_twice_is_drained(world: World) -> None:
    now = now_of(world)
    answered(world, now - 2 * MINUTE)
    words = ("192.0.2.1 is listed by zen.spamhaus.org",)

    def listed(at: dt.datetime) -> None:
        transact(world.engine, lambda connection: keep(connection, {"mx1": Listing(at, words, (), words, now)}))

    listed(now)
    health.look(world.engine, now)
    health.look(world.engine, now + 20 * MINUTE)
    assert (state_of(world, "mx1"), standing_of(world, "mx1")) == ("active", None)
    listed(now + 21 * MINUTE)
    health.look(world.engine, now + 26 * MINUTE)
    assert health.look(world.engine, now + 42 * MINUTE) == [f"server mx1 is drained: {words[0]}"]
    # An operator takes it back with the listing as it was: that is his decision.
    says("server", "activate", "mx1")
    for minutes in (50, 60, 70, 80, 90):
        assert health.look(world.engine, now + minutes * MINUTE) == []
    assert state_of(world, "mx1") == "active"


def test_a_listing_that_matters_is_looked_at_again_soon_and_then_as_often_as_others() -> None:
    now, every = dt.datetime(2026, 3, 2, tzinfo=dt.UTC), dt.timedelta(hours=6)
    first = Listing(now, ("a",), (), ("a",), now)
    assert not first.confirmed
    assert [first.is_due(now + minutes * MINUTE, every) for minutes in (9, 10)] == [False, True]
    second = Listing(now + 10 * MINUTE, ("a",), (), ("a",), now)
    assert second.confirmed
    assert [second.is_due(second.at + minutes * MINUTE, every) for minutes in (10, 359, 360)] == [False, False, True]


def test_a_list_that_does_not_answer_has_not_taken_the_address_off() -> None:
    """Else the listing with which an operator took the server back would be a new one when it answers again."""
    now = dt.datetime(2026, 3, 2, tzinfo=dt.UTC)
    on, off, silent = (Look("192.0.2.1", "zen", standing, "", standing is Said.LISTED) for standing in (Said.LISTED, Said.CLEAR, Said.UNKNOWN))
    first = of([on], None, now)
    during = of([silent], first, now + MINUTE)
    again = of([on], during, now + 2 * MINUTE)
    assert (first.since, during.matters, during.since, again.since) == (now, (), now, now)
    assert of([off], again, now + 3 * MINUTE).since is None


def test_when_all_are_refused_operators_are_told_and_no_server_is_drained(world: World) -> None:
    now = now_of(world)
    answered(world, now - 2 * MINUTE, *KEYS)
    health.look(world.engine, now)
    (said,) = health.look(world.engine, now + rules().confirm)
    assert said.startswith("3 of 3 servers are refused at once, by google, yahoo")
    assert [state_of(world, key) for key in KEYS] == ["active"] * 3
    ((text, command),) = told(world, "fleet-refused")
    assert (text.startswith(said), command) == (True, "mail-pipelines campaign list")


def wanted(world: World) -> list[Wanted]:
    with reading(world.engine) as connection:
        return shortage.wanted(connection, curve=None)


def missing(world: World, one: Wanted, **settings: object) -> int:
    given = world.settings.provisioning.model_copy(update={"mode": "auto", "budget": 10_000.0, "cool_down_minutes": 0} | settings)
    with reading(world.engine) as connection:
        known = store.all_provisions(connection)
        return proposals.missing(one, known, proposals.last_action(connection, one.pool), 0.1, given, database_now(connection) + dt.timedelta(hours=1))[0]


@pytest.mark.parametrize("way", ["drained", "lost"])
def test_another_takes_the_place_of_a_server_made_here_once(world: World, way: str) -> None:
    if way == "lost":
        now = now_of(world)
        registry.lose(world.engine, "mx1")
        # One that was not made here is not replaced.
        registry.lose(world.engine, "mx2")
        health.look(world.engine, now)
    else:
        drained(world)
    (one,) = wanted(world)
    assert (one.servers, one.pool) == (1, None)
    assert one.why.startswith("in the place of mx1: ")
    # Within budget and cool-down, as every order.
    assert missing(world, one) == 1
    assert missing(world, one, budget=1.0) == 0
    assert missing(world, one, most=1) == 0
    transact(world.engine, lambda connection: store.request(connection, world.settings.provisioning, one.why))
    transact(world.engine, lambda connection: connection.execute(sa.update(Provision).where(Provision.key == "mx4").values(requested_at=one.as_of + MINUTE)))
    for state in (Making.REQUESTED, Making.WARMING, Making.ACTIVE):
        transact(world.engine, lambda connection, state=state: connection.execute(sa.update(Provision).where(Provision.key == "mx4").values(state=state.value)))  # type: ignore[misc]
        (again,) = wanted(world)
        assert missing(world, again) == 0
    # It could not be made: another one.
    failed = {"state": "failed", "ended_at": now_of(world)}
    transact(world.engine, lambda connection: connection.execute(sa.update(Provision).where(Provision.key == "mx4").values(**failed)))
    assert missing(world, wanted(world)[0]) == 1
    # Taken back, it is replaced no more.
    says("server", "activate", "mx1")
    health.look(world.engine, now_of(world) + dt.timedelta(hours=1))
    assert wanted(world) == []


def test_what_came_in_the_place_of_one_is_no_answer_to_the_plan(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two lost servers have others in their place; then the far plan orders one more, which is fewer than two and still missing."""
    made_here(world, "mx2")
    now = now_of(world)
    for key in ("mx1", "mx2"):
        registry.lose(world.engine, key)
        health.look(world.engine, now)
        now += 6 * MINUTE
    (one,) = wanted(world)
    assert (one.servers, missing(world, one)) == (2, 2)
    assert one.as_of is not None
    for _ in range(2):
        transact(world.engine, lambda connection: store.request(connection, world.settings.provisioning, one.why))
    came = {"state": "active", "requested_at": one.as_of + MINUTE}
    transact(world.engine, lambda connection: connection.execute(sa.update(Provision).where(Provision.key.not_in(["mx1", "mx2"])).values(**came)))
    assert [missing(world, one) for one in wanted(world)] == [0]
    plan = in_force.Kept(1, {"orders": [], "far": []}, one.as_of + 2 * MINUTE)
    monkeypatch.setattr(in_force, "read", lambda connection: plan)
    monkeypatch.setattr(shortage, "_far", lambda kept: {"default": Wanted(1, "the far plan")})
    (found,) = wanted(world)
    assert (found.why, missing(world, found)) == ("the far plan", 1)


def test_one_that_nobody_takes_back_is_given_back(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    at = drained(world)

    def tick(now: dt.datetime) -> list[str]:
        monkeypatch.setattr(sensor, "database_now", lambda connection: now)
        return transact(world.engine, sensor.give_back)

    assert tick(at + rules().kept - MINUTE) == []
    assert tick(at + rules().kept) == ["server mx1 is given back: it was taken out of service, and nobody took it back"]
    with reading(world.engine) as connection:
        assert store.find(connection, "mx1").state is Making.DRAINING
    assert tick(at + rules().kept + MINUTE) == []
    assert wanted(world) == []


# --- not needed ---------------------------------------------------------------------------------------------------


def test_a_server_that_is_not_needed_is_told_of_and_given_back_one_at_a_time(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forty recipients, and three servers of which two were made here."""
    made_here(world, "mx2", cost=0.2)
    now = now_of(world)

    def plan(day: int) -> dict[str, verdicts.Verdict]:
        for key in KEYS:
            world.set_server(key, heartbeat_at=now + dt.timedelta(days=day))
        planning.make(world.engine, world.settings, now + dt.timedelta(days=day))
        with reading(world.engine) as connection:
            return dict(verdicts.standing(connection, now + dt.timedelta(days=day)))

    found = plan(0)
    assert {key: (one.keep, one.due) for key, one in found.items()} == {"mx1": (True, False), "mx2": (False, False)}
    assert found["mx1"].why.startswith("mx2 goes first; needed not within eight weeks")
    shown = says("plan", "show")
    assert "server mx1 is kept: mx2 goes first" in shown
    assert "server mx2 could be given back, since" in shown
    assert "not needed" in says("server", "show", "mx2")
    assert told(world, "server-idle") == []
    assert transact(world.engine, sensor.give_back) == []
    for day in (1, 2):
        assert not plan(day)["mx2"].due
    assert plan(3)["mx2"].due
    monkeypatch.setattr(causes, "database_now", lambda connection: now + dt.timedelta(days=3))
    monkeypatch.setattr(sensor, "database_now", lambda connection: now + dt.timedelta(days=3))
    ((text, command),) = told(world, "server-idle")
    assert text.startswith("server mx2 is not needed, and costs 146.00 a month: needed not within eight weeks")
    assert command == "mail-pipelines server remove mx2"
    (said,) = transact(world.engine, sensor.give_back)
    assert said.startswith("server mx2 is given back: needed not within eight weeks")
    assert transact(world.engine, sensor.give_back) == []
    world.set_server("mx2", state="draining")
    # The next one has its days, too.
    assert {key: (one.keep, one.due) for key, one in plan(3).items()} == {"mx1": (False, False)}


def test_what_the_next_two_days_need_is_kept(world: World) -> None:
    """A campaign with a deadline that all three just meet."""
    now = now_of(world)
    servers.set_limits(world.engine, None, "*", {"per_second": 1.0})
    add_campaign(world, "urgent", 3 * 3_600 * 5, finish_by=now + dt.timedelta(hours=5, minutes=20))
    planning.make(world.engine, world.settings, now)
    with reading(world.engine) as connection:
        (found,) = verdicts.standing(connection, now).values()
    assert (found.keep, found.why) == (True, "the next 48 hours need it")


# --- what an order does in two days -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "servers_wanted"),
    [
        (NextSource("", 0.1), 2),
        (NextSource("fast", 0.1), 3),
        (NextSource("careful", 0.1), 0),
        (None, 0),
    ],
)
def test_the_shortage_of_two_days_counts_on_what_new_servers_really_deliver(world: World, source: NextSource | None, servers_wanted: int) -> None:
    """Of a message a second a warm server sends 36,000 in ten hours, and one on the fast curve 20,000 on its first day: 50,000 are too many for three."""
    now = now_of(world)
    servers.set_limits(world.engine, None, "*", {"per_second": 1.0})
    start = now.replace(hour=0, minute=0, second=0, microsecond=0) + dt.timedelta(days=1)
    number = add_campaign(world, "big", 3 * 36_000 + 50_000, state="scheduled", start_at=start, finish_by=start + dt.timedelta(hours=10))
    # It is as large as the last to the same segments.
    add_campaign(world, "last", 3 * 36_000 + 50_000, state="finished", audience_counts={"audience": 3 * 36_000 + 50_000})
    assert number
    planning.make(world.engine, world.settings, now, HostSources(source))
    with reading(world.engine) as connection:
        found = shortage.wanted(connection, curve=None if source is None else source.curve)
    assert sum(one.servers for one in found) == servers_wanted


def test_a_plan_whose_campaign_is_over_asks_for_no_servers(world: World) -> None:
    """No other one is made when nothing is to be sent: this one stays in force until the next day."""
    now = now_of(world)
    servers.set_limits(world.engine, None, "*", {"per_second": 1.0})
    number = add_campaign(world, "big", 60_000, finish_by=now + dt.timedelta(hours=5))
    planning.make(world.engine, world.settings, now, HostSources(NextSource("", 0.1)))

    def asked(state: str) -> int:
        transact(world.engine, lambda connection: connection.execute(sa.update(Campaign).where(Campaign.id == number).values(state=state)))
        with reading(world.engine) as connection:
            return sum(one.servers for one in shortage.wanted(connection, curve=""))

    assert asked("sending") > 0
    assert [asked(state) for state in ("finished", "cancelled", "paused")] == [0, 0, 0]


def test_a_shortage_tells_when_a_campaign_ends_with_servers_and_without(world: World) -> None:
    """10,800 messages an hour; those ordered now are there at once, since none was made yet."""
    now = now_of(world)
    servers.set_limits(world.engine, None, "*", {"per_second": 1.0})
    by = now + dt.timedelta(hours=4)
    add_campaign(world, "big", 60_000, finish_by=by)
    planning.make(world.engine, world.settings, now, HostSources(NextSource("", 0.1)))
    with reading(world.engine) as connection:
        (one,) = shortage.wanted(connection, curve="")
    said = re.fullmatch(r"campaign big ends in time with (\d) more servers, at (.{16}) UTC instead of (.{16})", one.effect)
    assert said is not None
    with_them, without = (dt.datetime.fromisoformat(f"{moment}+00:00") for moment in said.groups()[1:])
    assert int(said[1]) == one.servers == 2
    assert by - dt.timedelta(hours=1) < with_them <= by < without
    assert abs(without - now - dt.timedelta(hours=60_000 / 10_800)) < dt.timedelta(minutes=10)


def test_servers_that_take_long_to_make_help_nobody_today(world: World) -> None:
    """Those made here took 40 minutes; the campaign has half an hour."""
    now = now_of(world)
    servers.set_limits(world.engine, None, "*", {"per_second": 1.0})
    add_campaign(world, "big", 20_000, finish_by=now + dt.timedelta(minutes=45))

    def asked(took: dt.timedelta) -> int:
        times = {"requested_at": now - dt.timedelta(days=2), "state_at": now - dt.timedelta(days=2) + took}
        transact(world.engine, lambda connection: connection.execute(sa.update(Provision).values(**times)))
        planning.make(world.engine, world.settings, now, HostSources(NextSource("", 0.1)))
        with reading(world.engine) as connection:
            kept = in_force.read(connection)
            assert kept is not None
            return len(kept.document["offer"]["orders"])

    assert asked(dt.timedelta(minutes=1)) == 1
    assert asked(dt.timedelta(minutes=50)) == 0
