"""The plan in force: what it makes of grants, what it leaves to the rule of every tick, and what people are told of it."""

from __future__ import annotations

import datetime as dt
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
import sqlalchemy as sa

from mail_pipelines.assets.capacity import capacity_plan
from mail_pipelines.capacity import allotments, demand, forecast, in_force, planning, reports, warm_up, what_if
from mail_pipelines.capacity import grants as rows_of_grants
from mail_pipelines.capacity.new_servers import HostSources, NextSource
from mail_pipelines.commands import context
from mail_pipelines.database.engine import database_now, reading, transact
from mail_pipelines.database.models import Allotment, Breaker, Campaign, CampaignCounter, CampaignMinute, ProviderUsage, State, SyncState
from mail_pipelines.delivery import counters
from mail_pipelines.delivery.recording import slot_at
from mail_pipelines.dispatch import registry, servers
from mail_pipelines.dispatch.claims import OpenClaim
from mail_pipelines.resources.database import CentralDatabase
from mail_pipelines.schedules import due_plan
from tests.dispatch.test_hold_commands import says
from tests.dispatch.world import World, make_world
from tests.parts.database_clock import DatabaseClock

HEARTBEAT = 10.0
NOW = dt.datetime(2026, 3, 2, 9, 7, tzinfo=dt.UTC)


@pytest.fixture
def world(engine: sa.Engine, tmp_path: Path) -> World:
    """Two servers that speak, one message a second each, and a campaign with 40 rows."""
    context.settings.cache_clear()
    world = make_world(engine, tmp_path / "home", recipients=40)
    for key in ("s1", "s2"):
        world.server(key, per_second=1.0)
        world.set_server(key, heartbeat_at=NOW)
    return world


def add_campaign(world: World, key: str, rows: int, **values: object) -> int:
    """Another campaign like the first, with `rows` waiting for google."""

    def work(connection: sa.Connection) -> int:
        number = connection.execute(sa.select(sa.func.max(Campaign.id))).scalar_one() + 1
        row = dict(connection.execute(sa.select(Campaign.__table__).where(Campaign.id == 1)).mappings().one())
        connection.execute(sa.insert(Campaign).values(row | {"id": number, "key": key} | values))
        if rows:
            counters.add(connection, number, 0, Counter({(0, "google", State.PENDING, ""): rows}), NOW)
        return int(number)

    return transact(world.engine, work)


def grants(world: World, campaign_id: int, provider: str = "google") -> dict[int, tuple[int, int]]:
    """By the start of the slot (s from the current one) what is granted and planned on all servers."""
    table = (Allotment.slot_start, sa.func.sum(Allotment.granted), sa.func.sum(Allotment.planned))
    with reading(world.engine) as connection:
        rows = connection.execute(sa.select(*table).where(Allotment.campaign_id == campaign_id, Allotment.provider == provider).group_by(Allotment.slot_start))
        return {start - slot_at(NOW): (int(granted), int(planned)) for start, granted, planned in rows}


def test_a_single_campaign_is_granted_all_there_is_with_a_plan_as_without(world: World) -> None:
    allotments.fill(world.engine, HEARTBEAT, NOW)
    before = grants(world, 1)
    assert before == {0: (1_800, 0), 900: (1_800, 0)}
    made = planning.make(world.engine, world.settings, NOW)
    assert made.changed
    rows = sum(wanted.rows for part in made.plan.providers for wanted in part.demands if wanted.provider == "google")
    assert grants(world, 1) == {0: (1_800, rows), 900: (1_800, 0), 1800: (1_800, 0)}


def test_the_urgent_campaign_goes_first_and_the_other_has_its_share(world: World) -> None:
    urgent = add_campaign(world, "urgent", 5_000, priority=3)
    low = add_campaign(world, "low", 5_000, priority=0)
    world.set_campaign(state="paused")
    planning.make(world.engine, world.settings, NOW)
    found, others = grants(world, urgent), grants(world, low)
    assert found[900] == (1_764, 1_764)
    assert others[900] == (36, 36)
    allotments.fill(world.engine, HEARTBEAT, NOW)
    assert grants(world, urgent) == found
    assert grants(world, low) == others


