"""The far plan: whether the servers that there are, and those on order, can send what the next eight weeks bring, and which to order by when.

Days are whole, and a pool is a pool: who sends what at which hour is the near plan's matter. But what has send windows has to fit into the part of each day
in which they are open, and everything together into the days. A server ordered today sends nothing until it is made, a
few hundred messages a provider on its first day, and what a warm one sends after weeks (`new_servers`): so what counts is when an order is given, and fewer
servers do if they are ordered sooner.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mail_pipelines.capacity.new_servers import NewServer

Daily = NDArray[np.float64]


@dataclass(frozen=True)
class Policy:
    """When servers are ordered, and how many at a time. What the operator allows is looked at when it comes to making them (`provisioning.budget`).

    Messages may wait for `patience_days` after their day; less than `tolerance` of a day's messages is no shortage. An order is given when it has been
    proposed for `confirm_days`. All orders and servers in flight together are at most `most_servers`. One order serves the shortages of `wave_days`.
    """

    most_servers: int = 20
    patience_days: int = 1
    tolerance: float = 0.02
    confirm_days: int = 1
    wave_days: int = 7


@dataclass(frozen=True)
class Outlook:
    """A pool's next weeks by provider: messages that come up each day, what its servers can send each day, and what a warm server can. Arrays of D days.

    `within` are the same of what may be sent in no more than some `parts` of the days (0 to 1; None: all of each): of its messages, and of what servers can
    send in these parts.
    """

    pool: str
    demand: Mapping[str, Daily]
    capacity: Mapping[str, Daily]
    warm: Mapping[str, float | Daily]
    parts: Daily | None = None
    within: Sequence[Outlook] = ()

    @property
    def views(self) -> Sequence[Outlook]:
        """All of it, and what has windows."""
        return (self, *self.within)

    def less(self, able: Sequence[Mapping[str, Daily]]) -> Outlook:
        """Without a server that is able to send so much in each of the views."""
        fewer = [
            replace(view, capacity={name: np.maximum(0.0, found - its.get(name, 0.0)) for name, found in view.capacity.items()})
            for view, its in zip(self.views, able, strict=True)
        ]
        return replace(fewer[0], within=tuple(fewer[1:]))


@dataclass(frozen=True)
class InFlight:
    """Servers of a pool that are ordered and not there yet: what each is worth, and the day on which they are to send first."""

    pool: str
    servers: int
    first_day: dt.date
    new_server: NewServer

    @classmethod
    def being_made(cls, pool: str, new_server: NewServer, asked_for: dt.date, today: dt.date) -> InFlight:
        """One that was asked for on that day: what takes longer than it should has not begun to send meanwhile."""
        return cls(pool, 1, max(new_server.first_day(asked_for), today + dt.timedelta(days=1)), new_server)


@dataclass(frozen=True)
class FarOrder:
    """Servers to order for a pool. `order_by` is the last day that is soon enough (today, if it is too late already), `since` when this was first proposed.

    `due`: to be ordered now. `short` is by how many days messages would be too late without it, added up over all of them; `left` with it (`effect`).
    """

    pool: str
    servers: int
    order_by: dt.date
    first_day: dt.date
    since: dt.date
    due: bool
    short: int
    left: int
    why: str


def far_plan(
    outlooks: Iterable[Outlook],
    today: dt.date,
    new_server: NewServer,
    in_flight: Sequence[InFlight] = (),
    previous: Sequence[FarOrder] = (),
    policy: Policy = Policy(),
) -> list[FarOrder]:
    """The orders that keep all pools able to send, those to be given first at the front. `previous` are those of the plan before."""
    orders: list[FarOrder] = []
    budget = policy.most_servers - sum(flight.servers for flight in in_flight)
    for outlook in outlooks:
        flights = [flight for flight in in_flight if flight.pool == outlook.pool]
        for order in _orders(outlook, today, new_server, flights, policy, budget):
            budget -= order.servers
            orders.append(_confirmed(order, [one for one in previous if one.pool == order.pool], today, policy))
    return sorted(orders, key=lambda order: (order.order_by, order.pool))


def _orders(outlook: Outlook, today: dt.date, new_server: NewServer, flights: Sequence[InFlight], policy: Policy, budget: int) -> list[FarOrder]:
    """One order after the other, each for the first shortage that is left and those of the days after it."""
    orders: list[FarOrder] = []
    supply = list(flights)
    days = len(next(iter(outlook.demand.values()), np.empty(0)))
    begin = 0
    while budget > 0:
        late = shortages(outlook, supply, today, policy)
        total = sum(late.values(), np.zeros(days))
        short_days = np.flatnonzero(total[begin:]) + begin
        if not len(short_days):
            break
        first = int(short_days[0])
        end = min(days, first + policy.wave_days)

        def left(count: int, day: int, supply: Sequence[InFlight] = supply, end: int = end, begin: int = begin) -> float:
            """Messages of this wave that are late if so many servers are ordered on that day."""
            more = [*supply, InFlight(outlook.pool, count, new_server.first_day(today + dt.timedelta(days=day)), new_server)]
            return float(sum(found[begin:end].sum() for found in shortages(outlook, more, today, policy).values()))

        count, day, rest = _choose(left, first, budget, float(total[begin:end].sum()))
        if count:
            provider = max(late, key=lambda name: float(late[name][begin:end].sum()))
            tight = max(outlook.views, key=lambda view: float(_late(view, supply, today, policy).get(provider, total * 0)[begin:end].sum()))
            demand = tight.demand[provider]
            peak = max(range(max(0, first - policy.wave_days), first + 1), key=lambda number: float(demand[number]))
            date, order_by = today + dt.timedelta(days=peak), today + dt.timedelta(days=day)
            sends = tight.capacity[provider][peak] if provider in tight.capacity else 0
            where = "" if tight is outlook else " in their send windows"
            why = f"{provider}: {demand[peak]:,.0f} messages come up on {date:%Y-%m-%d}, of which the pool sends {sends:,.0f} a day{where}"
            short = round(float(total[begin:end].sum()))
            orders.append(FarOrder(outlook.pool, count, order_by, new_server.first_day(order_by), today, due=False, short=short, left=round(rest), why=why))
            supply.append(InFlight(outlook.pool, count, new_server.first_day(order_by), new_server))
            budget -= count
        begin = end
    return orders


def _choose(left: Callable[[int, int], float], first: int, budget: int, now: float) -> tuple[int, int, float]:
    """How many servers, the last day to order them (0: today), and what is late all the same: the fewest that leave nothing late, as late as they may be.

    Where nothing is enough, the fewest of those that leave least, today; none if they change nothing.
    """
    enough = next((count for count in range(1, budget + 1) if left(count, 0) <= 0), None)
    if enough is not None:
        low, high = 0, first + 1
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if left(enough, middle) <= 0 else (low, middle)
        return enough, low, 0.0
    rest, count = min((left(count, 0), count) for count in range(1, budget + 1))
    return (count, 0, rest) if rest < now else (0, 0, now)


def shortages(outlook: Outlook, supply: Sequence[InFlight], today: dt.date, policy: Policy) -> dict[str, Daily]:
    """By provider and day the messages that are still waiting after their patience, at the end of the day."""
    found = _late(outlook, supply, today, policy)
    for view in outlook.within:
        for provider, late in _late(view, supply, today, policy).items():
            found[provider] = np.maximum(found[provider], late)
    return found


def _late(outlook: Outlook, supply: Sequence[InFlight], today: dt.date, policy: Policy) -> dict[str, Daily]:
    """The same of one view. Days on which all windows are closed try nobody's patience, and what comes up on them does so on the next one."""
    found = {}
    for provider, demand in outlook.demand.items():
        capacity = outlook.capacity.get(provider, np.zeros(len(demand))).copy()
        for flight in supply:
            ages = np.arange(len(demand)) - (flight.first_day - today).days
            warm = np.broadcast_to(outlook.warm.get(provider, 0.0), len(demand))
            capacity += flight.servers * np.array([flight.new_server.cap(int(age), float(most)) for age, most in zip(ages, warm, strict=True)])
        late = np.zeros(len(demand))
        backlog, most_a_day = 0.0, 1.0
        # Of the days on which something may be sent.
        came = [0.0]
        for day, comes in enumerate(demand):
            backlog = max(0.0, backlog + comes - capacity[day])
            came[-1] += comes
            most_a_day = max(most_a_day, came[-1])
            if outlook.parts is not None and not outlook.parts[day]:
                continue
            overdue = backlog - (sum(came[-policy.patience_days :]) if policy.patience_days else 0.0)
            late[day] = overdue if overdue > policy.tolerance * most_a_day else 0.0
            came.append(0.0)
        found[provider] = late
    return found


def _confirmed(order: FarOrder, previous: Sequence[FarOrder], today: dt.date, policy: Policy) -> FarOrder:
    """The order as it is told: since when, and whether it is due. One server less than was proposed before is no reason to change one's mind."""
    since = min((one.since for one in previous), default=today)
    servers = next((one.servers for one in previous if one.servers == order.servers + 1), order.servers)
    stood = (today - since).days >= policy.confirm_days
    return replace(order, since=since, servers=servers, due=stood and order.order_by <= today)


def effect(short: int, left: int) -> str:
    """What orders do, in words: message-days, since most do not make messages be in time that would not, but less late."""
    return f"messages would be too late by {short:,} days, added up over all of them; with these servers by {left:,}"


_DATES = ("order_by", "first_day", "since")


def to_document(order: FarOrder) -> dict[str, Any]:
    """An order as plain values: days in ISO 8601."""
    values = asdict(order)
    return values | {name: values[name].isoformat() for name in _DATES}


def from_document(values: Mapping[str, Any]) -> FarOrder:
    """The order that `to_document` wrote."""
    given: dict[str, Any] = {name: dt.date.fromisoformat(value) if name in _DATES else value for name, value in values.items()}
    return FarOrder(**given)
