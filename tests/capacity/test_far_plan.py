"""The far plan orders servers when it is time: no later than they can be warm, no sooner than they must, and not for a whim."""

from __future__ import annotations

import datetime as dt
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import hypothesis
import numpy as np
import pytest
import sqlalchemy as sa
from hypothesis import strategies as st

from mail_pipelines.campaigns.send_window import SendWindow
from mail_pipelines.capacity import outlook, planning
from mail_pipelines.capacity.far import FarOrder, InFlight, Outlook, Policy, far_plan, shortages
from mail_pipelines.capacity.fleet import Fleet, Limits, Member
from mail_pipelines.capacity.horizon import DAYS
from mail_pipelines.capacity.new_servers import HostSources, NewServer, NextSource, new_server, of_curve
from mail_pipelines.capacity.outlook import Mailing
from mail_pipelines.database.engine import reading, transact
from mail_pipelines.database.models import Campaign, Provision, State
from mail_pipelines.delivery import counters
from mail_pipelines.dispatch import holds, servers
from mail_pipelines.provisioning import store
from tests.dispatch.world import make_world

TODAY = dt.date(2026, 3, 2)
NEW = new_server()


def day(number: int) -> dt.date:
    return TODAY + dt.timedelta(days=number)


def pool(demand: Mapping[int, float], every_day: float = 0.0, capacity: float = 10_000.0, warm: float = 100_000.0) -> Outlook:
    """A pool with messages for google on these days."""
    daily = np.full(DAYS, every_day)
    for number, messages in demand.items():
        daily[number] += messages
    return Outlook("default", {"google": daily}, {"google": np.full(DAYS, capacity)}, {"google": warm})


def late(found: Outlook, orders: list[FarOrder]) -> float:
    flights = [InFlight(order.pool, order.servers, order.first_day, NEW) for order in orders]
    return sum(float(days.sum()) for days in shortages(found, flights, TODAY, Policy()).values())


def test_a_new_server_is_worth_what_its_curve_allows() -> None:
    """About 500 messages on its first day, 16 thousand in eight days, 185 thousand in fifteen."""
    assert NEW.per_day[0] == 480
    assert 16_000 < sum(NEW.per_day[:8]) < 17_000
    assert 185_000 < sum(NEW.per_day[:15]) < 186_000
    assert (NEW.cap(-1, 1e6), NEW.cap(0, 1e6), NEW.cap(400, 1e6), NEW.cap(20, 100.0)) == (0.0, 480, 1e6, 100.0)
    assert NEW.first_day(dt.date(2026, 11, 30)) == dt.date(2026, 12, 4)


@pytest.mark.parametrize(("curve", "caps"), [("", ()), ("normal", (500, 1000, 2000)), ("manual", NEW.per_day[:3])])
def test_a_new_server_is_worth_what_its_source_says(curve: str, caps: tuple[int, ...]) -> None:
    """Of one whose steps an operator takes nobody knows when: no more than of a careful one."""
    found = HostSources(NextSource(curve, 0.1)).new_server
    assert (found.lead_days, found.per_day[:3]) == (NEW.lead_days, caps)
    assert HostSources().new_server == NEW


def test_servers_that_are_warm_at_once_are_ordered_later_than_those_that_are_warmed_up() -> None:
    found = pool({40: 60_000})
    (careful,), (warm,) = (far_plan([found], TODAY, of_curve(curve)) for curve in ("careful", ""))
    assert careful.order_by < warm.order_by == day(40 - NEW.lead_days)
    assert (careful.left, warm.left) == (0, 0)


def test_nothing_is_ordered_where_all_can_be_sent() -> None:
    assert far_plan([pool({20: 9_000, 21: 11_000})], TODAY, NEW) == []
    # It may wait for a day.
    assert far_plan([pool({20: 19_999})], TODAY, NEW) == []


def test_an_order_is_given_in_time_for_servers_to_be_warm_and_not_sooner() -> None:
    found = pool({40: 60_000})
    (order,) = far_plan([found], TODAY, NEW)
    assert (order.servers, order.left, order.due) == (1, 0, False)
    assert late(found, []) > 0
    assert late(found, [order]) == 0
    later = replace(order, first_day=order.first_day + dt.timedelta(days=1))
    assert late(found, [later]) > 0
    assert TODAY < order.order_by < day(40 - NEW.lead_days)
    assert order.why == f"google: 60,000 messages come up on {day(40)}, of which the pool sends 10,000 a day"