def test_a_campaign_that_the_plan_does_not_know_has_its_share_at_once_and_the_next_plan_makes_it_good(world: World) -> None:
    low = add_campaign(world, "low", 50_000, priority=0)
    planning.make(world.engine, world.settings, NOW)
    urgent = add_campaign(world, "urgent", 50_000, priority=3)
    allotments.fill(world.engine, HEARTBEAT, NOW)
    assert grants(world, urgent)[0][0] > 1_600
    planning.make(world.engine, world.settings, NOW)
    granted = [grants(world, campaign)[900][0] for campaign in (1, low, urgent)]
    assert sum(granted) <= 1_802
    assert granted[2] > 1_700


def test_what_is_used_stays_granted_and_counts(world: World) -> None:
    """A claim between two plans; the second plan plans the rest of the slot."""
    # In the middle of a slot: in the last seconds of one there is no room for all.
    moment = dt.datetime.fromtimestamp(slot_at(dt.datetime.now(dt.UTC)) + 450, dt.UTC)
    DatabaseClock(world.engine, moment)
    world.set_server("s2", state="paused")
    world.set_server("s1", heartbeat_at=moment)
    planning.make(world.engine, world.settings)
    with reading(world.engine) as connection:
        server = servers.find(connection, "s1")
    answer = world.claim(server, limit=7)
    assert isinstance(answer, OpenClaim)
    planning.make(world.engine, world.settings)
    with reading(world.engine) as connection:
        columns = (Allotment.granted, Allotment.used, Allotment.planned, Allotment.plan_epoch)
        row = connection.execute(sa.select(*columns).where(Allotment.used > 0)).one()
        waiting = connection.execute(
            sa.select(sa.func.sum(CampaignCounter.count)).where(CampaignCounter.provider == "google", CampaignCounter.state == int(State.PENDING))
        ).scalar_one()
    assert row.used == len(answer.rows)
    assert row.planned == row.used + waiting
    assert row.granted >= row.planned


def test_a_server_that_leaves_gives_back_what_it_has_not_used_and_no_plan_gives_it_again(world: World) -> None:
    world.stop_the_clock()
    with reading(world.engine) as connection:
        moment = database_now(connection)
    for key in ("s1", "s2"):
        world.set_server(key, heartbeat_at=moment)
    planning.make(world.engine, world.settings)
    with reading(world.engine) as connection:
        leaving = servers.find(connection, "s1")
    assert isinstance(world.claim(leaving, limit=7), OpenClaim)

    def unspent(server_id: int) -> tuple[int, int]:
        mine = (Allotment.server_id == server_id, Allotment.slot_start >= slot_at(moment))
        with reading(world.engine) as connection:
            granted, used = connection.execute(sa.select(sa.func.sum(Allotment.granted), sa.func.sum(Allotment.used)).where(*mine)).one()
        return int(granted) - int(used), int(used)

    assert unspent(leaving.id)[0] > 0

    def leave(connection: sa.Connection) -> None:
        registry.move(connection, "s1", "drain")
        allotments.take_back(connection, leaving.id)

    transact(world.engine, leave)
    for _ in range(2):
        assert unspent(leaving.id) == (0, 7)
        planning.make(world.engine, world.settings)
        allotments.fill(world.engine, HEARTBEAT)
    with reading(world.engine) as connection:
        assert unspent(servers.find(connection, "s2").id)[0] > 0


def test_what_comes_back_of_a_campaign_that_is_nearly_out_is_planned_where_there_is_room(world: World) -> None:
    """Rows that were in hand when the plan was made, and were not sent: frozen slots let nothing more in, and these would be half an hour later."""
    planning.make(world.engine, world.settings, NOW)
    transact(world.engine, lambda connection: counters.add(connection, 1, 0, Counter({(0, "google", State.PENDING, ""): 30}), NOW))
    later = NOW + dt.timedelta(seconds=20)
    made = planning.make(world.engine, world.settings, later)
    finish = made.plan.finish(1)
    assert finish is not None
    assert finish < (later + dt.timedelta(minutes=2)).timestamp()


