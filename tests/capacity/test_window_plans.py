"""Planning with send windows: nothing is granted while nobody's window is open, and all is sent where there is room for it in them."""

from __future__ import annotations

import datetime as dt
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import hypothesis
import pytest
import sqlalchemy as sa
from hypothesis import strategies as st

from mail_pipelines.benchmarks.plan import lower_bound
from mail_pipelines.campaigns.send_window import SendWindow
from mail_pipelines.capacity import allotments, demand, in_force, planning
from mail_pipelines.capacity.demand import Demand, Job
from mail_pipelines.capacity.forecast import forecasts, orders
from mail_pipelines.capacity.horizon import HOUR, Horizon
from mail_pipelines.capacity.lines import Line
from mail_pipelines.capacity.near import NearPlan, near_plan
from mail_pipelines.database.engine import reading, transact
from mail_pipelines.database.models import Allotment, CampaignCounter, State, WindowRows, WindowSpan
from mail_pipelines.delivery.recording import slot_at
from tests.capacity import cases
from tests.capacity.cases import NOW
from tests.dispatch.world import World, make_world

EXAMPLES = hypothesis.settings(max_examples=40, deadline=None)
QUARTER = 900
OFFICE = {"from": "09:00", "until": "18:00", "days": ["mon", "tue", "wed", "thu", "fri"], "zone": "Europe/Berlin"}


@st.composite
def spans(draw: st.DrawFn, most: int) -> tuple[tuple[int, int], ...]:
    """When a window is open within the horizon: on quarters of an hour of a zone, and on odd minutes."""
    odd = draw(st.sampled_from((0, 0, 420)))
    edges = sorted(draw(st.sets(st.integers(-8, 190), min_size=2, max_size=2 * most)))
    start = NOW // QUARTER * QUARTER + odd
    return tuple((start + opens * QUARTER, start + closes * QUARTER) for opens, closes in zip(edges[::2], edges[1::2], strict=False))


@st.composite
def windowed(draw: st.DrawFn) -> tuple[list[Job], list[Demand]]:
    """Campaigns of which some have windows in up to three zones."""
    jobs, demands = draw(cases.mailings())
    found: list[Demand] = []
    for one in demands:
        if draw(st.booleans()):
            found += [replace(one, rows=draw(st.integers(1, 1_500)), release=0, spans=draw(spans(3))) for _ in range(draw(st.integers(1, 3)))]
        else:
            found.append(one)
    return jobs, found


def outside(plan: NearPlan) -> list[str]:
    """Messages in slots in which their window is not open at all, or more than fit into the part of a slot in which it is."""
    found = []
    for part in plan.providers:
        for one, placed in zip(part.demands, part.placed.sum(axis=2).tolist(), strict=True):
            for slot, count in zip(plan.horizon.slots, placed, strict=True):
                if not count or one.spans is None:
                    continue
                seconds = sum(end - begin for begin, end in plan.horizon.within(slot, one.spans))
                fits = sum(line.per_second for line in part.lines) * seconds
                if count > fits + 1e-6:
                    found.append(f"{count} of {one} in {slot}, open {seconds} s")
    return found


@EXAMPLES
@hypothesis.given(windowed(), cases.fleets(), st.sampled_from((20.0, 0.0)))
def test_nothing_is_granted_while_no_window_is_open(mailing: tuple[list[Job], list[Demand]], fleet: list[Line], seconds: float) -> None:
    """Whether the solver has its time or not; nor is any limit exceeded."""
    jobs, demands = mailing
    plan = near_plan(jobs, demands, fleet, NOW, seconds=seconds)
    assert outside(plan) == []
    assert cases.exceeded(plan, fleet) == []
    assert all((part.unmet >= 0).all() for part in plan.providers)


@EXAMPLES
@hypothesis.given(windowed(), cases.fleets(), st.sampled_from((20.0, 0.0)))
def test_all_is_sent_where_windows_leave_room_for_all(mailing: tuple[list[Job], list[Demand]], fleet: list[Line], seconds: float) -> None:
    """With a server that can send everything in five minutes; what has no opening within the horizon is not met."""
    jobs, demands = mailing
    plenty = [Line(99, pool, provider, 100.0) for pool in (1, 2) for provider in cases.PROVIDERS]
    plan = near_plan(jobs, demands, [*fleet, *plenty], NOW, seconds=seconds)
    for part in plan.providers:
        for one, unmet in zip(part.demands, part.unmet.tolist(), strict=True):
            most = max((sum(end - begin for begin, end in plan.horizon.within(slot, one.spans or ((0, 1 << 40),))) for slot in plan.horizon.slots), default=0)
            # So long that even all demand together fits.
            assert unmet == 0 or most < 300, one


