"""Breakers: a provider that refuses one server gets no more mail from that server until a trial shows that it takes some again.

What belongs here: what the recorded outcomes of the last minutes mean for each server and provider, and making it so. A breaker acts through
the grants, which every claim checks and locks: opening one takes them away, and the filler (`allotments`) gives none while it is not
closed. What does not: the thresholds (`delivery.breakers`), and stopping a whole campaign (`campaigns.stopping`).

```
closed ─rule met→ open ─waited→ trial ─one accepted, none refused→ closed
                    ↑─────────────┘ refused again: waits twice as long
```
"""

from __future__ import annotations

import datetime as dt
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine

from mail_pipelines.database import models
from mail_pipelines.database.engine import database_now, reading, transact
from mail_pipelines.database.models import Allotment, Campaign, CampaignMinute, State
from mail_pipelines.delivery.breakers import ProviderRules, provider_rules
from mail_pipelines.delivery.recording import slot_at

CLOSED, OPEN, TRIAL = "closed", "open", "trial"
_ANSWERS = (State.DELIVERED, State.BOUNCED, State.DEFERRED)
# Their outcomes may still come in.
_LIVE = ("sending", "paused", "cancelled")
Pair = tuple[int, str]


@dataclass(frozen=True)
class Breaker:
    """The breaker of one server towards one provider. `reason` is for people; an open one waits until `until`.

    `baseline` are the answers that the minute of `changed_at` had by then, by state and class: they do not count any more.
    """

    server_id: int
    provider: str
    state: str = CLOSED
    rule: str = ""
    reason: str = ""
    trips: int = 0
    until: dt.datetime | None = None
    changed_at: dt.datetime | None = None
    baseline: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Answers:
    """How many answers of a class a server got from a provider in a minute (epoch minutes)."""

    server_id: int
    provider: str
    minute: int
    state: State
    reason: str
    count: int

    @property
    def name(self) -> str:
        return f"{self.state.name.lower()} {self.reason}"


def all_breakers(connection: Connection) -> list[Breaker]:
    """Every breaker that was ever open."""
    table = models.Breaker
    columns = (table.server_id, table.provider, table.state, table.rule, table.reason, table.trips, table.until, table.changed_at, table.baseline)
    return [Breaker(**row._mapping) for row in connection.execute(sa.select(*columns).order_by(table.server_id, table.provider))]


def keep_open(connection: Connection, pairs: Collection[Pair]) -> None:
    """Take grants away once more of those of these lines that are open: who has written some meanwhile may not have seen the breaker open."""
    stopped = [pair for pair, state in not_closed(connection).items() if state == OPEN and pair in pairs]
    for server_id, provider in sorted(stopped):
        ours = (Allotment.server_id == server_id, Allotment.provider == provider, Allotment.slot_start >= slot_at(database_now(connection)))
        connection.execute(sa.update(Allotment).where(*ours, Allotment.granted > Allotment.used).values(granted=0))


def not_closed(connection: Connection) -> dict[Pair, str]:
    """The state of each breaker that stops or limits sending."""
    return {(breaker.server_id, breaker.provider): breaker.state for breaker in all_breakers(connection) if breaker.state != CLOSED}


def judge(engine: Engine, now: dt.datetime | None = None, rules: ProviderRules | None = None) -> list[Breaker]:
    """Open, try or close breakers by the outcomes recorded in the last minutes; returns those that changed. `now` is the database's time if not given.

    Two reads when nothing has to change. Safe to repeat, and to run in several places at once: one of them makes a change.
    """
    rules = rules or provider_rules()
    with reading(engine) as connection:
        moment = now or database_now(connection)
        answers = _answers(connection, moment - rules.window)
        breakers = all_breakers(connection)
    changed = decide(answers, breakers, rules, moment)
    return [breaker for breaker in changed if transact(engine, lambda connection, breaker=breaker: _write(connection, breaker, rules, moment, breakers))]  # type: ignore[misc]


def decide(answers: Iterable[Answers], breakers: Iterable[Breaker], rules: ProviderRules, now: dt.datetime) -> list[Breaker]:
    """The breakers that have to change, as they have to become. Answers from before a breaker's last change do not count."""
    by_pair: defaultdict[Pair, list[Answers]] = defaultdict(list)
    for answer in answers:
        by_pair[answer.server_id, answer.provider].append(answer)
    known = {(breaker.server_id, breaker.provider): breaker for breaker in breakers}
    changed = []
    for pair in by_pair.keys() | known.keys():
        before = known.get(pair, Breaker(*pair))
        after = _next(before, _since_change(before, by_pair[pair]), rules, now)
        if after is not None:
            changed.append(_changed(after, by_pair[pair], now))
    return sorted(changed, key=lambda breaker: (breaker.server_id, breaker.provider))


def _since_change(breaker: Breaker, answers: Iterable[Answers]) -> list[Answers]:
    """The answers that came after the breaker's last change."""
    if breaker.changed_at is None:
        return list(answers)
    minute = _minute(breaker.changed_at)
    later = [answer for answer in answers if answer.minute > minute]
    same = [replace(answer, count=answer.count - breaker.baseline.get(answer.name, 0)) for answer in answers if answer.minute == minute]
    return later + [answer for answer in same if answer.count > 0]


