"""Breakers of sending domains: when a provider's users report too much of a domain's mail as spam, no more of it goes to that provider for a while.

Gmail sends no complaints, so a campaign that its users do not want is not stopped by `campaigns.stopping`; what Postmaster Tools tell of the domain days
later is all there is. Like the breakers of servers (`breakers`) these act through the grants: opening one takes those of the domain's campaigns to the provider
away, and the filler (`allotments`) gives none while it is open, and a few on trial. What does not belong here: the thresholds (`delivery.breakers`).

```
closed ─a day at `open`→ open ─waited→ trial ─a day of it below `close`, or none at `open` for long→ closed
                          ↑ └─that day was corrected→ closed
                          └── a day of the trial at `open`: waits twice as long
```
"""

from __future__ import annotations

import datetime as dt
import functools
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine

from mail_pipelines.capacity import from_domains
from mail_pipelines.capacity.warm_up_days import DAY, day_of
from mail_pipelines.database import models
from mail_pipelines.database.engine import database_now, reading, transact
from mail_pipelines.database.models import Allotment
from mail_pipelines.delivery.breakers import DomainRules, domain_rules
from mail_pipelines.delivery.recording import slot_at
from mail_pipelines.reputation import readings
from mail_pipelines.reputation.readings import date_of

CLOSED, OPEN, TRIAL = "closed", "open", "trial"
# Campaigns that have grants, or will have.
_STATES = ("sending", "scheduled", "building", "paused")


@dataclass(frozen=True)
class DomainBreaker:
    """The breaker of one domain towards one provider. An open one waits until `until`, a trial ends then by itself.

    `day` is the newest day of readings (its first second) that does not count any more: it has opened the breaker, or was before the trial.
    """

    domain: str
    provider: str
    state: str = CLOSED
    reason: str = ""
    trips: int = 0
    until: dt.datetime | None = None
    changed_at: dt.datetime | None = None
    day: int = 0

    def __str__(self) -> str:
        until = "" if self.until is None else f" until {self.until:%Y-%m-%d %H:%M} UTC"
        what = {CLOSED: "goes out again", OPEN: f"is stopped{until}", TRIAL: f"is on trial, at most{until}"}[self.state]
        return f"mail of {self.domain} to {self.provider} {what}: {self.reason}"


def all_breakers(connection: Connection) -> list[DomainBreaker]:
    """Every breaker that was ever open."""
    table = models.DomainBreaker
    return [DomainBreaker(**row) for row in connection.execute(sa.select(table.__table__).order_by(table.domain, table.provider)).mappings()]


def stopped(connection: Connection) -> dict[tuple[int, str], DomainBreaker]:
    """The breaker of each campaign and provider that is not closed."""
    shut = [breaker for breaker in all_breakers(connection) if breaker.state != CLOSED]
    if not shut:
        return {}
    domains = from_domains.in_states(connection, _STATES)
    return {(campaign_id, breaker.provider): breaker for campaign_id, domain in domains.items() for breaker in shut if breaker.domain == domain}


def judge(engine: Engine, now: dt.datetime | None = None, rules: DomainRules | None = None) -> list[DomainBreaker]:
    """Open, try or close breakers by what the provider has told; returns those that changed. `now` is the database's time if not given.

    Two reads when nothing has to change. Safe to repeat, and to run in several places at once: one of them makes a change.
    """
    rules = rules or domain_rules()
    with reading(engine) as connection:
        moment = now or database_now(connection)
        breakers = all_breakers(connection)
        # A breaker may be open for longer than days count, and the day that opened it may be corrected meanwhile.
        first = min([day_of(moment) - rules.told_days * DAY, *(breaker.day for breaker in breakers if breaker.state == OPEN)])
        rates: defaultdict[str, dict[int, float]] = defaultdict(dict)
        for told in readings.read(connection, first, source=rules.by):
            if told.spam_rate is not None:
                rates[told.subject][told.day] = told.spam_rate
    seen = {(breaker.domain, breaker.provider): breaker.changed_at for breaker in breakers}

    def write(connection: Connection, after: DomainBreaker) -> bool:
        return _write(connection, after, seen.get((after.domain, after.provider)))

    return [after for after in decide(rates, breakers, rules, moment) if transact(engine, functools.partial(write, after=after))]


