"""The near plan of a large fleet: 100 servers, 50 providers, 48 hours, 20 campaigns, on one core, and how near it comes to what cannot be beaten."""

from __future__ import annotations

import random
import time

import numpy as np

from mail_pipelines.benchmarks.contract import Result, judge
from mail_pipelines.capacity.demand import Demand, Job
from mail_pipelines.capacity.horizon import DAY, HOUR
from mail_pipelines.capacity.lines import Line
from mail_pipelines.capacity.near import NearPlan, near_plan

# 2026-03-02 09:07 UTC.
NOW = 1_772_442_420
TARGET_SECONDS, TARGET_MAKESPAN = 10.0, 1.02
# Servers, providers and campaigns.
LARGE, SMALL = (100, 50, 20), (20, 10, 10)
Case = tuple[list[Job], list[Demand], list[Line]]


def case(seed: int, servers: int, providers: int, campaigns: int) -> Case:
    """A random fleet whose hourly and daily limits bind in turn, and campaigns that keep it busy for most of 48 hours."""
    chance = random.Random(seed)
    names = [f"p{number:02}" for number in range(providers)]
    lines = []
    for server in range(1, servers + 1):
        for provider in names:
            rate = chance.choice((0.5, 1.0, 2.0))
            hour = chance.choice((None, int(rate * HOUR * 0.6), int(rate * HOUR * 0.3)))
            day = chance.choice((None, int(rate * DAY * 0.5), int(rate * DAY * 0.2)))
            lines.append(Line(server, 1, provider, rate, hour, (day,), used_day=chance.choice((0, 100))))
    jobs = [
        Job(number, f"c{number}", chance.choice((0, 1, 1, 2, 3)), 1, None, NOW, chance.choice((None, NOW + chance.randrange(6, 40) * HOUR)))
        for number in range(1, campaigns + 1)
    ]
    room = dict.fromkeys(names, 0)
    for line in lines:
        room[line.provider] += min(int(line.per_second * DAY), (line.per_hour or 1 << 40) * 24, line.per_day[0] or 1 << 40)
    demands = [Demand(job, provider, max(1, int(room[provider] * chance.uniform(0.5, 1.8) / campaigns))) for job in jobs for provider in names]
    return jobs, demands, lines


def lower_bound(plan: NearPlan) -> float:
    """The makespan of the relaxation (epoch seconds): while any send window is open all servers send to each provider as much as they may, parts of messages
    too.
    """
    latest = float(plan.horizon.now)
    for part in plan.providers:
        rows = sum(demand.rows for demand in part.demands)
        opened = np.max([part.open_parts(demand.job.id) for demand in part.demands], axis=0)
        soonest = part.rooms.opened(opened).soonest
        before = np.concatenate([[0], np.cumsum(soonest)])
        if rows > before[-1]:
            return float("inf")
        number = int(np.searchsorted(before, rows, side="left")) - 1
        slot = plan.horizon.slots[number]
        # As if what is open of a slot were its beginning.
        latest = max(latest, slot.end - plan.horizon.usable(slot) * (1 - float(opened[number] * (rows - before[number]) / soonest[number])))
    return latest


def makespan(plan: NearPlan) -> float:
    """When the last message of all goes out (epoch seconds); infinity if not within the horizon."""
    ends = [plan.finish(job.id) for job in plan.jobs]
    return float("inf") if None in ends else max(end for end in ends if end is not None)


def run(quick: bool) -> list[Result]:
    """Processor seconds of a plan against the budget, and its makespan against the lower bound: the worst of several random cases."""
    worst_seconds, worst_took, worst_bound, by_solver, providers = 0.0, 0.0, 1.0, 0, 0
    for seed in (1,) if quick else (1, 2, 3):
        jobs, demands, lines = case(seed, *(SMALL if quick else LARGE))
        begin = time.process_time()
        # Its time is judged by the processor's: how busy others keep the machine is no matter of the plan.
        plan = near_plan(jobs, demands, lines, NOW, seconds=float("inf"))
        worst_seconds = max(worst_seconds, time.process_time() - begin)
        took, bound = makespan(plan) - NOW, lower_bound(plan) - NOW
        if took / bound > worst_took / worst_bound:
            worst_took, worst_bound = took, bound
        by_solver += sum(not part.failure for part in plan.providers)
        providers += len(plan.providers)
    return [
        judge("seconds of a plan", worst_seconds, "s", TARGET_SECONDS, target=1.0, better="lower"),
        judge("makespan", worst_took, "s", worst_bound, target=TARGET_MAKESPAN, better="lower"),
        judge("providers planned by the solver", by_solver, "", providers, target=1.0, better="higher"),
    ]
