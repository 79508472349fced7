"""Servers that a simulated fleet rents and gives back: the far plan, verdicts on idle ones, and the decisions of `provisioning`. Hosts take hours to make."""

from __future__ import annotations

import datetime as dt
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from mail_pipelines.capacity import far, health_rules, idle, outlook, shortage, verdicts
from mail_pipelines.capacity.far import FarOrder, InFlight, far_plan
from mail_pipelines.capacity.fleet import Fleet
from mail_pipelines.capacity.health_rules import Record
from mail_pipelines.capacity.horizon import DAY, HOUR
from mail_pipelines.capacity.idle import Idleness
from mail_pipelines.capacity.near import NearPlan
from mail_pipelines.capacity.new_servers import HostSources, NextSource
from mail_pipelines.capacity.outlook import Mailing
from mail_pipelines.capacity.retiring import Candidate
from mail_pipelines.capacity.verdicts import Verdict
from mail_pipelines.config import ProvisioningSettings
from mail_pipelines.provisioning import budget, proposals, reserving
from mail_pipelines.provisioning.interfaces import CannotBeMade
from mail_pipelines.provisioning.proposals import Wanted
from mail_pipelines.provisioning.states import IN_SERVICE, MAKING, State, Step
from mail_pipelines.provisioning.store import Provision
from mail_pipelines.simulation.scenario import BEGIN, POOL, POOL_ID, Scenario, key_of, world
from mail_pipelines.simulation.sending import Ledger

Mode = Literal["off", "auto"]
_SOURCE = "simulated"
# The servers of the beginning have served for so long.
_SERVED_SECONDS = 60 * DAY


@dataclass(frozen=True)
class Decision:
    """What was decided when (ISO 8601), and why."""

    at: str
    what: str
    why: str


