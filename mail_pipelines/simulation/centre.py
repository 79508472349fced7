"""The centre of a simulated fleet: what it has seen, told to the planning code of production in its own plain values.

What belongs here: translation from arrays. What does not: any rule of planning, breakers, health or warm-up, which are all `capacity`'s.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Container, Iterable, Mapping
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from mail_pipelines.capacity import breakers, health_rules, supply
from mail_pipelines.capacity.breakers import Answers, Breaker
from mail_pipelines.capacity.demand import Demand, Job
from mail_pipelines.capacity.fleet import Fleet, Limits, Member, Pair
from mail_pipelines.capacity.health_rules import Heard
from mail_pipelines.capacity.horizon import DAY, HOUR, HOURS
from mail_pipelines.capacity.near import NearPlan, near_plan
from mail_pipelines.config import SendingSettings
from mail_pipelines.database.models import State
from mail_pipelines.delivery.breakers import provider_rules
from mail_pipelines.delivery.recording import SLOT_SECONDS
from mail_pipelines.dispatch import holds
from mail_pipelines.dispatch.windows import Span
from mail_pipelines.simulation.events import Events
from mail_pipelines.simulation.scenario import POOL_ID, Counts, Numbers, Scenario, key_of
from mail_pipelines.simulation.sending import Ledger, Slot
from mail_pipelines.simulation.warming import Warming

# Grants are kept for the four slots until the next plan, and for the two that it will find frozen.
GRANTED_SLOTS = 6


class Centre:
    """`granted`: slot start → C × V × P; V is all servers that there may ever be, server `v` having the id v + 1 and the name `key_of(v)`.

    `members` are the servers that are in service, `records` what was decided of any server's health, by its name.
    """

    def __init__(self, scenario: Scenario, warming: Warming) -> None:
        self.granted: dict[int, Counts] = {}
        self.members: list[int] = list(range(scenario.size.servers))
        self.records: Mapping[str, health_rules.Record] = {}
        self._scenario, self._warming = scenario, warming
        shape = scenario.per_day.shape
        self._used = {length: np.zeros(shape, dtype=np.int64) for length in (HOUR, DAY)}
        slots = supply.FLOW_HOURS * HOUR // SLOT_SECONDS
        self._answers, self._deferrals = (np.zeros((slots, *shape), dtype=np.int64) for _ in range(2))
        self._breakers: dict[Pair, Breaker] = {}
        self._limits = {(0, provider): self._limit(-1, number) for number, provider in enumerate(scenario.providers)}
        for server in range(shape[0]):
            self._limits |= {(server + 1, provider): self._limit(server, number) for number, provider in enumerate(scenario.providers)}

    def _limit(self, server: int, provider: int) -> Limits:
        """Of a server, or, as that of all servers, the last one's, which is an ordinary one."""
        hour, day = (None if np.isinf(limit[server, provider]) else int(limit[server, provider]) for limit in (self._scenario.per_hour, self._scenario.per_day))
        return Limits(float(self._scenario.per_second[server, provider]), hour, (day,))

    # --- what is seen ---------------------------------------------------------------------------------------------

    def begin(self, now: int) -> None:
        """A slot begins."""
        for length, used in self._used.items():
            if not now % length:
                used[:] = 0
        self._answers, self._deferrals = (np.roll(kept, 1, axis=0) for kept in (self._answers, self._deferrals))
        self._answers[0] = self._deferrals[0] = 0

    def see(self, end: int, slot: Slot) -> None:
        """A slot has ended: its answers are counted, and breakers judged by them."""
        for used in self._used.values():
            used += slot.offered
        self._answers[0], self._deferrals[0] = slot.offered, slot.deferred
        moment = dt.datetime.fromtimestamp(end, dt.UTC)
        for changed in breakers.decide(self._answered(end, slot), self._breakers.values(), provider_rules(), moment):
            self._breakers[changed.server_id, changed.provider] = changed

    def _answered(self, end: int, slot: Slot) -> Iterable[Answers]:
        """The answers that a breaker may change for: those of lines that are blocked, or on trial."""
        asked = (slot.refused > 0) | (self.lines(breakers.TRIAL) & (slot.offered > 0))
        minute = (end - 1) // 60
        for server, provider in np.argwhere(asked).tolist():
            refused, taken = int(slot.refused[server, provider]), int((slot.offered - slot.deferred)[server, provider])
            for state, reason, count in ((State.DEFERRED, "ip_blocked", refused), (State.DELIVERED, "", taken)):
                if count:
                    yield Answers(server + 1, self._scenario.providers[provider], minute, state, reason, count)

    def lines(self, state: str) -> NDArray[np.bool_]:
        """The lines whose breaker is in this state: V × P."""
        found = np.zeros(self._scenario.per_day.shape, dtype=bool)
        for (server_id, provider), breaker in self._breakers.items():
            if breaker.state == state:
                found[server_id - 1, self._scenario.providers.index(provider)] = True
        return found

    def room(self) -> Numbers:
        """What the usage windows of slot, hour and day leave at the beginning of a slot: V × P."""
        scenario = self._scenario
        hour, day = scenario.per_hour - self._used[HOUR], np.minimum(scenario.per_day, self._warming.caps()) - self._used[DAY]
        left: Numbers = np.maximum(0, np.minimum(np.floor(scenario.per_second * SLOT_SECONDS + 1e-9), np.minimum(hour, day)))
        return left

    def trials(self, now: int, events: Events) -> Counts:
        """The messages by which it is tried whether a provider takes some again, where a breaker has waited long enough: V × P."""
        found = np.zeros(self._scenario.per_day.shape, dtype=np.int64)
        sends = np.isin(np.arange(len(found)), self.members) & events.up
        if (trying := self.lines(breakers.TRIAL) & sends[:, None]).any():
            fleet = self.fleet(now, events)
            for server, provider in np.argwhere(trying).tolist():
                found[server, provider] = min(provider_rules().trial_messages, fleet.left(server + 1, self._scenario.providers[provider], now))
        return found

    # --- who is taken out of service ---------------------------------------------------------------------------------

    def look(self, now: int, events: Events, retired: Container[int]) -> Mapping[str, str]:
        """Judge the health of all servers, as the sensor does, and drain who is sick; who was drained or lost since, and why."""
        servers = [server for server in range(len(events.up)) if server not in retired and (server in self.members or key_of(server) in self.records)]
        outcome = health_rules.decide([self._seen(server, events) for server in servers], self.records, dt.datetime.fromtimestamp(now, dt.UTC))
        before, after = health_rules.drained(self.records), health_rules.drained(outcome.records)
        self.records = outcome.records
        for server in [server for server in self.members if key_of(server) in after]:
            self.leave(server)
        return {key: record.why for key, record in after.items() if key not in before}

    def leave(self, server: int) -> None:
        """It claims nothing any more, and what it was granted is taken back."""
        self.members.remove(server)
        for grants in self.granted.values():
            grants[:, server] = 0

    def _seen(self, server: int, events: Events) -> health_rules.Seen:
        answers, bad = self._answers[:, server].sum(axis=0), self._deferrals[:, server].sum(axis=0)
        heard = {}
        for number, provider in enumerate(self._scenario.providers):
            breaker = self._breakers.get((server + 1, provider))
            stopped = breaker is not None and breaker.state != breakers.CLOSED
            if answers[number] or stopped:
                heard[provider] = Heard(int(answers[number]), int(bad[number]), stopped)
        # Who comes back after some hours was silent, and not declared lost.
        lost = bool(events.gone[server] and not events.up[server])
        return health_rules.Seen(key_of(server), POOL_ID, server in self.members and not lost, lost, heard=heard)

    # --- what is planned ------------------------------------------------------------------------------------------

    def fleet(self, now: int, events: Events) -> Fleet:
        """What `Fleet.read` would read."""
        names = self._scenario.providers
        members = [Member(server + 1, POOL_ID, bool(events.up[server])) for server in self.members if events.up[server] or not events.gone[server]]
        used: dict[Pair, Mapping[int, int]] = {
            (server + 1, names[provider]): {length: int(counts[server, provider]) for length, counts in self._used.items()}
            for server, provider in np.argwhere(self._used[DAY]).tolist()
        }
        stopped = {pair: breaker for pair, breaker in self._breakers.items() if breaker.state != breakers.CLOSED}
        return Fleet(members, holds.InForce(()), stopped, used, self._limits, self._warming.day_caps(), now)

    def plan(self, now: int, events: Events, ledger: Ledger) -> NearPlan:
        """Plan and grant, as `planning.make` does."""
        jobs, demands = self._demand(now, ledger)
        answers, deferrals = self._answers.sum(axis=0), self._deferrals.sum(axis=0)
        names = self._scenario.providers
        flows = {
            (server + 1, names[provider]): supply.flow(int(deferrals[server, provider]), int(answers[server, provider]))
            for server, provider in np.argwhere(deferrals).tolist()
        }
        lines = supply.lines(self.fleet(now, events), flows, {demand.provider for demand in demands}, dt.datetime.fromtimestamp(now, dt.UTC))
        # However busy the machine is: the same seed says the same.
        plan = near_plan(jobs, demands, lines, now, self._previous(now), seconds=float("inf"))
        self._grant(plan)
        return plan

    def _demand(self, now: int, ledger: Ledger) -> tuple[list[Job], list[Demand]]:
        """As `demand.read` counts it: what waits, what is deferred, and what begins within the horizon."""
        jobs, demands = [], []
        retry = SendingSettings().first_retry_seconds
        for number, job in enumerate(self._scenario.jobs):
            coming = now < job.start_at <= now + HOURS * HOUR
            spans = self._spans(number, now)
            kinds = [(self._scenario.rows[number], job.start_at)] if coming else [(ledger.waiting[number], 0), (ledger.deferred[number], now + retry)]
            if spans is not None and not coming:
                kinds = [(ledger.waiting[number] + ledger.deferred[number], 0)]
            known = replace(job, expected=coming)
            found = [
                Demand(known, self._scenario.providers[provider], int(rows[provider]), release, spans)
                for rows, release in kinds
                for provider in np.flatnonzero(rows)
            ]
            jobs += [known] if found else []
            demands += found
        return jobs, demands

    def _spans(self, number: int, now: int) -> tuple[Span, ...] | None:
        """When a campaign may be sent within the horizon."""
        spans = self._scenario.spans[number]
        return None if spans is None else tuple((opens, closes) for opens, closes in spans if closes > now and opens < now + HOURS * HOUR)

    def _previous(self, now: int) -> dict[tuple[int, str, int], int]:
        return {
            (int(campaign) + 1, self._scenario.providers[provider], start): int(counts[campaign, provider])
            for start, grants in self.granted.items()
            if start >= now
            for counts in [grants.sum(axis=1)]
            for campaign, provider in np.argwhere(counts).tolist()
        }

    def _grant(self, plan: NearPlan) -> None:
        shape = len(self._scenario.jobs), *self._scenario.per_day.shape
        self.granted = {slot.start: np.zeros(shape, dtype=np.int64) for slot in plan.horizon.slots[:GRANTED_SLOTS]}
        for part in plan.providers:
            provider = self._scenario.providers.index(part.provider)
            servers = [line.server_id - 1 for line in part.lines]
            for number, demand in enumerate(part.demands):
                if not demand.job.expected:
                    for place, grants in enumerate(self.granted.values()):
                        grants[demand.job.id - 1, servers, provider] += part.placed[number, place]