def test_the_window_is_the_bottleneck_where_it_is_and_the_end_lies_in_it() -> None:
    job = Job(1, "spring", 1, 1)
    opens = NOW + 6 * HOUR + 1_200
    fleet = [Line(1, 1, "google", 1.0)]
    # It opens in six hours and twenty minutes, and ten minutes are enough then.
    plan = near_plan([job], [Demand(job, "google", 600, spans=((opens, opens + HOUR),))], fleet, NOW)
    (found,) = forecasts(plan)
    assert found.bottleneck == "google: the send window"
    assert found.finish_at is not None
    assert opens + 500 < dt.datetime.fromisoformat(found.finish_at).timestamp() < opens + 1_100
    (slow,) = forecasts(near_plan([job], [Demand(job, "google", 6_000, spans=((NOW - HOUR, NOW + 9 * HOUR),))], fleet, NOW))
    assert slow.bottleneck == "google: the rate of 1 server"
    (never,) = forecasts(near_plan([job], [Demand(job, "google", 6, spans=())], fleet, NOW))
    assert (never.finish_at, never.unmet, never.bottleneck) == (None, 6, "google: the send window")


def test_what_is_left_is_out_in_a_later_opening() -> None:
    job, fleet, hour = Job(1, "spring", 1, 1), [Line(1, 1, "google", 1.0)], NOW // HOUR

    def earliest(rows: int, *zones: tuple[tuple[int, int], ...]) -> tuple[int, float]:
        """Hours are those from now on."""
        spans = [tuple(((hour + opens) * HOUR, (hour + closes) * HOUR) for opens, closes in zone) for zone in zones]
        (found,) = forecasts(near_plan([job], [Demand(job, "google", rows, spans=one) for one in spans], fleet, NOW))
        assert found.earliest is not None
        return found.unmet, dt.datetime.fromisoformat(found.earliest).timestamp() / HOUR - hour

    # 3,600 messages in each of the two openings that are planned, half as many in the third; or all in the third.
    assert earliest(9_000, ((20, 21), (44, 45))) == (1_800, 68.5)
    assert earliest(10_800, ((20, 21), (44, 45))) == (3_600, 69)
    # Of two zones one opens when the other closes.
    assert earliest(9_000, ((20, 21), (44, 45)), ((21, 22), (45, 46))) == (3_600, 69)
    # No opening on the second day.
    assert earliest(9_000, ((20, 21),)) == (5_400, 68.5)
    # One goes on after the horizon.
    assert earliest(9_000, ((47, 57),)) == (5_400, 49.5)


