"""Whether a server that was made here is worth its cost: what it costs until it is needed again, against what it would cost to warm up another one by then.

```
keeping  = cost a day × days until the far plan would lack it (its whole horizon, if never)
warmth   = cost a day of another × (days to make it + days of its curve until it may send what is lacking then; or what this one sends, if nothing is)
retire  ⇔  keeping > margin × warmth, and another one that is ordered today would leave nothing late
```

What belongs here: that decision, from plain values. What does not: reading them (`outlook`, `planning`), and giving the server back (`sensors.capacity`).
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from mail_pipelines.capacity.far import Daily, InFlight, Outlook, shortages
from mail_pipelines.capacity.far import Policy as FarPolicy
from mail_pipelines.capacity.horizon import DAYS
from mail_pipelines.capacity.new_servers import NewServer
from mail_pipelines.capacity.verdicts import Verdict


@dataclass(frozen=True)
class Policy:
    """Warmth is worth `margin` times what it costs to make; a server goes when that was decided for `confirm_days` in a row."""

    margin: float = 1.25
    confirm_days: int = 3


@dataclass(frozen=True)
class Candidate:
    """A server made here that sends: `able` is what it may send by provider and day in each view of its pool, `kept_until` the end of its shortest lifetime."""

    server: str
    server_id: int
    pool: str
    cost_per_hour: float
    able: Sequence[Mapping[str, Daily]]
    kept_until: dt.datetime | None = None


@dataclass(frozen=True)
class Offer:
    """What another server would cost an hour, and what it is worth from which day on."""

    cost_per_hour: float
    new_server: NewServer


def judge(outlook: Outlook, one: Candidate, flights: Sequence[InFlight], offer: Offer, now: dt.datetime, policy: Policy = Policy()) -> Verdict:
    """The verdict on one server, if all others stay. `flights` are the servers of its pool that are being made."""
    today = now.date()

    def keep(why: str) -> Verdict:
        return Verdict(one.server, one.pool, True, why)

    if one.kept_until is not None and now < one.kept_until:
        return keep(f"until {one.kept_until:%Y-%m-%d %H:%M} UTC (provisioning.minimum_hours)")
    if not one.cost_per_hour:
        return keep("it costs nothing")
    if flights:
        return keep(f"{sum(flight.servers for flight in flights)} more are being made for its pool")
    without = outlook.less(one.able)

    def lacking(supply: Sequence[InFlight], pool: Outlook = without) -> dict[str, Daily]:
        return shortages(pool, supply, today, FarPolicy())

    before = lacking((), outlook)
    lack = {name: np.maximum(0.0, late - before[name]) for name, late in lacking(()).items()}
    days = np.flatnonzero(sum(lack.values(), np.zeros(DAYS)))
    level = {name: float(found.max()) for name, found in one.able[0].items() if name in outlook.demand}
    until, when = DAYS, "not within eight weeks"
    if len(days):
        until, when = int(days[0]), f"on {today + dt.timedelta(days=int(days[0])):%Y-%m-%d}"
        late = lacking([InFlight(one.pool, 1, offer.new_server.first_day(today), offer.new_server)])
        if any((found > before[name] + 0.5).any() for name, found in late.items()):
            return keep(f"needed {when}, and another one that is ordered today would not be warm by then")
        level = {name: min(level.get(name, 0.0), float(found.max())) for name, found in lack.items()}
    another = offer.new_server
    warming = another.lead_days + 1 + max((another.days_to(found) for found in level.values()), default=len(another.per_day))
    keeping, warmth = until * 24 * one.cost_per_hour, warming * 24 * offer.cost_per_hour
    words = f"needed {when}; until then it costs {keeping:.2f}, and to make and warm up another one in {warming} days {warmth:.2f}"
    if keeping <= policy.margin * warmth:
        return keep(words)
    return Verdict(one.server, one.pool, False, words, saves_per_month=730 * one.cost_per_hour)


def choose(verdicts: Sequence[Verdict], previous: Sequence[Verdict], today: dt.date, policy: Policy = Policy()) -> list[Verdict]:
    """Of those that could go one at most, the one that was chosen before or else the dearest; the others wait for it."""
    known = {one.server: one for one in previous if one.since is not None}
    able = [one for one in verdicts if not one.keep]
    if not able:
        return list(verdicts)
    first = min(able, key=lambda one: (known[one.server].since if one.server in known else today, -one.saves_per_month, one.server))
    since = known[first.server].since if first.server in known else None
    chosen = replace(first, since=since or today, due=(today - (since or today)).days >= policy.confirm_days)
    waits = f"{first.server} goes first"
    return [chosen if one is first else one if one.keep else replace(one, keep=True, why=f"{waits}; {one.why}") for one in verdicts]
