"""Which recipient domains do not answer (table `domain_health`), learnt from how offers end, and shared by all servers and campaigns.

What belongs here: what the end of a claim says about domains. What does not: leaving out the rows of dead domains and letting one row in a while
ask (`dispatch.claiming`), and how many connections may wait for an answer (`dispatch.meetings`).

```
nothing known ─silence→ dead until now + wait ─due→ one row asks ─silence→ dead, twice as long
      ↑                                                │
      └──────────────── any answer ────────────────────┘
```
"""

from __future__ import annotations

import datetime as dt
import functools
import tomllib
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from mail_pipelines.database.models import CampaignMinute, DomainHealth, State
from mail_pipelines.database.types import utc_now
from mail_pipelines.database.upsert import put
from mail_pipelines.delivery.recording import ClaimRef, Result

RULES = Path(__file__).with_name("domain_health.toml")
NO_CONNECTION = "no_connection"
_ANSWERS = (State.DELIVERED, State.BOUNCED, State.DEFERRED)


@dataclass(frozen=True)
class Rules:
    """`silent_seconds`: an offer that failed sooner held nothing up. The others as in `domain_health.toml`."""

    silent_seconds: float
    first_wait: dt.timedelta
    last_wait: dt.timedelta
    window_minutes: int

    def wait(self, failures: int) -> dt.timedelta:
        """How long a domain is left alone after so many failures in a row."""
        return min(self.first_wait * (1 << min(failures - 1, 20)), self.last_wait)


@functools.cache
def rules() -> Rules:
    raw = tomllib.loads(RULES.read_text(encoding="utf-8"))
    first, last = (dt.timedelta(seconds=raw[f"{name}_wait_seconds"]) for name in ("first", "last"))
    return Rules(raw["silent_seconds"], first, last, raw["window_minutes"])


@dataclass(frozen=True)
class Health:
    """What is held against a domain."""

    failures: int
    dead_until: dt.datetime
    changed_at: dt.datetime


@dataclass(frozen=True)
class Lesson:
    """What the end of a claim says: domains of which every offer met silence, and domains held for dead that have answered."""

    silent: frozenset[str] = frozenset()
    alive: frozenset[str] = frozenset()

    def __bool__(self) -> bool:
        return bool(self.silent or self.alive)


def lesson(results: Sequence[Result], domains: Mapping[int, str], slow: Collection[int], asking: Iterable[int]) -> Lesson:
    """The lesson of a claim. `domains` by contact; contacts whose offer took `silent_seconds` or more, and those that ask for a dead domain."""
    silent, answered = set(), set()
    for result in results:
        if result.reason == NO_CONNECTION and result.contact_id in slow:
            silent.add(domains[result.contact_id])
        elif result.state in _ANSWERS:
            answered.add(domains[result.contact_id])
    suspects = {domains[contact_id] for contact_id in asking}
    return Lesson(frozenset(silent - answered), frozenset(answered & suspects))


def after(before: Health | None, opened_at: dt.datetime, now: dt.datetime, *, hears: bool) -> Health | None:
    """What silence towards a claim of `opened_at` makes of what was held against a domain; None: nothing new.

    An offer from before the last failure was recorded says no more than that did. A server that hears nothing from anybody says nothing against a
    domain, and what was known of one stays: its wait is repeated and not doubled.
    """
    if (before is None and not hears) or (before is not None and opened_at < before.changed_at):
        return None
    failures = (before.failures if before else 0) + hears
    return Health(failures, now + rules().wait(failures), now)


def learn(connection: Connection, claim: ClaimRef, learnt: Lesson) -> None:
    """Write what a claim has taught, in the transaction that records it, after the recording. No statement if that is nothing."""
    if learnt.alive:
        connection.execute(sa.delete(DomainHealth).where(DomainHealth.domain.in_(sorted(learnt.alive))))
    if not learnt.silent:
        return
    now: dt.datetime = connection.execute(sa.select(utc_now())).scalar_one()
    hears = _hears(connection, claim, now)
    columns = (DomainHealth.domain, DomainHealth.failures, DomainHealth.dead_until, DomainHealth.changed_at)
    held = connection.execute(sa.select(*columns).where(DomainHealth.domain.in_(sorted(learnt.silent))).order_by(DomainHealth.domain).with_for_update())
    known = {row.domain: Health(row.failures, row.dead_until, row.changed_at) for row in held}
    changed = {domain: after(known.get(domain), claim.opened_at, now, hears=hears) for domain in sorted(learnt.silent)}
    put(
        connection,
        DomainHealth,
        [
            {"domain": domain, "failures": health.failures, "dead_until": health.dead_until, "changed_at": health.changed_at}
            for domain, health in changed.items()
            if health is not None
        ],
    )


def _hears(connection: Connection, claim: ClaimRef, now: dt.datetime) -> bool:
    """Whether the claim's server was answered more often than not, of late: otherwise it is the server's own network that is silent."""
    unanswered = sa.func.sum(sa.case((CampaignMinute.reason == NO_CONNECTION, CampaignMinute.count), else_=0))
    offers, silent = connection.execute(
        sa.select(sa.func.sum(CampaignMinute.count), unanswered).where(
            CampaignMinute.campaign_id == claim.campaign_id,
            CampaignMinute.minute > int(now.timestamp()) // 60 - rules().window_minutes,
            CampaignMinute.server_id == claim.server_id,
            CampaignMinute.state.in_([int(state) for state in _ANSWERS]),
        )
    ).one()
    return int(silent or 0) * 2 <= int(offers or 0)


@dataclass(frozen=True)
class DeadDomain:
    domain: str
    failures: int
    dead_until: dt.datetime


def dead_domains(connection: Connection, most: int) -> list[DeadDomain]:
    """Domains that are left alone, the longest silent first, at most `most`."""
    query = sa.select(DomainHealth.domain, DomainHealth.failures, DomainHealth.dead_until).order_by(DomainHealth.failures.desc(), DomainHealth.domain)
    return [DeadDomain(*row) for row in connection.execute(query.limit(most))]