def test_fewer_days_take_more_servers_and_too_few_days_leave_something_late() -> None:
    counts = [far_plan([pool({number: 60_000})], TODAY, NEW)[0] for number in (30, 16, 13)]
    assert [order.left for order in counts] == [0, 0, 0]
    assert [order.servers for order in counts] == sorted(order.servers for order in counts)
    assert counts[0].servers < counts[-1].servers
    (hopeless,) = far_plan([pool({5: 60_000})], TODAY, NEW)
    assert hopeless.order_by == TODAY
    assert 0 < hopeless.left < hopeless.short
    # Nothing that is ordered today sends on the third day: better to order nothing.
    assert far_plan([pool({1: 25_000})], TODAY, NEW) == []


def test_servers_on_their_way_count() -> None:
    found = pool({40: 60_000})
    assert far_plan([found], TODAY, NEW, [InFlight("default", 1, day(4), NEW)]) == []
    assert len(far_plan([found], TODAY, NEW, [InFlight("other", 1, day(4), NEW)])) == 1


def test_servers_on_their_way_count_by_the_curve_of_the_source_they_come_from() -> None:
    """Whatever the next source is: six days after it is there a warm server sends all of it, and one that is warmed up carefully does not."""
    found = pool({10: 60_000})
    careful, warm = of_curve("careful"), of_curve("")
    assert far_plan([found], TODAY, careful, [InFlight("default", 1, day(4), warm)]) == []
    (order,) = far_plan([found], TODAY, warm, [InFlight("default", 1, day(4), careful)])
    assert (order.servers, order.left) == (1, 0)


def test_a_server_that_takes_longer_to_make_than_it_should_has_not_sent_meanwhile() -> None:
    asked_for = [TODAY - dt.timedelta(days=days) for days in (0, 2, 3, 30)]
    assert [InFlight.being_made("default", NEW, asked, TODAY).first_day for asked in asked_for] == [day(4), day(2), day(1), day(1)]


def test_an_order_is_due_when_it_has_stood_for_a_day_and_its_time_has_come() -> None:
    found = pool({13: 60_000})
    (first,) = far_plan([found], TODAY, NEW)
    assert (first.order_by, first.due, first.since) == (TODAY, False, TODAY)
    shifted = pool({12: 60_000})
    (second,) = far_plan([shifted], day(1), NEW, previous=[first])
    assert (second.due, second.since) == (True, TODAY)
    (early,) = far_plan([pool({40: 60_000})], day(1), NEW, previous=[first])
    assert not early.due


def test_one_server_less_is_no_reason_to_change_ones_mind() -> None:
    (order,) = far_plan([pool({13: 60_000})], TODAY, NEW)
    before = replace(order, servers=order.servers + 1)
    assert far_plan([pool({13: 60_000})], TODAY, NEW, previous=[before])[0].servers == order.servers + 1
    before = replace(order, servers=order.servers + 2)
    assert far_plan([pool({13: 60_000})], TODAY, NEW, previous=[before])[0].servers == order.servers


def test_the_budget_is_kept_with_what_is_on_its_way() -> None:
    found = pool({13: 2_000_000})
    policy = Policy(most_servers=5)
    assert sum(order.servers for order in far_plan([found, replace(found, pool="b")], TODAY, NEW, policy=policy)) <= 5
    assert sum(order.servers for order in far_plan([found], TODAY, NEW, [InFlight("b", 3, day(2), NEW)], policy=policy)) <= 2
    assert far_plan([found], TODAY, NEW, [InFlight("b", 5, day(2), NEW)], policy=policy) == []


@hypothesis.settings(max_examples=40)
@hypothesis.given(st.dictionaries(st.integers(0, DAYS - 1), st.floats(0, 400_000), max_size=5), st.floats(0, 12_000), st.integers(0, 6), st.integers(1, 8))
def test_orders_never_make_it_worse_nor_cost_more_than_allowed(demand: Mapping[int, float], every_day: float, lead: int, most: int) -> None:
    found = pool(demand, every_day)
    new = NewServer(lead, NEW.per_day)
    policy = Policy(most_servers=most)
    orders = far_plan([found], TODAY, new, policy=policy)
    assert sum(order.servers for order in orders) <= most
    assert late(found, orders) <= late(found, [])
    for order in orders:
        assert order.servers > 0
        assert order.left < order.short
        assert order.order_by >= TODAY
        assert order.first_day == new.first_day(order.order_by)


