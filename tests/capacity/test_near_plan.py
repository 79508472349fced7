"""The near plan keeps every limit, sends all that can be sent, and is as good as the best there is where that can be found."""

from __future__ import annotations

import datetime as dt
import functools
import itertools
import json
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from mail_pipelines.benchmarks import plan as bench
from mail_pipelines.capacity import aggregate
from mail_pipelines.capacity.demand import Demand, Job
from mail_pipelines.capacity.forecast import forecasts
from mail_pipelines.capacity.horizon import DAY, HOUR, Horizon
from mail_pipelines.capacity.lines import Line, Rooms
from mail_pipelines.capacity.near import NearPlan, near_plan
from mail_pipelines.capacity.placing import split
from tests.capacity import cases
from tests.capacity.cases import NOON, NOW

EXAMPLES = hypothesis.settings(max_examples=40)
# A job that nobody may send is no matter of the plan.
NEVER = float("inf")


def finish(plan: NearPlan, job: Job) -> float:
    found = plan.finish(job.id)
    return NEVER if found is None else found


def sent(plan: NearPlan) -> int:
    return sum(int(part.placed.sum()) for part in plan.providers)


@EXAMPLES
@hypothesis.given(cases.mailings(), cases.fleets(), st.sampled_from((20.0, 0.0)))
def test_no_grant_exceeds_a_limit(mailing: tuple[list[Job], list[Demand]], fleet: list[Line], seconds: float) -> None:
    """Whether the solver has its time or not."""
    jobs, demands = mailing
    plan = near_plan(jobs, demands, fleet, NOW, seconds=seconds)
    assert cases.exceeded(plan, fleet) == []
    for part in plan.providers:
        assert (part.placed >= 0).all()
        assert (part.unmet >= 0).all()
        for demand, placed in zip(part.demands, part.placed, strict=True):
            assert not placed[: plan.horizon.first_from(demand.release)].any()
            pools = {part.lines[number].pool_id for number in np.flatnonzero(placed.sum(axis=0))}
            assert pools <= {demand.job.pool_id, demand.job.overflow_pool_id}


@EXAMPLES
@hypothesis.given(cases.mailings(), cases.fleets(), st.sampled_from((20.0, 0.0)))
def test_all_is_sent_where_there_is_room_for_all(mailing: tuple[list[Job], list[Demand]], fleet: list[Line], seconds: float) -> None:
    """With a server that may send as much as it can, from the first slot in which all demand is known."""
    jobs, demands = mailing
    plenty = [Line(99, pool, provider, 5.0) for pool in (1, 2) for provider in cases.PROVIDERS]
    plan = near_plan(jobs, demands, [*fleet, *plenty], NOW, seconds=seconds)
    assert sent(plan) == sum(demand.rows for demand in demands)
    assert all(plan.finish(job.id) is not None for job in jobs)


@EXAMPLES
@hypothesis.given(cases.mailings(), cases.fleets(), st.integers(1, 100), st.sampled_from((20.0, 0.0)))
def test_all_is_sent_up_to_what_all_limits_leave(mailing: tuple[list[Job], list[Demand]], fleet: list[Line], percent: int, seconds: float) -> None:
    """As much demand as such a part of what one pool can send in all, up to the last message of it."""
    jobs = [replace(job, pool_id=1, overflow_pool_id=None) for job in mailing[0]]
    lines = [replace(line, pool_id=1) for line in fleet]
    demands = []
    for provider in cases.PROVIDERS:
        most = int(Rooms.of([line for line in lines if line.provider == provider], Horizon.of(NOW)).soonest.sum())
        wanted = most * percent // 100
        shares = split(wanted, np.full(len(jobs), wanted, dtype=np.int64)).tolist()
        demands += [Demand(job, provider, rows) for job, rows in zip(jobs, shares, strict=True) if rows]
    plan = near_plan(jobs, demands, lines, NOW, seconds=seconds)
    assert sent(plan) == sum(demand.rows for demand in demands)
    assert cases.exceeded(plan, lines) == []


