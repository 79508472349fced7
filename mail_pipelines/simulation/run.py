"""A simulation from its first day to its last message, and what came of it.

A step is a slot of 15 minutes. The near plan is made every hour, and at once when a campaign begins or a server comes or goes; between two plans only the
grants of the last are used. The far plan is made once a day. Production plans every five minutes: what it would mend sooner comes up to an hour late here.
"""

from __future__ import annotations

import datetime as dt
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from mail_pipelines.benchmarks.plan import lower_bound
from mail_pipelines.capacity import breakers, forecast, health_rules
from mail_pipelines.capacity.horizon import DAY, HOUR
from mail_pipelines.capacity.near import NearPlan
from mail_pipelines.delivery.recording import SLOT_SECONDS
from mail_pipelines.simulation.buying import Buying, Decision, Mode
from mail_pipelines.simulation.centre import Centre
from mail_pipelines.simulation.checking import Checker
from mail_pipelines.simulation.events import Events
from mail_pipelines.simulation.scenario import BEGIN, Counts, Scenario, Size
from mail_pipelines.simulation.sending import Ledger
from mail_pipelines.simulation.warming import Warming


@dataclass(frozen=True)
class Course:
    """A campaign: when it began, when the plan of that moment said it would end, and when it did. Times are ISO 8601; None: not within 48 hours, or never.

    `soonest` is what cannot be beaten: alone, on all servers of that moment, without anything going wrong. `ratio` is the time it took, to that.
    """

    campaign: str
    priority: int
    messages: int
    started: str
    forecast: str | None
    held_up_by: str
    soonest: str | None
    finished: str | None
    finish_by: str | None
    ratio: float | None


@dataclass(frozen=True)
class Outcome:
    campaigns: list[Course]
    decisions: list[Decision]
    # Figures by name: counts, and seconds of this run.
    figures: dict[str, Any]
    violations: list[str]
    # Why the solver did not plan, where it did not.
    failures: list[str]