def test_the_trend_goes_on_as_the_last_weeks_did() -> None:
    weeks = np.zeros((4, 7))
    weeks[:, 2] = 1_000
    ahead = outlook.trend(weeks.ravel())
    assert ahead[2] == ahead[9] == 1_000
    assert ahead[3] == 0
    weeks[2:, 2] = 1_100
    rising = outlook.trend(weeks.ravel())
    assert rising[9] / rising[2] == pytest.approx(1.1**0.5)
    # Not without end: no more than a tenth a week.
    weeks[2:, 2] = 5_000
    assert outlook.trend(weeks.ravel())[9] / outlook.trend(weeks.ravel())[2] == pytest.approx(1.1)
    # An installation that began last week has no empty weeks before.
    weeks[:3] = 0
    assert outlook.trend(weeks.ravel())[2] == 5_000


def test_the_calendar_counts_where_it_says_more_than_the_trend() -> None:
    past = [Mailing(1, day(-7 * week), {"google": 1_000}) for week in range(1, 5)]
    coming = [Mailing(1, day(7), {"google": 400}), Mailing(1, day(8), {"google": 5_000, "yahoo": 7})]
    found = outlook.outlook_of(past, coming, TODAY)
    assert found["google"][[0, 1, 7, 8, 9]].tolist() == [1_000, 0, 1_000, 5_000, 0]
    assert found["yahoo"].sum() == 7


OFFICE = SendWindow(9 * 60, 18 * 60, (0, 1, 2, 3, 4), "UTC")


def a_fleet(per_second: float, per_day: int | None = None) -> Fleet:
    """One server of pool 1, and what a warm one more may send."""
    limits = dict.fromkeys(((1, "google"), (0, "google")), Limits(per_second, None, (per_day,)))
    return Fleet([Member(1, 1, speaks=True)], holds.InForce(()), {}, {}, limits, {}, 0)


def windowed(rows: int, first: int, window: SendWindow | None, fleet: Fleet) -> Outlook:
    return outlook.of_pool(1, "default", [], [Mailing(1, day(first), {"google": rows}, window)], TODAY, fleet)


def test_a_day_counts_only_the_hours_in_which_a_campaign_may_be_sent() -> None:
    """A message a second is 86,400 a day, and 32,400 in nine hours: of which a campaign may take two days."""
    fleet = a_fleet(1.0)
    assert far_plan([windowed(80_000, 28, None, fleet)], TODAY, NEW) == []
    assert far_plan([windowed(64_000, 28, OFFICE, fleet)], TODAY, NEW) == []
    (order,) = far_plan([windowed(80_000, 28, OFFICE, fleet)], TODAY, NEW)
    assert "of which the pool sends 32,400 a day in their send windows" in order.why
    assert (order.servers, order.left) == (1, 0)
    # Where the limit of the day is less than the window lets through, a window costs nothing.
    capped = a_fleet(1.0, per_day=30_000)
    assert windowed(80_000, 28, OFFICE, capped).within[0].capacity["google"][28] == 30_000


def test_days_on_which_no_window_opens_try_nobodys_patience() -> None:
    """What comes up on a Friday has that day and Monday; on a Saturday, Monday and Tuesday."""
    fleet = a_fleet(1.0)
    friday = next(number for number in range(28, 35) if day(number).weekday() == 4)
    for first in (friday, friday + 1):
        assert far_plan([windowed(64_000, first, OFFICE, fleet)], TODAY, NEW) == []
        assert far_plan([windowed(67_000, first, OFFICE, fleet)], TODAY, NEW) != []


def test_windows_are_looked_at_together_with_narrower_ones_and_with_what_has_none() -> None:
    """Each alone has room for it."""
    fleet = a_fleet(1.0)
    evening, rows = SendWindow(17 * 60, 20 * 60, (0, 1, 2, 3, 4, 5, 6), "UTC"), {"google": 50_000}
    alone = [Mailing(1, day(28), {"google": 20_000}, evening), Mailing(1, day(28), rows, OFFICE), Mailing(1, day(28), {"google": 160_000})]
    for mailing in alone:
        assert far_plan([outlook.of_pool(1, "default", [], [mailing], TODAY, fleet)], TODAY, NEW) == []
    found = outlook.of_pool(1, "default", [], alone, TODAY, fleet)
    assert [view.demand["google"][28] for view in found.views] == [230_000, 20_000, 70_000]
    for some in (alone[:2], alone[1:]):
        assert far_plan([outlook.of_pool(1, "default", [], some, TODAY, fleet)], TODAY, NEW) != []