def test_no_message_is_lost_between_campaigns_that_share_all_there_is() -> None:
    """Each has a third of every slot, which is no whole number of messages."""
    jobs = [Job(number, f"c{number}", 0, 1, None, NOW - number, None) for number in (1, 2, 3)]
    lines = [Line(1, 1, "google", 0.01)]
    most = int(Rooms.of(lines, Horizon.of(NOW)).soonest.sum())
    demands = [Demand(job, "google", rows) for job, rows in zip(jobs, split(most, np.full(3, most, dtype=np.int64)).tolist(), strict=True)]
    assert sent(near_plan(jobs, demands, lines, NOW)) == most


@EXAMPLES
@hypothesis.given(cases.mailings(), cases.fleets(), st.lists(st.integers(0, 800), min_size=16, max_size=16), st.sampled_from((20.0, 0.0)))
def test_what_is_frozen_only_falls(mailing: tuple[list[Job], list[Demand]], fleet: list[Line], before: list[int], seconds: float) -> None:
    """Whether the solver has its time or not, and whatever did not fit into the slot before."""
    jobs, demands = mailing
    slots = Horizon.of(NOW).slots[: aggregate.FROZEN_SLOTS]
    places = [(job.id, provider, slot.start) for job in jobs for provider in cases.PROVIDERS for slot in slots]
    previous = dict(zip(places, before, strict=False))
    plan = near_plan(jobs, demands, fleet, NOW, previous, seconds)
    for part in plan.providers:
        planned = Counter[tuple[int, str, int]]()
        for demand, placed in zip(part.demands, part.placed.sum(axis=2).tolist(), strict=True):
            planned.update({(demand.job.id, part.provider, slot.start): count for slot, count in zip(slots, placed, strict=False)})
        assert [place for place, count in planned.items() if count > previous[place]] == []


@EXAMPLES
@hypothesis.given(cases.mailings(), cases.fleets(3), st.sampled_from((0.1, 1.0)), st.sampled_from((1, 2)))
def test_another_server_never_delays_the_most_urgent(mailing: tuple[list[Job], list[Demand]], fleet: list[Line], rate: float, pool: int) -> None:
    """When the last campaign of the highest class ends, that is: among themselves they are in the order of their deadlines."""
    jobs = [replace(job, overflow_pool_id=None) for job in mailing[0]]
    by_id = {job.id: job for job in jobs}
    demands = [replace(demand, job=by_id[demand.job.id]) for demand in mailing[1]]
    urgent = [job for job in jobs if job.priority == max(job.priority for job in jobs)]
    more = [*fleet, *(Line(99, pool, provider, rate) for provider in cases.PROVIDERS)]
    before, after = near_plan(jobs, demands, fleet, NOW), near_plan(jobs, demands, more, NOW)
    # Whole messages: a share of a slot may be one message off, which is as long as the slowest server takes for one.
    message = max([60.0, *(1 / (line.per_second * line.flow) for line in more)])
    for home in {job.pool_id for job in urgent}:
        ours = [job for job in urgent if job.pool_id == home]
        assert max(finish(after, job) for job in ours) <= max(finish(before, job) for job in ours) + message


@hypothesis.given(st.integers(0, 10_000), st.lists(st.integers(0, 500), min_size=1, max_size=20))
def test_a_split_fills_all_servers_to_the_same_part(amount: int, rooms: list[int]) -> None:
    room = np.array(rooms, dtype=np.int64)
    shares = split(amount, room)
    assert shares.sum() == min(amount, room.sum())
    assert (shares <= room).all()
    if room.sum():
        assert (np.abs(shares - room * min(1.0, amount / room.sum())) < 1).all()