def decide(rates: Mapping[str, Mapping[int, float]], breakers: Iterable[DomainBreaker], rules: DomainRules, now: dt.datetime) -> list[DomainBreaker]:
    """The breakers that have to change, as they have to become; `rates` are the parts reported as spam, by domain and day."""
    known = {breaker.domain: breaker for breaker in breakers if breaker.provider == rules.provider}
    changed = []
    for domain in sorted(rates.keys() | known.keys()):
        after = _next(known.get(domain, DomainBreaker(domain, rules.provider)), rates.get(domain, {}), rules, now)
        if after is not None:
            changed.append(replace(after, changed_at=now))
    return changed


def _next(before: DomainBreaker, rates: Mapping[int, float], rules: DomainRules, now: dt.datetime) -> DomainBreaker | None:
    """What a breaker becomes, if that is another."""
    if before.state == OPEN:
        if rates.get(before.day, rules.open) < rules.open:
            corrected = f"{rates[before.day]:.2%} reported as spam on {date_of(before.day)}, as {rules.by} now says"
            return replace(before, state=CLOSED, reason=corrected, trips=before.trips - 1, until=None)
        return _on_trial(before, rules, now) if before.until is not None and before.until <= now else None
    later = [day for day in rates if day > max(before.day, day_of(now) - rules.told_days * DAY)]
    day = max(later, default=before.day)
    rate = rates[day] if later else None
    words = "" if rate is None else f"{rate:.2%} reported as spam on {date_of(day)} ({rules.by})"
    if rate is not None and rate >= rules.open:
        forgotten = before.changed_at is None or (before.state == CLOSED and now - before.changed_at > rules.forget)
        trips = 1 if forgotten else before.trips + 1
        wait = min(rules.first_wait * 2 ** min(trips - 1, 20), rules.last_wait)
        return replace(before, state=OPEN, reason=f"{words}, the limit is {rules.open:.2%}", trips=trips, until=now + wait, day=day)
    if before.state == TRIAL:
        if rate is not None and rate < rules.close:
            return replace(before, state=CLOSED, reason=words, until=None, day=day)
        if before.until is not None and before.until <= now:
            return replace(before, state=CLOSED, reason=f"no day of the trial had {rules.open:.2%} reported as spam", until=None, day=day)
    return None


def _on_trial(before: DomainBreaker, rules: DomainRules, now: dt.datetime) -> DomainBreaker:
    return replace(before, state=TRIAL, until=now + rules.quiet, day=max(before.day, day_of(now)))


def try_now(engine: Engine, domain: str, now: dt.datetime) -> bool:
    """Begin the trial of an open breaker without waiting further; false if it is not open."""
    with reading(engine) as connection:
        before = next((one for one in all_breakers(connection) if (one.domain, one.state) == (domain, OPEN)), None)
    if before is None:
        return False
    after = replace(_on_trial(before, domain_rules(), now), changed_at=now)
    return transact(engine, lambda connection: _write(connection, after, before.changed_at))


def _write(connection: Connection, breaker: DomainBreaker, seen: dt.datetime | None) -> bool:
    """Make a change, with the grants that follow from it; false if somebody else has changed the breaker since it was `seen`."""
    table = models.DomainBreaker
    ours = (table.domain == breaker.domain, table.provider == breaker.provider)
    if seen is not None:
        if connection.execute(sa.update(table).where(*ours, table.changed_at == seen).values(**asdict(breaker))).rowcount != 1:
            return False
    elif connection.execute(sa.select(table.state).where(*ours).with_for_update()).first() is not None:
        return False
    else:
        connection.execute(sa.insert(table).values(**asdict(breaker)))
    keep_open(connection)
    return True


def keep_open(connection: Connection) -> None:
    """Take what is unspent of all campaigns whose breaker is open: when one opens, and once more after grants were written, by whoever had not seen it open."""
    campaigns: defaultdict[str, list[int]] = defaultdict(list)
    for (campaign_id, provider), breaker in stopped(connection).items():
        if breaker.state == OPEN:
            campaigns[provider].append(campaign_id)
    for provider, numbers in sorted(campaigns.items()):
        ours = (Allotment.campaign_id.in_(numbers), Allotment.provider == provider, Allotment.slot_start >= slot_at(database_now(connection)))
        connection.execute(sa.update(Allotment).where(*ours, Allotment.granted > Allotment.used).values(granted=0))