def _changed(breaker: Breaker, answers: Iterable[Answers], now: dt.datetime) -> Breaker:
    """The breaker as changed now, with the answers that count no more."""
    return replace(breaker, changed_at=now, baseline={answer.name: answer.count for answer in answers if answer.minute == _minute(now)})


def _minute(moment: dt.datetime) -> int:
    return int(moment.timestamp()) // 60


def _next(breaker: Breaker, answers: list[Answers], rules: ProviderRules, now: dt.datetime) -> Breaker | None:
    """What a breaker becomes, if that is another."""
    if breaker.state == OPEN:
        return replace(breaker, state=TRIAL, until=None) if breaker.until is not None and breaker.until <= now else None
    total = sum(answer.count for answer in answers)
    for rule in rules.rules:
        bad = sum(answer.count for answer in answers if answer.reason in rule.classes)
        if rule.trips(bad, total) or (breaker.state == TRIAL and rule.id == breaker.rule and bad):
            forgotten = breaker.changed_at is None or (breaker.state == CLOSED and now - breaker.changed_at > rules.forget)
            trips = 1 if forgotten else breaker.trips + 1
            wait = min(rule.first_wait * 2 ** min(trips - 1, 20), rules.last_wait)
            reason = f"{bad:,} of {total:,} answers: {', '.join(sorted(rule.classes))}"
            return replace(breaker, state=OPEN, rule=rule.id, reason=reason, trips=trips, until=now + wait)
    if breaker.state == TRIAL and any(answer.state is State.DELIVERED for answer in answers):
        return replace(breaker, state=CLOSED)
    return None


def try_now(engine: Engine, server_id: int, provider: str, now: dt.datetime) -> bool:
    """Begin the trial of an open breaker without waiting further; false if it is not open."""
    rules = provider_rules()
    with reading(engine) as connection:
        answers = [answer for answer in _answers(connection, now) if (answer.server_id, answer.provider) == (server_id, provider)]
        known = all_breakers(connection)
    breaker = next((one for one in known if (one.server_id, one.provider, one.state) == (server_id, provider, OPEN)), None)
    if breaker is None:
        return False
    trial = _changed(replace(breaker, state=TRIAL, until=None), answers, now)
    return transact(engine, lambda connection: _write(connection, trial, rules, now, known))


def _answers(connection: Connection, since: dt.datetime) -> list[Answers]:
    """The outcomes of live campaigns from a moment on, by minute, server, provider and class."""
    by = (CampaignMinute.server_id, CampaignMinute.provider, CampaignMinute.minute, CampaignMinute.state, CampaignMinute.reason)
    live = connection.execute(sa.select(Campaign.id).where(Campaign.state.in_(_LIVE), sa.func.coalesce(Campaign.finished_at, since) >= since)).scalars().all()
    query = (
        sa.select(*by, sa.func.sum(CampaignMinute.count).label("answers"))
        .where(
            CampaignMinute.campaign_id.in_(live),
            CampaignMinute.minute >= _minute(since),
            CampaignMinute.server_id != 0,
            CampaignMinute.state.in_([int(state) for state in _ANSWERS]),
        )
        .group_by(*by)
    )
    rows = connection.execute(query) if live else ()
    return [Answers(row.server_id, row.provider, row.minute, State(row.state), row.reason, int(row.answers)) for row in rows]


def _write(connection: Connection, breaker: Breaker, rules: ProviderRules, now: dt.datetime, before: Iterable[Breaker]) -> bool:
    """Make a change, with the grants that follow from it; false if somebody else has changed the breaker meanwhile."""
    table = models.Breaker
    ours = (table.server_id == breaker.server_id, table.provider == breaker.provider)
    values: Mapping[str, object] = {
        "state": breaker.state,
        "rule": breaker.rule,
        "reason": breaker.reason,
        "trips": breaker.trips,
        "until": breaker.until,
        "changed_at": breaker.changed_at,
        "baseline": dict(breaker.baseline),
    }
    known = {(one.server_id, one.provider): one.changed_at for one in before}
    if (breaker.server_id, breaker.provider) in known:
        seen = known[breaker.server_id, breaker.provider]
        if connection.execute(sa.update(table).where(*ours, table.changed_at == seen).values(**values)).rowcount != 1:
            return False
    elif connection.execute(sa.select(table.state).where(*ours).with_for_update()).first() is not None:
        return False
    else:
        connection.execute(sa.insert(table).values(server_id=breaker.server_id, provider=breaker.provider, **values))
    if breaker.state != CLOSED:
        granted: sa.ColumnElement[int] | int = 0 if breaker.state == OPEN else Allotment.used + rules.trial_messages
        grants = (Allotment.server_id == breaker.server_id, Allotment.provider == breaker.provider, Allotment.slot_start >= slot_at(now))
        connection.execute(sa.update(Allotment).where(*grants).values(granted=granted))
    return True