def best_of_all(demands: Sequence[Demand], rooms: Rooms) -> tuple[int, ...]:
    """The best that any plan comes to, found by trying all of them: `worth` of it. The limits are those of one line, or there are none but those of slots."""
    slots, first = len(rooms.horizon.slots), [rooms.horizon.first_from(demand.release) for demand in demands]
    in_slot, hours, days = rooms.slot.sum(axis=0).tolist(), rooms.hour.sum(axis=0).tolist(), rooms.day.sum(axis=0).tolist()

    @functools.cache
    def rest(slot: int, left: tuple[int, ...], hour: int, day: int) -> tuple[int, ...]:
        if slot == slots or not any(left):
            return worth(demands, rooms.horizon, {slots: left})
        if slot and rooms.hour_of[slot] != rooms.hour_of[slot - 1]:
            hour = hours[rooms.hour_of[slot]]
        if slot and rooms.day_of[slot] != rooms.day_of[slot - 1]:
            day = days[rooms.day_of[slot]]
        able = [range((count if slot >= begin else 0) + 1) for count, begin in zip(left, first, strict=True)]
        found = []
        for sent in itertools.product(*able):
            if (total := sum(sent)) <= min(in_slot[slot], hour, day):
                after = rest(slot + 1, tuple(np.subtract(left, sent).tolist()), hour - total, day - total)
                found.append(tuple(np.add(worth(demands, rooms.horizon, {slot: sent}), after).tolist()))
        return min(found)

    return rest(0, tuple(demand.rows for demand in demands), hours[0], days[0])


def worth(demands: Sequence[Demand], horizon: Horizon, sent: Mapping[int, Sequence[int]]) -> tuple[int, ...]:
    """By class, the highest first: how many are late, and the sum of the slots in which all are sent; what is not sent is late, in the slot after the last."""
    late, slots = dict.fromkeys(range(4), 0), dict.fromkeys(range(4), 0)
    for slot, counts in sent.items():
        for demand, count in zip(demands, counts, strict=True):
            priority, deadline = demand.job.priority, demand.job.finish_by
            slots[priority] += slot * count
            if slot == len(horizon.slots) or (deadline is not None and horizon.slots[slot].end > deadline):
                late[priority] += count
    return tuple(value for priority in range(3, -1, -1) for value in (late[priority], slots[priority]))


# Messages in a slot, an hour and a day of one server; or in a slot of each of several.
ONE = st.tuples(st.sampled_from((1, 2, 3)), st.sampled_from((None, 2, 3, 5)), st.sampled_from((None, 4, 9))).map(lambda limits: [limits])
SEVERAL = st.lists(st.sampled_from((1, 2)), min_size=2, max_size=3).map(lambda rates: [(rate, None, None) for rate in rates])