class Buying:
    """`decisions` in their order; `provisions` are all servers ever asked for, the first those that there are at the beginning."""

    def __init__(self, scenario: Scenario, mode: Mode, rng: np.random.Generator) -> None:
        making = world()["making"]
        most = scenario.size.servers + round(max(2, scenario.size.servers * making["most"]))
        self.settings = ProvisioningSettings(mode=mode, budget=making["budget_for_each"] * scenario.size.servers, most=most, at_once=making["at_once"])
        self.decisions: list[Decision] = []
        self._scenario, self._rng = scenario, rng
        self.provisions: list[Provision] = [self._at_the_beginning(server) for server in range(scenario.size.servers)]
        self.verdicts: Sequence[Verdict] = ()
        self._orders: Sequence[FarOrder] = ()
        self._last: dt.datetime | None = None
        self._ready: dict[int, int] = {}

    @property
    def ordered(self) -> list[Provision]:
        """Those that were asked for since the beginning."""
        return self.provisions[self._scenario.size.servers :]

    def plan(self, now: int, fleet: Fleet, ledger: Ledger, near: NearPlan, drained: Mapping[str, Record]) -> None:
        """The far plan of a day, what is ordered by it, and whether any server is not needed."""
        moment = dt.datetime.fromtimestamp(now, dt.UTC)
        sources = HostSources(NextSource(world()["fleet"]["curve"], world()["making"]["cost_per_hour"]))
        making = [one.requested_at.date() for one in self.provisions if one.state in MAKING]
        flights = [InFlight.being_made(POOL, sources.new_server, day, moment.date()) for day in making]
        outlooks = [outlook.of_pool(POOL_ID, POOL, *self._mailings(now, ledger), moment.date(), fleet)]
        self._orders = far_plan(outlooks, moment.date(), sources.new_server, flights, self._orders)
        for order in self._orders:
            if order.due:
                effect = f"{far.effect(order.short, order.left)}; to send from {order.first_day} on"
                self._order(Wanted(order.servers, order.why, effect, order.pool, as_of=moment), moment)
        candidates = [
            Candidate(one.key, one.server_id, POOL, one.cost_per_hour or 0.0, (), budget.may_be_given_back_at(one, self.settings))
            for one in self.provisions
            if one.state in IN_SERVICE and one.key not in drained and one.server_id is not None
        ]
        known = Idleness(candidates, idle.restless(self.provisions, drained, ""), self.verdicts)
        self.verdicts = idle.judge(known, near, fleet, outlooks, flights, self._orders, sources, moment)

    def replace(self, now: int, drained: Mapping[str, Record]) -> None:
        """Order servers in the place of those that were taken out of service."""
        for wanted in shortage.in_the_place(self.provisions, drained, "").values():
            self._order(wanted, dt.datetime.fromtimestamp(now, dt.UTC))

    def give_back(self, now: int, drained: Mapping[str, Record]) -> list[int]:
        """Servers that go now, because they were taken out of service long ago, or are not needed."""
        if self.settings.mode == "off":
            return []
        moment = dt.datetime.fromtimestamp(now, dt.UTC)
        places = {one.key: place for place, one in enumerate(self.provisions) if one.state in IN_SERVICE}
        reasons = verdicts.to_give_back(health_rules.gone(drained, moment), self.verdicts, places, leaving=False)
        for key, why in reasons.items():
            self._say(moment, f"{key} is given back", why)
            self.provisions[places[key]] = replace(self.provisions[places[key]], state=State.RETIRED, reason=why, ended_at=moment)
        return [int(self.provisions[places[key]].host_id or 0) for key in reasons]

    def drained(self, now: int, reasons: Mapping[str, str]) -> None:
        """Tell who was taken out of service."""
        for key, why in reasons.items():
            self._say(dt.datetime.fromtimestamp(now, dt.UTC), f"{key} is out of service", why)

    def _order(self, wanted: Wanted, now: dt.datetime) -> None:
        servers, _ = proposals.missing(wanted, self.provisions, self._last, world()["making"]["cost_per_hour"], self.settings, now)
        if servers:
            self._say(now, f"{servers} servers ordered: {wanted.effect}", wanted.why)
            self._last = now
            self.provisions += [self._request(now, wanted.why, number) for number in range(servers)]

    def _mailings(self, now: int, ledger: Ledger) -> tuple[list[Mailing], list[Mailing]]:
        """Of the past, and to come: what of those that are being sent is left counts as today's."""
        past, coming = [], []
        today = dt.datetime.fromtimestamp(now, dt.UTC).date()
        for number, job in enumerate(self._scenario.jobs):
            day = dt.datetime.fromtimestamp(job.start_at, dt.UTC).date()
            rows = dict(zip(self._scenario.providers, self._scenario.rows[number].tolist(), strict=True))
            window = self._scenario.windows[number]
            if job.start_at > now:
                coming.append(Mailing(POOL_ID, day, rows, window))
            else:
                past.append(Mailing(POOL_ID, day, rows, window))
                left = (ledger.waiting[number] + ledger.deferred[number]).tolist()
                coming.append(Mailing(POOL_ID, today, dict(zip(self._scenario.providers, left, strict=True)), window))
        return past, coming

    def _at_the_beginning(self, server: int) -> Provision:
        began = dt.datetime.fromtimestamp(BEGIN - _SERVED_SECONDS, dt.UTC)
        return replace(
            self._request(began, "there at the beginning", server, key_of(server)), state=State.ACTIVE, step=Step.NONE, source=_SOURCE, host_id=str(server),
            cost_per_hour=world()["making"]["cost_per_hour"], ordered_at=began, created_at=began, server_id=server + 1,
        )  # fmt: skip

    def _request(self, now: dt.datetime, why: str, number: int, key: str = "") -> Provision:
        """One without a host has no name yet: that is the host's here."""
        identity = number + 1 if key else len(self.provisions) + number + 1
        return Provision(
            id=identity, key=key, state=State.REQUESTED, step=Step.RESERVE, attempt=0, reason=None, state_at=now, due_at=None, why=why,
            proposal_id=None, pool=POOL, source=None, host_id=None, host=None, records=None, cost_per_hour=None, requested_at=now, ordered_at=None,
            created_at=None, ended_at=None,
        )  # fmt: skip

    def advance(self, now: int) -> list[Provision]:
        """Go on with what is being made; returns those that are in service from now on."""
        moment = dt.datetime.fromtimestamp(now, dt.UTC)
        done = []
        for place, one in enumerate(self.provisions):
            if one.state is State.REQUESTED:
                one = self._reserved(one, moment)
            elif one.state is State.PROVISIONING and self._ready[one.id] <= now:
                if self._rng.random() < world()["making"]["failed"]:
                    one = replace(one, state=State.FAILED, step=Step.NONE, reason="the simulated host failed", ended_at=moment)
                    self._say(moment, f"{one.key} failed", one.reason or "")
                else:
                    one = replace(one, state=State.WARMING, step=Step.NONE, created_at=moment)
                    done.append(one)
            self.provisions[place] = one
        return done

    def _reserved(self, one: Provision, now: dt.datetime) -> Provision:
        """With a host, if there may be one now."""
        others = [other for other in self.provisions if other.id != one.id]
        cost = world()["making"]["cost_per_hour"]
        try:
            living = reserving.within_numbers(others, self.settings)
            if reason := budget.too_dear(others, cost, self.settings, now):
                raise CannotBeMade(reason)
        except reserving.Full:
            return one
        except CannotBeMade as error:
            self._say(now, "a server is not made", str(error))
            return replace(one, state=State.FAILED, step=Step.NONE, reason=str(error), ended_at=now)
        taken = {int(other.host_id) for other in living if other.host_id is not None}
        host = next((number for number in range(self._scenario.size.servers, len(self._scenario.per_day)) if number not in taken | self._spent), None)
        if host is None:
            self._say(now, "a server is not made", "the source has no more hosts")
            return replace(one, state=State.FAILED, step=Step.NONE, reason="the source has no more hosts", ended_at=now)
        low, high = world()["making"]["hours"]
        self._ready[one.id] = int(now.timestamp() + self._rng.uniform(low, high) * HOUR)
        begun = replace(one, key=key_of(host), server_id=host + 1, source=_SOURCE, host_id=str(host), cost_per_hour=cost)
        return replace(begun, state=State.PROVISIONING, step=Step.CREATE, ordered_at=now)

    @property
    def _spent(self) -> set[int]:
        """Hosts that have sent: a new server is a new address."""
        return {int(one.host_id) for one in self.provisions if one.created_at is not None and one.host_id is not None}

    def _say(self, now: dt.datetime, what: str, why: str) -> None:
        self.decisions.append(Decision(now.isoformat(), what, why))