def test_a_campaign_held_up_by_the_hour_is_not_taken_for_one_that_is_nearly_out(world: World) -> None:
    """The limit of its hour is planned for the first slots, so that nothing is in the last one that is granted, though most of it waits."""
    for key in ("s1", "s2"):
        servers.set_limits(world.engine, key, "*", {"per_hour": 450})
    large = add_campaign(world, "large", 5_000)
    planning.make(world.engine, world.settings, NOW)
    with reading(world.engine) as connection:
        situation = planning.read(connection, world.settings, NOW)
    previous = {place[2] - slot_at(NOW): count for place, count in situation._previous().items() if place[:2] == (large, "google")}
    assert 1800 not in previous
    assert 800 < sum(previous.values()) <= 900
    assert situation.nearly_out == {(1, wanted.provider) for wanted in situation.demands if wanted.job.id == 1}


def test_who_waits_for_nothing_keeps_what_he_has(world: World) -> None:
    """All rows are claimed: those that come back find a grant."""
    idle = add_campaign(world, "idle", 5)
    allotments.fill(world.engine, HEARTBEAT, NOW)
    moves = Counter({(0, "google", State.PENDING, ""): -5, (0, "google", State.CLAIMED, ""): 5})
    transact(world.engine, lambda connection: counters.add(connection, idle, 0, moves, NOW))
    before = grants(world, idle)
    planning.make(world.engine, world.settings, NOW)
    assert grants(world, idle) == before == {0: (900, 0), 900: (900, 0)}