@hypothesis.settings(max_examples=40, deadline=None)
@hypothesis.given(
    st.lists(
        st.tuples(st.sampled_from((1, 1, 2)), st.integers(1, 5), st.none() | st.integers(1, 12), st.sampled_from((0, 0, 900, 1800, HOUR))),
        min_size=1,
        max_size=3,
    ),
    ONE | SEVERAL,
)
def test_small_cases_are_as_good_as_the_best_of_all_plans(
    campaigns: list[tuple[int, int, int | None, int]], limits: list[tuple[int, int | None, int | None]]
) -> None:
    """Three hours, a few messages, and every plan there is. Without the share that every campaign gets, which is there to make it otherwise."""
    jobs = [
        Job(number, f"c{number}", priority, 1, None, 0, None if quarters is None else NOON + quarters * 900)
        for number, (priority, _, quarters, _) in enumerate(campaigns, start=1)
    ]
    demands = [Demand(job, "google", rows, release and NOW + release) for job, (_, rows, _, release) in zip(jobs, campaigns, strict=True)]
    lines = [Line(number, 1, "google", (rate + 0.01) / 900, hour, (day,)) for number, (rate, hour, day) in enumerate(limits, start=1)]
    horizon = Horizon.of(NOW, 3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(aggregate, "FLOOR_SHARE", 0.0)
        patch.setattr(Horizon, "of", lambda now: horizon)
        (part,) = near_plan(jobs, demands, lines, NOW).providers
    assert not part.failure
    sent = dict(enumerate(part.placed.sum(axis=2).T.tolist())) | {len(horizon.slots): part.unmet.tolist()}
    assert worth(demands, horizon, sent) == best_of_all(demands, Rooms.of(lines, horizon))


@pytest.mark.parametrize(("seed", "servers", "providers", "campaigns"), [(0, 20, 6, 12), (1, 20, 6, 12), (2, *bench.LARGE)])
def test_large_cases_end_within_two_hundredths_of_the_lower_bound(seed: int, servers: int, providers: int, campaigns: int) -> None:
    """The last one as large as is promised: 100 servers, 50 providers, 20 campaigns, within ten seconds of one core."""
    jobs, demands, lines = bench.case(seed, servers, providers, campaigns)
    begin = time.process_time()
    # No limit by the wall clock, which others on the machine make go faster.
    plan = near_plan(jobs, demands, lines, NOW, seconds=float("inf"))
    assert time.process_time() - begin < bench.TARGET_SECONDS
    assert {part.failure for part in plan.providers} == {""}
    assert cases.exceeded(plan, lines) == []
    assert bench.lower_bound(plan) < NOW + 2 * DAY
    assert bench.makespan(plan) - NOW <= 1.02 * (bench.lower_bound(plan) - NOW)


def test_the_benchmark_prints_figures_for_programs_and_the_solver_nothing() -> None:
    """Of another process: the solver prints past Python."""
    command = [sys.executable, "-m", "mail_pipelines", "bench", "plan", "--quick", "--json"]
    words = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert "HiGHS" not in words
    results = {result["name"]: result for result in json.loads(words.splitlines()[-1])["results"]}
    assert results["makespan"]["met"]
    assert results["providers planned by the solver"]["met"]
    assert results["seconds of a plan"]["value"] > 0


def test_every_campaign_gets_its_share_whatever_is_more_urgent() -> None:
    jobs = [Job(1, "urgent", 3, 1), Job(2, "low", 0, 1)]
    demands = [Demand(job, "google", 1_000_000) for job in jobs]
    plan = near_plan(jobs, demands, [Line(1, 1, "google", 10.0)], NOW)
    (part,) = plan.providers
    low = part.placed[1].sum(axis=1)
    assert (low[1:10] >= 0.02 * 9_000 - 1).all()
    assert (low[1:10] <= 0.02 * 9_000 + 1).all()


def test_what_begins_within_a_quarter_of_an_hour_may_only_fall() -> None:
    jobs = [Job(1, "one", 1, 1)]
    demands = [Demand(jobs[0], "google", 20_000)]
    lines = [Line(1, 1, "google", 10.0)]
    start = NOW // 900 * 900
    plan = near_plan(jobs, demands, lines, NOW, previous={(1, "google", start): 500, (1, "google", start + 900): 9_999, (1, "google", start + 1800): 7})
    assert plan.providers[0].placed[0].sum(axis=1).tolist()[:4] == [500, 9_000, 9_000, 1_500]


@pytest.mark.parametrize("priority", [0, 3])
def test_rows_that_come_back_share_what_is_frozen_with_the_rest_of_their_campaign(priority: int) -> None:
    """Both have a share of their own, and together no more than was planned before there were two: the solver finds that possible."""
    jobs = [Job(1, "urgent", 3, 1), Job(2, "other", priority, 1)]
    demands = [Demand(job, "google", 50_000) for job in jobs]
    lines = [Line(1, 1, "google", 1.0)]
    now = NOW // 900 * 900 + 10
    previous = {(job, provider, start): count for (job, _, provider, start), count in near_plan(jobs, demands, lines, now).grants(3).items()}
    plan = near_plan(jobs, [*demands, Demand(jobs[1], "google", 500, now + 660)], lines, now + 60, previous)
    (part,) = plan.providers
    assert not part.failure
    sent = part.placed[1:].sum(axis=(0, 2))
    assert sent[1] == previous[2, "google", now // 900 * 900 + 900]
    assert sent[2] > 0


def test_a_plan_stays_where_nothing_is_gained_by_another() -> None:
    """Two equal campaigns: that the second was to go first is no worse than the other way round."""
    jobs = [Job(1, "one", 1, 1), Job(2, "two", 1, 1)]
    demands = [Demand(job, "google", 9_000) for job in jobs]
    slot = NOW // 900 * 900 + 1800
    plan = near_plan(jobs, demands, [Line(1, 1, "google", 10.0)], NOW, previous={(2, "google", slot): 9_000})
    (part,) = plan.providers
    assert part.placed[1, 2].sum() >= part.placed[0, 2].sum()


def test_the_simple_rule_plans_when_the_solver_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the order of deadlines."""
    jobs = [Job(1, "later", 1, 1, finish_by=NOW + 20 * HOUR), Job(2, "sooner", 1, 1, finish_by=NOW + 5 * HOUR)]
    demands = [Demand(job, "google", 9_000) for job in jobs]

    def fails(*_: object) -> None:
        raise aggregate.PlanningFailed("the solver ended with Infeasible")

    monkeypatch.setattr(aggregate, "solve", fails)
    plan = near_plan(jobs, demands, [Line(1, 1, "google", 1.0)], NOW)
    assert plan.providers[0].failure == "the solver ended with Infeasible"
    assert sent(plan) == 18_000
    assert finish(plan, jobs[1]) < finish(plan, jobs[0])


def test_the_overflow_pool_helps_where_no_server_of_the_own_pool_can() -> None:
    job = Job(1, "one", 1, 1, overflow_pool_id=2)
    demands = [Demand(job, "google", 100)]
    spare = Line(2, 2, "google", 1.0)
    assert sent(near_plan([job], demands, [replace(spare, pool_id=3)], NOW)) == 0
    assert sent(near_plan([job], demands, [spare], NOW)) == 100
    both = near_plan([job], demands, [Line(1, 1, "google", 1.0), spare], NOW)
    assert both.providers[0].placed[0].sum(axis=0).tolist() == [100, 0]
    closed = near_plan([job], demands, [Line(1, 1, "google", 1.0, opens_at=NOW + HOUR), spare], NOW)
    assert closed.providers[0].placed[0].sum(axis=0).tolist() == [0, 100]


def test_the_earliest_end_does_not_wait_for_less_urgent_campaigns() -> None:
    """One server, 100 messages an hour: 6,000 last 60 hours whatever waits behind them."""
    lines = [Line(1, 1, "google", 1.0, per_hour=100)]
    urgent, other = Job(1, "urgent", 2, 1), Job(2, "other", 0, 1)
    plan = near_plan([urgent, other], [Demand(urgent, "google", 6_000), Demand(other, "google", 100_000, NOW + 47 * HOUR)], lines, NOW)
    found = {one.campaign: one.earliest for one in forecasts(plan)}
    ends = {name: dt.datetime.fromisoformat(moment).timestamp() for name, moment in found.items() if moment is not None}
    assert 58 * HOUR < ends["urgent"] - NOW < 64 * HOUR
    assert ends["other"] - NOW > 1000 * HOUR


def test_rows_that_come_back_do_not_ask_for_more_than_was_planned_of_a_frozen_slot() -> None:
    urgent, other = Job(1, "urgent", 3, 1), Job(2, "other", 0, 1)
    demands = [Demand(urgent, "google", 5_000), Demand(other, "google", 5_000), Demand(other, "google", 5_000, NOON + 600)]
    planned = {(2, "google", start): 1 for start in (NOON, NOON + 900)}
    plan = near_plan([urgent, other], demands, [Line(1, 1, "google", 1.0)], NOON, planned)
    assert [part.failure for part in plan.providers] == [""]