def test_what_cannot_be_beaten_waits_for_the_opening_as_well() -> None:
    job, opens = Job(1, "spring", 1, 1), (NOW // HOUR + 20) * HOUR
    plan = near_plan([job], [Demand(job, "google", 600, spans=((opens, opens + HOUR),))], [Line(1, 1, "google", 1.0)], NOW)
    assert lower_bound(plan) == opens + 600


def test_servers_for_a_deadline_are_wanted_from_the_opening_of_its_window_on() -> None:
    """New servers have until then, as for a campaign that is scheduled for that moment: the days of their warm-up are counted from there."""
    opens = NOW + 30 * HOUR
    job = Job(1, "spring", 1, 1, finish_by=opens + HOUR)
    fleet = [Line(1, 1, "google", 1.0)]
    plan = near_plan([job], [Demand(job, "google", 9_000, spans=((NOW - 9 * HOUR, NOW - HOUR), (opens, opens + 8 * HOUR)))], fleet, NOW)
    begins = []

    def more(count: int, pool_ids: Sequence[int], providers: Sequence[str], begin: int) -> list[Line]:
        begins.append(begin)
        return [Line(-number, 1, "google", 1.0) for number in range(1, count + 1)]

    (order,) = orders(plan, more, fleet, forecasts(plan))
    assert set(begins) == {opens}
    assert order.servers == 2


def test_parts_of_slots() -> None:
    horizon = Horizon.of(NOW)
    first = horizon.slots[0]
    parts = horizon.open_parts(((NOW - 5_000, NOW + 120), (first.end + 300, first.end + 600)))
    assert parts[0] == pytest.approx(120 / (first.end - NOW))
    assert parts[1] == pytest.approx(300 / 900)
    assert sum(parts[2:]) == 0


@pytest.fixture
def world(engine: sa.Engine, tmp_path: Path) -> World:
    """A server that speaks and a campaign with 40 rows for four providers, with a window in two zones and its own."""
    moment = dt.datetime(2026, 3, 2, 9, 7, tzinfo=dt.UTC)
    world = make_world(engine, tmp_path / "home", recipients=40)
    world.server("s1", per_second=1.0)
    world.set_server("s1", heartbeat_at=moment)
    world.set_campaign(send_window=OFFICE)
    window = SendWindow.from_document(OFFICE)
    end = int(moment.timestamp()) + 48 * HOUR

    def work(connection: sa.Connection) -> None:
        for name in ("", "Europe/Berlin", "Asia/Kolkata", "America/New_York"):
            found = [*window.spans(name or window.zone, int(moment.timestamp()) - HOUR, end), (end + 1, end + 1)]
            rows = [{"campaign_id": 1, "time_zone": name, "opens_at": opens, "closes_at": closes} for opens, closes in found]
            connection.execute(sa.insert(WindowSpan), rows)

    transact(engine, work)
    return world


def put_off(world: World, rows: dict[tuple[str, str], int], deferred: int) -> None:
    """Of google so many rows in each zone by opening ("09:00" today), and so many of the ten counted as deferred."""

    def work(connection: sa.Connection) -> None:
        for (zone, clock), count in rows.items():
            opening = int(dt.datetime.fromisoformat(f"2026-03-02T{clock}:00+00:00").timestamp())
            connection.execute(sa.insert(WindowRows).values(campaign_id=1, provider="google", time_zone=zone, opens_at=opening, count=count))
        google = (CampaignCounter.provider == "google", CampaignCounter.state == int(State.PENDING))
        connection.execute(sa.update(CampaignCounter).where(*google).values(count=10 - deferred))
        connection.execute(sa.insert(CampaignCounter).values(campaign_id=1, shard=0, provider="google", server_id=0, state=int(State.DEFERRED), count=deferred))

    transact(world.engine, work)


def test_demand_is_released_by_hour_and_open_rows_are_shared_among_open_zones(world: World) -> None:
    """Half past two in Kolkata, ten in Berlin, four in the morning in New York, where three rows wait for nine o'clock."""
    put_off(world, {("America/New_York", "14:00"): 3, ("Europe/Berlin", "08:07"): 8, ("Asia/Kolkata", "08:07"): 4}, deferred=3)
    now = dt.datetime(2026, 3, 2, 9, 7, tzinfo=dt.UTC)
    with reading(world.engine) as connection:
        (job,), demands = demand.read(connection, now, 48 * HOUR, 60)
    google = {one.spans: one.rows for one in demands if one.provider == "google"}
    closes = {spans[0][1] - int(now.timestamp()): rows for spans, rows in google.items() if spans}
    # Kolkata closes at 12:30 UTC, Berlin at 17:00, New York at 23:00.
    assert {round(seconds / HOUR, 2): rows for seconds, rows in closes.items()} == {3.38: 2, 7.88: 5, 13.88: 3}
    assert sum(google.values()) == 10
    assert job.key == "spring"


def test_grants_are_given_neither_by_plan_nor_by_tick_while_all_wait_for_their_opening(world: World) -> None:
    put_off(world, {("America/New_York", "14:00"): 10}, deferred=10)
    now = dt.datetime(2026, 3, 2, 9, 7, tzinfo=dt.UTC)
    planning.make(world.engine, world.settings, now)
    allotments.fill(world.engine, 10.0, now)

    def granted(provider: str) -> int:
        with reading(world.engine) as connection:
            query = sa.select(sa.func.coalesce(sa.func.sum(Allotment.granted), 0)).where(Allotment.provider == provider)
            return int(connection.execute(query).scalar_one())

    assert granted("google") == 0
    with reading(world.engine) as connection:
        kept = in_force.read(connection)
    assert kept is not None
    (found,) = kept.document["campaigns"]
    assert found["bottleneck"] == "google: the send window"
    assert found["finish_at"].startswith("2026-03-02T14:00")
    later = dt.datetime(2026, 3, 2, 13, 50, tzinfo=dt.UTC)
    world.set_server("s1", heartbeat_at=later)
    allotments.fill(world.engine, 10.0, later)
    with reading(world.engine) as connection:
        slots = connection.execute(sa.select(Allotment.slot_start).where(Allotment.provider == "google", Allotment.granted > 0)).scalars().all()
    assert set(slots) <= {slot_at(later), slot_at(later) + QUARTER}
    assert slot_at(later) + QUARTER in slots