def test_an_older_plan_never_overwrites_a_newer_one(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    low = add_campaign(world, "low", 50_000, priority=0)
    read = planning.read

    def overtaken(*arguments: object) -> planning.Situation:
        situation = read(*arguments)  # type: ignore[arg-type]
        monkeypatch.setattr(planning, "read", read)
        transact(world.engine, lambda connection: connection.execute(sa.update(Campaign).where(Campaign.id == low).values(state="paused")))
        assert planning.make(world.engine, world.settings, NOW).changed
        return situation

    monkeypatch.setattr(planning, "read", overtaken)
    assert planning.make(world.engine, world.settings, NOW).changed is None
    assert grants(world, low) == {}
    with reading(world.engine) as connection:
        kept = in_force.read(connection)
        assert kept is not None
        assert (kept.epoch, [found["campaign"] for found in kept.document["campaigns"]]) == (1, ["spring"])
        assert set(connection.execute(sa.select(Allotment.plan_epoch)).scalars()) == {1}


def test_a_plan_that_is_killed_between_two_portions_is_not_mixed_with_another(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """A portion is the provider of a slot here. What the killed plan did not write is shared as if nothing were planned; the next plan makes it whole."""
    urgent = add_campaign(world, "urgent", 5_000, priority=3)
    low = add_campaign(world, "low", 5_000, priority=0)
    world.set_campaign(state="paused")
    planning.make(world.engine, world.settings, NOW)
    before = grants(world, urgent), grants(world, low)
    assert before[0][900] == (1_764, 1_764)

    def swapped(connection: sa.Connection) -> None:
        for campaign, priority in ((urgent, 0), (low, 3)):
            connection.execute(sa.update(Campaign).where(Campaign.id == campaign).values(priority=priority))

    transact(world.engine, swapped)
    portions, write = [0], rows_of_grants._write

    class Killed(BaseException):
        pass

    def dies(*arguments: object) -> int | None:
        portions[0] += 1
        if portions[0] == 2:
            raise Killed
        return write(*arguments)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(rows_of_grants, "PORTION_ROWS", 1)
        patch.setattr(rows_of_grants, "_write", dies)
        with pytest.raises(Killed):
            planning.make(world.engine, world.settings, NOW)
    with reading(world.engine) as connection:
        kept = in_force.read(connection)
        assert kept is not None
        assert kept.epoch == 2
        mine = rows_of_grants.read(connection, rows_of_grants.slots_at(NOW, 3), kept.epoch)
        epochs = dict(connection.execute(sa.select(Allotment.slot_start, sa.func.max(Allotment.plan_epoch)).group_by(Allotment.slot_start)).tuples().all())
    # The current slot is the new plan's, the others have nothing planned.
    assert [epochs[start] for start in sorted(epochs)] == [2, 1, 1]
    assert {place[3] for place, grant in mine.items() if grant.planned} == {slot_at(NOW)}
    allotments.fill(world.engine, HEARTBEAT, NOW)
    shared = grants(world, low)[900][0]
    # As without a plan: 64 parts of 65, and not what it was given by either plan.
    assert shared == 2 * (900 * 64 // 65)
    monkeypatch.setattr(rows_of_grants, "PORTION_ROWS", 1)
    planning.make(world.engine, world.settings, NOW)
    assert grants(world, low)[900] == (1_764, 1_764)
    assert grants(world, urgent)[900] == (36, 36)


def test_a_tick_that_reads_between_two_portions_leaves_nothing_above_the_plan(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it made out before the plan's second portion was there it writes after it: shares of a room that has been planned meanwhile."""
    urgent = add_campaign(world, "urgent", 5_000, priority=3)
    low = add_campaign(world, "low", 5_000, priority=0)
    world.set_campaign(state="paused")
    monkeypatch.setattr(rows_of_grants, "PORTION_ROWS", 1)
    plain, portion = rows_of_grants.write, rows_of_grants._write
    late: list[Callable[[], int]] = []

    def later(*arguments: Any, **options: Any) -> int:
        late.append(lambda: plain(*arguments, **options))
        return 0

    def between(*arguments: Any) -> int | None:
        if not late:
            written = portion(*arguments)
            with monkeypatch.context() as patch:
                patch.setattr(rows_of_grants, "write", later)
                allotments.fill(world.engine, HEARTBEAT, NOW)
            return written
        return portion(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(rows_of_grants, "_write", between)
        planning.make(world.engine, world.settings, NOW)
    as_planned = grants(world, urgent), grants(world, low)
    assert as_planned[1][900] == (36, 36)
    assert len(late) == 2
    assert sum(write() for write in late) == 0
    assert (grants(world, urgent), grants(world, low)) == as_planned
    allotments.fill(world.engine, HEARTBEAT, NOW)
    assert (grants(world, urgent), grants(world, low)) == as_planned


def test_a_plan_that_is_overtaken_between_two_portions_writes_no_more(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    low = add_campaign(world, "low", 50_000, priority=0)
    monkeypatch.setattr(rows_of_grants, "PORTION_ROWS", 1)

    def overtaken(*arguments: object) -> object:
        monkeypatch.setattr(rows_of_grants, "transact", transact)
        written = transact(*arguments)  # type: ignore[arg-type]
        transact(world.engine, lambda connection: connection.execute(sa.update(Campaign).where(Campaign.id == low).values(state="paused")))
        assert planning.make(world.engine, world.settings, NOW).changed
        return written

    monkeypatch.setattr(rows_of_grants, "transact", overtaken)
    planning.make(world.engine, world.settings, NOW)
    with reading(world.engine) as connection:
        rows = connection.execute(sa.select(Allotment.plan_epoch, Allotment.slot_start, Allotment.provider).where(Allotment.planned > 0)).all()
    # Of the first one portion; all else, and that too where it plans anything, is the second's.
    assert len({(row.slot_start, row.provider) for row in rows if row.plan_epoch == 1}) <= 1
    assert any(row.plan_epoch == 2 for row in rows)


def test_a_campaign_that_the_plan_gave_nothing_is_not_taken_for_a_new_one(world: World) -> None:
    """All there is was planned for the urgent one. The other one has its share of what is left, which is nothing, and not of the whole room."""
    urgent = add_campaign(world, "urgent", 5_000, priority=3)
    low = add_campaign(world, "low", 5_000, priority=0)
    world.set_campaign(state="paused")
    planning.make(world.engine, world.settings, NOW)
    # As a plan without a floor share would have it.
    moved = sa.update(Allotment).where(Allotment.slot_start == slot_at(NOW) + 900)
    transact(world.engine, lambda connection: connection.execute(moved.where(Allotment.campaign_id == urgent).values(granted=900, planned=900)))
    transact(world.engine, lambda connection: connection.execute(moved.where(Allotment.campaign_id == low).values(granted=0, planned=0)))
    transact(world.engine, lambda connection: connection.execute(sa.delete(SyncState).where(SyncState.key == "filled")))
    allotments.fill(world.engine, HEARTBEAT, NOW)
    # A message on each server, so that it is not forgotten.
    assert grants(world, low)[900] == (2, 0)
    assert grants(world, urgent)[900] == (1_800, 1_800)


def use_up(world: World, server_id: int, length: int, used: int) -> None:
    start = int(NOW.timestamp()) // length * length
    usage = {"server_id": server_id, "provider": "google", "window_seconds": length, "window_start": start, "used": used}
    transact(world.engine, lambda connection: connection.execute(sa.insert(ProviderUsage).values(usage)))


@pytest.mark.parametrize(("length", "slots"), [(3600, {0: 0, 900: 0}), (86400, {0: 0, 900: 0}), (900, {0: 0, 900: 900})])
def test_where_a_limit_is_used_up_nothing_stays_unspent(world: World, length: int, slots: dict[int, int]) -> None:
    """And of a slot in which the limit is another one, the grants stay."""
    world.set_server("s2", state="paused")
    limits = {3600: {"per_hour": 700}, 86400: {"per_day": 700}, 900: {}}[length]
    servers.set_limits(world.engine, "s1", "*", {"per_second": 1.0, **limits})
    allotments.fill(world.engine, HEARTBEAT, NOW)
    assert grants(world, 1)[0][0] > 0
    use_up(world, 1, length, 900 if length == 900 else 700)
    allotments.fill(world.engine, HEARTBEAT, NOW)
    assert {start: granted for start, (granted, _) in grants(world, 1).items()} == slots
    # A message that was not sent after all is given back.
    given_back = sa.update(ProviderUsage).values(used=ProviderUsage.used - 1)
    transact(world.engine, lambda connection: connection.execute(given_back))
    allotments.fill(world.engine, HEARTBEAT, NOW)
    assert grants(world, 1)[0][0] > 0


def test_a_trial_waits_for_the_next_day_where_a_warm_up_is_used_up(world: World) -> None:
    world.set_server("s2", state="paused")
    transact(world.engine, lambda connection: warm_up.set_by_hand(connection, "s1", NOW, curve="manual"))

    def trial(connection: sa.Connection) -> None:
        values = {"server_id": 1, "provider": "google", "state": "trial", "rule": "blocked", "reason": "", "trips": 1, "until": None}
        connection.execute(sa.insert(Breaker).values(**values, changed_at=NOW, baseline={}))

    transact(world.engine, trial)
    allotments.fill(world.engine, HEARTBEAT, NOW)
    assert grants(world, 1)[0] == (5, 0)
    use_up(world, 1, 86400, 200)
    allotments.fill(world.engine, HEARTBEAT, NOW)
    assert grants(world, 1)[0] == (0, 0)


def test_a_tick_in_which_nothing_changed_reads_and_writes_no_grants(world: World) -> None:
    assert allotments.fill(world.engine, HEARTBEAT, NOW)
    statements: list[str] = []

    @sa.event.listens_for(world.engine, "before_cursor_execute")
    def note(connection: object, cursor: object, statement: str, *_: object) -> None:
        statements.append(statement)

    assert allotments.fill(world.engine, HEARTBEAT, NOW) == 0
    assert not [statement for statement in statements if "allotments" in statement]
    planning.make(world.engine, world.settings, NOW)
    statements.clear()
    # The plan has left nothing for the tick after it.
    assert allotments.fill(world.engine, HEARTBEAT, NOW) == 0
    assert not [statement for statement in statements if "allotments" in statement]
    # A provider for which something has changed is looked at.
    add_campaign(world, "another", 5)
    assert allotments.fill(world.engine, HEARTBEAT, NOW)
    read = [statement for statement in statements if "allotments" in statement and statement.startswith("SELECT")]
    assert len(read) == 1
    sa.event.remove(world.engine, "before_cursor_execute", note)


def test_what_a_breaker_has_taken_a_plan_does_not_give_back(world: World) -> None:
    allotments.fill(world.engine, HEARTBEAT, NOW)

    def opens(connection: sa.Connection) -> None:
        values = {"server_id": 1, "provider": "google", "state": "open", "rule": "blocked", "reason": "", "trips": 1}
        connection.execute(sa.insert(Breaker).values(**values, until=NOW + dt.timedelta(hours=2), changed_at=NOW, baseline={}))
        connection.execute(sa.update(Allotment).where(Allotment.server_id == 1, Allotment.provider == "google").values(granted=0))

    transact(world.engine, opens)
    planning.make(world.engine, world.settings, NOW)
    with reading(world.engine) as connection:
        where = (Allotment.server_id == 1, Allotment.provider == "google")
        assert set(connection.execute(sa.select(Allotment.granted).where(*where)).scalars()) == {0}


def test_deferrals_of_the_last_hours_slow_a_server_down(world: World) -> None:
    many = add_campaign(world, "many", 7_000)
    minute = int(NOW.timestamp()) // 60 - 30

    def answers(connection: sa.Connection) -> None:
        rows = [(State.DELIVERED, 100), (State.DEFERRED, 300)]
        for server in (1, 2):
            connection.execute(
                sa.insert(CampaignMinute),
                [
                    {"campaign_id": many, "minute": minute, "provider": "google", "server_id": server, "state": int(state), "reason": "", "count": count}
                    for state, count in rows
                ],
            )

    before = planning.make(world.engine, world.settings, NOW).plan.finish(many)
    transact(world.engine, answers)
    made = planning.make(world.engine, world.settings, NOW)
    after = made.plan.finish(many)
    assert before is not None
    assert after is not None
    assert after - NOW.timestamp() == pytest.approx(4 * (before - NOW.timestamp()), rel=0.1)
    found = next(found for found in made.document["campaigns"] if found["campaign"] == "many")
    assert found["bottleneck"] == "google: deferrals on 2 servers"


def test_what_comes_too_late_is_named_with_the_servers_that_would_save_it(world: World) -> None:
    add_campaign(world, "late", 20_000, finish_by=NOW + dt.timedelta(hours=1))
    (found,) = [found for found in planning.make(world.engine, world.settings, NOW).document["campaigns"] if found["campaign"] == "late"]
    # 7,200 an hour.
    assert 12_000 < found["late"] < 14_500
    assert found["bottleneck"] == "google: the rate of 2 servers"
    assert found["finish_at"].startswith("2026-03-02T11:5")
    with reading(world.engine) as connection:
        kept = in_force.read(connection)
    assert kept is not None
    (order,) = kept.document["orders"]
    assert (order["campaign"], order["servers"]) == ("late", 4)
    # A message a second each: 20,000 and ten of another take six an hour less than those 60 minutes.
    assert order["finish_at"] == found["finish_at"]
    assert "2026-03-02T10:02" < order["finish_with"] <= "2026-03-02T10:07:00+00:00"


def test_a_scheduled_campaign_is_expected_to_be_like_the_last_to_the_same_segments(world: World) -> None:
    last = {"segments": {"include": ["buyers"], "exclude": []}, "audience_counts": {"audience": 3_600}}
    add_campaign(world, "last", 3_600, state="finished", **last)
    tomorrow = NOW.replace(hour=9, minute=0) + dt.timedelta(days=1)
    add_campaign(world, "next", 0, state="scheduled", start_at=tomorrow, segments=last["segments"], audience_counts=None)
    add_campaign(world, "first", 0, state="scheduled", start_at=tomorrow, segments={"include": ["new"], "exclude": []}, audience_counts=None)
    found = {found["campaign"]: found for found in planning.make(world.engine, world.settings, NOW).document["campaigns"]}
    assert (found["next"]["messages"], found["next"]["expected"], found["next"]["finish_at"]) == (3_600, True, "2026-03-03T09:30:00+00:00")
    assert (found["first"]["messages"], found["first"]["finish_at"]) == (0, None)
    assert found["first"]["bottleneck"] == "its size is known when its audience is made"
    assert "last" not in found


def test_a_plan_is_needed_while_something_is_sending_or_scheduled_soon(world: World) -> None:
    def needed() -> bool:
        with reading(world.engine) as connection:
            return demand.needed(connection, NOW)

    assert needed()
    world.set_campaign(state="paused")
    assert not needed()
    world.set_campaign(state="scheduled", start_at=NOW + dt.timedelta(hours=47))
    assert needed()
    world.set_campaign(start_at=NOW + dt.timedelta(hours=49))
    assert not needed()


def test_the_schedule_asks_for_plans_while_there_is_something_to_plan_and_once_a_day(world: World) -> None:
    world.set_campaign(state="paused")
    with dg.instance_for_test() as instance:

        def asked(hour: int, minute: int) -> object:
            time = NOW.replace(hour=hour, minute=minute)
            return due_plan(dg.build_schedule_context(instance, scheduled_execution_time=time), CentralDatabase())

        assert isinstance(asked(9, 5), dg.SkipReason)
        assert isinstance(asked(4, 0), dg.RunRequest)
        world.set_campaign(state="sending")
        request = asked(9, 5)
        assert isinstance(request, dg.RunRequest)
        assert request.run_key == "2026-03-02T09:05"


def test_what_more_servers_would_change(world: World) -> None:
    add_campaign(world, "big", 72_000)
    with reading(world.engine) as connection:
        situation = planning.read(connection, world.settings, NOW)
    (answer,) = what_if.ask(situation, 2, NOW + dt.timedelta(hours=6), "big")
    assert answer.finish_at is not None
    assert answer.finish_with is not None
    assert answer.finish_at.startswith("2026-03-02T19:0")
    assert answer.finish_with.startswith("2026-03-02T14:0")
    assert (answer.needed, answer.new_servers_from, answer.new_servers_help) == (2, "2026-03-06", False)
    words = what_if.sentence(answer)
    assert words.startswith("finishes 2026-03-02 19:0")
    assert "; with 2 more warm servers 2026-03-02 14:0" in words
    assert "; to finish by 2026-03-02 15:07 it needs 2 more warm servers; new servers would send from 6 March, when it is over" in words
    # Where new servers are made within minutes and send at once, they help today; where it takes a day, it is over.
    situation = replace(situation, sources=HostSources(NextSource("", 0.1)))
    (soon,) = what_if.ask(situation, 0, None, "big")
    assert what_if.sentence(soon).endswith("; new servers would help from 2 March")
    (late,) = what_if.ask(replace(situation, lead_seconds=86_400.0), 0, None, "big")
    assert what_if.sentence(late).endswith("; new servers would send from 3 March, when it is over")
    with pytest.raises(what_if.UnknownCampaign, match="campaign bug has nothing to send within 48 hours; those that have: spring, big"):
        what_if.ask(situation, 2, None, "bug")


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
@pytest.mark.parametrize(("rows", "words"), [(500_000, "would send from 6 March, when it is over"), (900_000, "would help from 6 March")])
def test_new_servers_help_a_campaign_that_is_not_over_when_they_send(world: World, rows: int, words: str) -> None:
    """7,200 an hour: both are out after more than 48 hours, one on the 5th and one on the 7th."""
    add_campaign(world, "huge", rows)
    world.set_campaign(state="paused")
    with reading(world.engine) as connection:
        situation = planning.read(connection, world.settings, NOW)
    (found,) = forecast.document(plan := situation.plan(), forecast.forecasts(plan), ())["campaigns"]
    assert reports.ending(found).startswith("after 2026-03-0")
    assert reports.ending(found | {"earliest": None}) == "never, as things are"
    (answer,) = what_if.ask(situation, 4)
    assert answer.finish_at is None
    assert what_if.sentence(answer).startswith("finishes not within 48 hours (google: the rate of 2 servers); with 4 more warm servers 2026-03-0")
    assert what_if.sentence(answer).endswith(f"; new servers {words}")


def test_what_was_sent_is_shown_beside_what_was_planned_before(world: World) -> None:
    """Of an hour it counts what the last plan before it said, and not what is left to be planned while it lasts."""
    big = add_campaign(world, "big", 72_000, started_at=NOW)
    nine = slot_at(NOW)
    first = planning.make(world.engine, world.settings, NOW)
    assert first.document["planned_before"] == []

    def sent(connection: sa.Connection) -> None:
        place = {"campaign_id": big, "provider": "google", "server_id": 1, "reason": ""}
        minutes = [(10, State.DELIVERED, 4_000), (10, State.DEFERRED, 300), (59, State.BOUNCED, 100), (61, State.DELIVERED, 50), (-1200, State.DELIVERED, 7)]
        rows = [{"minute": nine // 60 + minute, "state": int(state), "count": count} for minute, state, count in minutes]
        connection.execute(sa.insert(CampaignMinute), [place | row for row in rows])

    transact(world.engine, sent)
    # In the hour after it half of the fleet is away, and plans are made again.
    world.set_server("s2", state="paused")
    for minutes in (55, 60):
        later = NOW + dt.timedelta(minutes=minutes)
        world.set_server("s1", heartbeat_at=later)
        made = planning.make(world.engine, world.settings, later)
    before, now = dict(first.document["hourly"]), dict(made.document["hourly"])
    assert 1.5 * now[nine + 3600] < before[nine + 3600]
    with reading(world.engine) as connection:
        table = reports.hours(planning.sent_by_hour(connection, later), made)
    rows = {int(hour.timestamp()) - nine: (sent, planned) for hour, sent, planned in table.head(3).itertuples(index=False)}
    assert rows == {0: (4_100, before[nine]), 3600: (50, before[nine + 3600]), 7200: (0, now[nine + 7200])}
    much_later = NOW + dt.timedelta(hours=forecast.PAST_HOURS + 1)
    assert next(hour for hour, _ in forecast.planned_before(made.document, int(much_later.timestamp()))) == nine + 3600


def test_the_plan_as_an_operator_sees_it(world: World) -> None:
    assert says("plan", "show") == "there is no plan yet: one is made within five minutes once a campaign is sending or scheduled\n"
    for key in ("s1", "s2"):
        world.set_server(key, heartbeat_at=dt.datetime.now(dt.UTC))
    add_campaign(world, "big", 72_000)
    planning.make(world.engine, world.settings)
    shown = says("plan", "show")
    assert shown.startswith("plan 1 of ")
    assert " big 1 72,000 " in shown
    assert "google: the rate of 2 servers" in shown
    kept = json.loads(says("plan", "show", "--json"))
    assert {found["campaign"] for found in kept["campaigns"]} == {"spring", "big"}
    answers = says("plan", "what-if", "--servers", "+3", "--campaign", "big")
    assert answers.startswith("big: finishes ")
    assert "with 3 more warm servers " in answers
    (answer,) = json.loads(says("plan", "what-if", "--servers", "3", "--campaign", "big", "--json"))
    assert answer["finish_with"] < answer["finish_at"]
    soon = (dt.datetime.now(dt.UTC) + dt.timedelta(hours=6)).isoformat()
    assert " it needs 2 more warm servers; " in says("plan", "what-if", "--finish-by", soon, "--campaign", "big")
    add_campaign(world, "hopeless", 10_000, finish_by=dt.datetime.now(dt.UTC) + dt.timedelta(minutes=1))
    planning.make(world.engine, world.settings)
    assert "hopeless: no number of servers would save its deadline (google: " in says("plan", "show")


def test_the_asset_puts_a_plan_into_force_and_shows_it(world: World) -> None:
    for key in ("s1", "s2"):
        world.set_server(key, heartbeat_at=dt.datetime.now(dt.UTC))
    add_campaign(world, "big", 72_000, finish_by=dt.datetime.now(dt.UTC) + dt.timedelta(hours=3))
    result = dg.materialize([capacity_plan], resources={"database": CentralDatabase()})
    (event,) = result.asset_materializations_for_node("capacity_plan")
    shown = {key: value.value for key, value in event.metadata.items()}
    assert shown["planned_messages"] == 72_000 + 40
    assert shown["late_messages"] > 40_000
    assert "| big | normal | 72,000 |" in str(shown["campaigns"])
    assert "| big | 5 | " in str(shown["servers_missing_now"])
    assert str(shown["servers_to_order"]).startswith("| pool | servers | order by | due |")
    assert str(shown["plan_and_reality"]).startswith("![Messages an hour, sent and planned](data:image/png;base64,")
    with reading(world.engine) as connection:
        assert connection.execute(sa.select(SyncState.version).where(SyncState.source == "capacity", SyncState.key == "plan")).scalar_one() == 1
        current = slot_at(database_now(connection))
        assert connection.execute(sa.select(sa.func.sum(Allotment.planned)).where(Allotment.slot_start >= current)).scalar_one() > 0