def test_the_part_of_each_day_in_which_a_window_is_open() -> None:
    """In Berlin, which is an hour ahead of UTC and from 29 March on two; a night belongs to two days."""
    parts = outlook.open_parts(replace(OFFICE, zone="Europe/Berlin"), TODAY)
    assert [round(part * 24, 6) for part in parts[:7]] == [9, 9, 9, 9, 9, 0, 0]
    night = outlook.open_parts(SendWindow(22 * 60, 6 * 60, (0,), "UTC"), TODAY)
    assert [round(part * 24, 6) for part in night[:8]] == [2, 6, 0, 0, 0, 0, 0, 2]
    berlin = outlook.open_parts(SendWindow(0, 60, tuple(range(7)), "Europe/Berlin"), TODAY)
    # At 23:00 UTC, later at 22:00.
    assert {round(part * 24, 6) for part in berlin} == {1.0}


def test_the_far_plan_is_made_with_the_near_one_and_kept(engine: sa.Engine, tmp_path: Path) -> None:
    """A campaign in two weeks like one of last week, which took the only server three days."""
    world = make_world(engine, tmp_path / "home", recipients=40)
    now = dt.datetime(2026, 3, 2, 9, 0, tzinfo=dt.UTC)
    world.server("s1", per_second=1.0)
    world.set_server("s1", heartbeat_at=now)
    servers.set_limits(world.engine, "s1", "*", {"per_second": 1.0, "per_day": 40_000})

    def mailings(connection: sa.Connection) -> None:
        row = dict(connection.execute(sa.select(Campaign.__table__).where(Campaign.id == 1)).mappings().one())
        segments = {"include": ["buyers"], "exclude": []}
        last = {"id": 2, "key": "last", "state": "finished", "started_at": now - dt.timedelta(days=40), "audience_counts": {"audience": 120_000}}
        coming = {"id": 3, "key": "next", "state": "scheduled", "start_at": now + dt.timedelta(days=20), "started_at": None, "audience_counts": None}
        for values in (last, coming):
            connection.execute(sa.insert(Campaign).values(row | {"segments": segments} | values))
        counters.add(connection, 2, 0, Counter({(0, "google", State.DELIVERED, ""): 120_000}), now)

    transact(world.engine, mailings)
    with reading(world.engine) as connection:
        (found,) = outlook.read(connection, Fleet.read(connection, now, 10), now)
    assert found.demand["google"][20] == 120_000
    assert found.capacity["google"][0] == 40_000
    (order,) = planning.make(world.engine, world.settings, now).document["far"]
    assert (order["pool"], order["servers"] > 0, order["left"], order["due"]) == ("default", True, 0, False)
    tomorrow = now + dt.timedelta(days=1)
    (again,) = planning.make(world.engine, world.settings, tomorrow).document["far"]
    assert again["since"] == "2026-03-02"

    # Servers that are being made are on order.
    def order_all(connection: sa.Connection) -> None:
        for _ in range(order["servers"]):
            key = store.request(connection, world.settings.provisioning, "short").key
            connection.execute(sa.update(Provision).where(Provision.key == key).values(requested_at=tomorrow))

    transact(world.engine, order_all)
    # One of them is registered already.
    world.server("mx1")
    world.set_server("mx1", state="provisioning")
    assert planning.make(world.engine, world.settings, tomorrow).document["far"] == []
    # By the source that each comes from, if it has one already.
    transact(world.engine, lambda connection: connection.execute(sa.update(Provision).where(Provision.key != "mx1").values(source="rack")))
    sources = HostSources(NextSource("", 0.1), {"rack": "normal"})
    with reading(world.engine) as connection:
        flights = outlook.in_flight(connection, sources, tomorrow.date())
    assert [flight.new_server for flight in flights] == [of_curve(""), *[of_curve("normal")] * (order["servers"] - 1)]
