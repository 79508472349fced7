"""Servers that a simulated fleet orders: the far plan and the decisions of `provisioning`, with hosts that take hours to make and sometimes fail."""

from __future__ import annotations

import datetime as dt
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from mail_pipelines.capacity import outlook
from mail_pipelines.capacity.far import FarOrder, InFlight, far_plan
from mail_pipelines.capacity.fleet import Fleet
from mail_pipelines.capacity.horizon import HOUR
from mail_pipelines.capacity.new_servers import new_server
from mail_pipelines.capacity.outlook import Mailing
from mail_pipelines.config import ProvisioningSettings
from mail_pipelines.provisioning import budget, proposals, reserving
from mail_pipelines.provisioning.interfaces import CannotBeMade
from mail_pipelines.provisioning.proposals import Wanted
from mail_pipelines.provisioning.states import MAKING, State, Step
from mail_pipelines.provisioning.store import Provision
from mail_pipelines.simulation.scenario import POOL, POOL_ID, Scenario, world
from mail_pipelines.simulation.sending import Ledger

Mode = Literal["off", "auto"]
_SOURCE = "simulated"


@dataclass(frozen=True)
class Decision:
    """What was decided when (ISO 8601), and why."""

    at: str
    what: str
    why: str


class Buying:
    """`decisions` in their order; `provisions` are all servers ever asked for."""

    def __init__(self, scenario: Scenario, mode: Mode, rng: np.random.Generator) -> None:
        making = world()["making"]
        most = len(scenario.per_day) - scenario.size.servers
        self.settings = ProvisioningSettings(mode=mode, budget=making["budget_for_each"] * scenario.size.servers, most=most, at_once=making["at_once"])
        self.decisions: list[Decision] = []
        self.provisions: list[Provision] = []
        self._scenario, self._rng = scenario, rng
        self._orders: Sequence[FarOrder] = ()
        self._last: dt.datetime | None = None
        self._ready: dict[int, int] = {}

    def plan(self, now: int, fleet: Fleet, ledger: Ledger) -> None:
        """The far plan of a day, and what is ordered by it."""
        moment = dt.datetime.fromtimestamp(now, dt.UTC)
        flights = [InFlight(POOL, 1, new_server().first_day(one.requested_at.date())) for one in self.provisions if one.state in MAKING]
        outlooks = [outlook.of_pool(POOL_ID, POOL, outlook.outlook_of(*self._mailings(now, ledger), moment.date()), fleet)]
        self._orders = far_plan(outlooks, moment.date(), new_server(), flights, self._orders)
        for order in self._orders:
            if order.due:
                wanted = Wanted(order.servers, order.why, pool=order.pool, as_of=moment)
                servers, _ = proposals.missing(wanted, self.provisions, self._last, world()["making"]["cost_per_hour"], self.settings, moment)
                if servers:
                    effect = f"{order.short:,} messages would be too late, with them {order.left:,}; to send from {order.first_day} on"
                    self._say(moment, f"{servers} servers ordered: {effect}", order.why)
                    self._last = moment
                    self.provisions += [self._request(moment, order.why, number) for number in range(servers)]

    def _mailings(self, now: int, ledger: Ledger) -> tuple[list[Mailing], list[Mailing]]:
        """Of the past, and to come: what of those that are being sent is left counts as today's."""
        past, coming = [], []
        today = dt.datetime.fromtimestamp(now, dt.UTC).date()
        for number, job in enumerate(self._scenario.jobs):
            day = dt.datetime.fromtimestamp(job.start_at, dt.UTC).date()
            rows = dict(zip(self._scenario.providers, self._scenario.rows[number].tolist(), strict=True))
            if job.start_at > now:
                coming.append(Mailing(POOL_ID, day, rows))
            else:
                past.append(Mailing(POOL_ID, day, rows))
                left = (ledger.waiting[number] + ledger.deferred[number]).tolist()
                coming.append(Mailing(POOL_ID, today, dict(zip(self._scenario.providers, left, strict=True))))
        return past, coming

    def _request(self, now: dt.datetime, why: str, number: int) -> Provision:
        identity = len(self.provisions) + number + 1
        return Provision(
            id=identity, key=f"mx{identity}", state=State.REQUESTED, step=Step.RESERVE, attempt=0, reason=None, state_at=now, due_at=None, why=why,
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
            self._say(now, f"{one.key} is not made", str(error))
            return replace(one, state=State.FAILED, step=Step.NONE, reason=str(error), ended_at=now)
        taken = {int(other.host_id) for other in living if other.host_id is not None}
        host = next(number for number in range(self._scenario.size.servers, len(self._scenario.per_day)) if number not in taken | self._spent)
        low, high = world()["making"]["hours"]
        self._ready[one.id] = int(now.timestamp() + self._rng.uniform(low, high) * HOUR)
        return replace(one, state=State.PROVISIONING, step=Step.CREATE, source=_SOURCE, host_id=str(host), cost_per_hour=cost, ordered_at=now)

    @property
    def _spent(self) -> set[int]:
        """Hosts that have sent: a new server is a new address."""
        return {int(one.host_id) for one in self.provisions if one.created_at is not None and one.host_id is not None}

    def _say(self, now: dt.datetime, what: str, why: str) -> None:
        self.decisions.append(Decision(now.isoformat(), what, why))