def simulate(size: Size, mode: Mode = "auto", say: Callable[[str], None] | None = None) -> Outcome:
    """Deterministic by `size.seed`, but for the seconds it took. `say` is told each day."""
    begun, processor = time.monotonic(), time.process_time()
    # Each part has its own numbers, so that a decision of one does not change what happens to the others.
    ours, weather, replies, warmth, hosts = (np.random.default_rng([size.seed, number]) for number in range(5))
    scenario = Scenario.of(size, ours)
    events = Events(size.servers, scenario.per_day.shape, weather)
    ledger, warming, buying = Ledger(scenario, replies), Warming(scenario, warmth), Buying(scenario, mode, hosts)
    centre, checker = Centre(scenario, warming), Checker(scenario.per_second, scenario.per_hour, scenario.per_day)
    sent = np.zeros(len(scenario.per_day), dtype=np.int64)
    first_plans: dict[int, tuple[NearPlan, float]] = {}
    finished: dict[int, int] = {}
    plan_seconds: list[float] = []
    failures: list[str] = []
    held_back = given_up = 0
    retired: set[int] = set()
    for now in range(BEGIN, scenario.end, SLOT_SECONDS):
        changed = events.draw(now)
        for one in buying.advance(now):
            server = int(one.host_id or 0)
            events.add(server)
            warming.add(server, now)
            centre.members.append(server)
            changed = True
        centre.begin(now)
        if not now % DAY:
            if now > BEGIN:
                warming.end_day(now - DAY)
            buying.plan(now, centre.fleet(now, events), ledger, centre.plan(now, events, ledger), health_rules.drained(centre.records))
            if say is not None:
                say(f"{_iso(now)[:10]}: {int(events.up.sum())} servers, {int(ledger.open.sum()):,} messages waiting, {checker.violations} limits broken")
        # Of what was decided a look before.
        buying.replace(now, health_rules.drained(centre.records))
        out = centre.look(now, events, retired)
        buying.drained(now, out)
        drained = health_rules.drained(centre.records)
        for server in buying.give_back(now, drained):
            retired.add(server)
            events.remove(server)
            if server in centre.members:
                centre.leave(server)
                changed = True
            else:
                given_up += 1
        changed = changed or bool(out)
        for number, job in enumerate(scenario.jobs):
            if job.start_at == now:
                ledger.start(number)
                changed = True
        if ledger.open.any():
            if changed or not now % HOUR or now not in centre.granted:
                plan = centre.plan(now, events, ledger)
                plan_seconds.append(plan.seconds)
                failures += [f"{_iso(now)}: {part.provider}: {part.failure}" for part in plan.providers if part.failure]
                for number, job in enumerate(scenario.jobs):
                    if job.start_at == now:
                        first_plans[number] = plan, _soonest(plan, job.id)
            opened = centre.lines(breakers.OPEN)
            shut = opened | centre.lines(breakers.TRIAL)
            slot = ledger.send(centre.granted[now], events, centre.trials(now, events), shut, centre.room(), scenario.open(now))
            checker.see(now, slot.offered, warming.caps(), opened | ~events.up[:, None])
            checker.see_clock(now, slot.of_campaign, scenario.windows)
            centre.see(now + SLOT_SECONDS, slot)
            warming.see(slot)
            sent += slot.offered.sum(axis=1)
            held_back += slot.held_back
            for number in first_plans:
                if number not in finished and not ledger.open[number]:
                    finished[number] = now + SLOT_SECONDS
        if len(finished) == len(scenario.jobs):
            break
    figures = {
        "messages": int(scenario.rows.sum()),
        **_missing(scenario, ledger),
        "unknown": int(ledger.unknown.sum()),
        "limits broken": checker.violations,
        "granted too much": held_back,
        **events.counts,
        **{f"warm-up days: {name}": count for name, count in sorted(warming.verdicts.items())},
        "servers taken out of service": sum(" is out of service" in decision.what for decision in buying.decisions),
        "servers ordered": len(buying.ordered),
        "servers made": sum(one.created_at is not None for one in buying.ordered),
        "given back after they were out of service": given_up,
        "given back as not needed": len(retired) - given_up,
        "messages by ordered servers": int(sent[size.servers :].sum()),
        "plans": len(plan_seconds),
        "planned by the simple rule": len(failures),
        "median seconds of a plan": round(float(np.median(plan_seconds)), 3),
        "most seconds of a plan": round(max(plan_seconds), 3),
        "processor seconds": round(time.process_time() - processor, 1),
        "seconds": round(time.monotonic() - begun, 1),
        "memory (MB)": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
    }
    return Outcome(list(_courses(scenario, first_plans, finished)), buying.decisions, figures, checker.named, failures)


def _missing(scenario: Scenario, ledger: Ledger) -> dict[str, int]:
    """Messages of started campaigns without an end or a place to wait in, and those that are there twice; and those that still wait."""
    there: Counts = ledger.delivered + ledger.bounced + ledger.unknown + ledger.waiting + ledger.deferred
    missing = np.where(there.sum(axis=1, keepdims=True) > 0, scenario.rows - there, 0)
    return {"lost": int(np.maximum(missing, 0).sum()), "extra": int(np.maximum(-missing, 0).sum()), "still waiting": int(ledger.open.sum())}


def _soonest(plan: NearPlan, job_id: int) -> float:
    """The lower bound of a campaign's end if it were alone."""
    alone = [replace(part, demands=mine) for part in plan.providers if (mine := tuple(one for one in part.demands if one.job.id == job_id))]
    return lower_bound(replace(plan, providers=tuple(alone)))


def _courses(scenario: Scenario, first_plans: dict[int, tuple[NearPlan, float]], finished: dict[int, int]) -> list[Course]:
    found = []
    for number, (plan, soonest) in sorted(first_plans.items()):
        job = scenario.jobs[number]
        told = next(one for one in forecast.forecasts(plan) if one.campaign == job.key)
        ended = finished.get(number)
        ratio = (ended - job.start_at) / (soonest - job.start_at) if ended is not None and np.isfinite(soonest) else None
        found.append(
            Course(
                job.key, job.priority, int(scenario.rows[number].sum()), _iso(job.start_at), told.finish_at or told.earliest, told.bottleneck,
                _iso(soonest) if np.isfinite(soonest) else None, None if ended is None else _iso(ended),
                None if job.finish_by is None else _iso(job.finish_by), None if ratio is None else round(ratio, 3),
            )
        )  # fmt: skip
    return found


def _iso(moment: float) -> str:
    return dt.datetime.fromtimestamp(round(moment), dt.UTC).isoformat()
