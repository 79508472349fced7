"""Warm-up: how many messages a server may send to a provider on a day, for as long as its address has no name yet.

What belongs here: where each server stands on its curve, and the judgement of each day that is over. What does not: curves and thresholds
(`warm_up.toml`), what a day means (`warm_up_rules`), what it counted (`warm_up_days`), what providers told (`told`), and keeping the cap, which every claim
does: it reads `warm_ups`.

A day is judged once, by whoever comes first, also when nobody came for days: then one after the other, against the cap of the step reached.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeAlias, TypeVar

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine

from mail_pipelines.capacity import told, warm_up_days
from mail_pipelines.capacity.warm_up_days import DAY, Pair, day_of
from mail_pipelines.capacity.warm_up_rules import Counts, Judgement, Rules, Told, Verdict, WarmUpError, rules
from mail_pipelines.capacity.warm_up_rules import judge as judge_day
from mail_pipelines.database.engine import database_now, reading, transact
from mail_pipelines.database.models import ProviderUsage, Server, WarmUp, WarmUpDay
from mail_pipelines.database.upsert import put
from mail_pipelines.dispatch import registry, servers

# The row of all providers that have none.
ANY = "*"
# In place of a curve: no warm-up.
NONE = "none"
# Of more days that nobody judged the first are forgotten.
_MOST_DAYS = 60
_WEEK = 7 * DAY
# By day and provider.
_Days: TypeAlias = Mapping[int, Mapping[str, Counts]]
_Words: TypeAlias = Mapping[int, Mapping[str, Sequence[Told]]]
_Found = TypeVar("_Found")


@dataclass(frozen=True)
class Standing:
    """Where a server stands with a provider, as in `warm_ups`; `used` messages of the day."""

    server_id: int
    provider: str
    curve: str
    step: int
    per_day: int | None
    judged: int
    last_used: int | None
    reason: str
    used: int = 0

    @property
    def words(self) -> str:
        if self.per_day is None:
            return f"warm ({self.curve})"
        curve = rules().curves.get(self.curve)
        return f"step {self.step}{f' of {curve.end}' if curve else ''} ({self.curve}): {self.used:,} of {self.per_day:,} used today"


@dataclass(frozen=True)
class Day:
    """A day of the history."""

    provider: str
    day: dt.date
    step: int
    per_day: int | None
    counts: Counts
    verdict: Verdict
    why: str


@dataclass(frozen=True)
class Change:
    """A step that was taken after a day, by its rule."""

    server: str
    provider: str
    day: dt.date
    before: int
    judgement: Judgement

    def __str__(self) -> str:
        return f"warm-up of {self.server} to {self.provider}: step {self.before} → {self.judgement.step} after {self.day}: {self.judgement.why}"


# --- standing -----------------------------------------------------------------------------------------------------


def standings(connection: Connection, now: dt.datetime, server_id: int | None = None) -> list[Standing]:
    """Of all servers that have a warm-up, or of one."""
    today = sa.and_(
        ProviderUsage.server_id == WarmUp.server_id,
        ProviderUsage.provider == WarmUp.provider,
        ProviderUsage.window_seconds == DAY,
        ProviderUsage.window_start == day_of(now),
    )
    query = sa.select(WarmUp.__table__, sa.func.coalesce(ProviderUsage.used, 0).label("used")).outerjoin(ProviderUsage, today)
    if server_id is not None:
        query = query.where(WarmUp.server_id == server_id)
    return [Standing(**row) for row in connection.execute(query.order_by(WarmUp.server_id, WarmUp.provider)).mappings()]


def history(connection: Connection, server_id: int, most: int) -> list[Day]:
    """The judged days of a server, newest first."""
    query = sa.select(WarmUpDay.__table__).where(WarmUpDay.server_id == server_id).order_by(WarmUpDay.day.desc(), WarmUpDay.provider).limit(most)
    return [Day(row.provider, _date(row.day), row.step, row.per_day, _counts(row), Verdict(row.verdict), row.why) for row in connection.execute(query)]


def caps(connection: Connection, now: dt.datetime) -> dict[Pair, int | None]:
    """The cap of this day, by server and provider (`cap_of` reads it); None: there is none.

    As long as the day before has not been judged it is the least that this may leave, so that nobody is granted what is then too much.
    """
    found: dict[Pair, int | None] = {}
    for row in connection.execute(sa.select(WarmUp.server_id, WarmUp.provider, WarmUp.curve, WarmUp.step, WarmUp.per_day, WarmUp.judged)):
        curve = rules().curves.get(row.curve)
        missing = (day_of(now) - DAY - row.judged) // DAY
        certain = missing <= 0 or row.per_day is None or curve is None or not curve.by_itself
        found[row.server_id, row.provider] = row.per_day if certain or curve is None else min(row.per_day, curve.caps[max(0, row.step - 2 * missing)])
    return found


def cap_of(found: Mapping[Pair, int | None], server_id: int, provider: str) -> int | None:
    """The cap of a pair, as claims find it: that of the provider, or else that of all others."""
    return found[server_id, provider] if (server_id, provider) in found else found.get((server_id, ANY))


def day_caps(connection: Connection, days: int) -> dict[Pair, tuple[int | None, ...]]:
    """The caps of today and the days after it, `days` in all, if all of them are good; None: no cap.

    By server and provider, where the provider `*` means all those of the server that are not named. Servers that are not named have no warm-up.
    """
    found: dict[Pair, tuple[int | None, ...]] = {}
    for row in connection.execute(sa.select(WarmUp.server_id, WarmUp.provider, WarmUp.curve, WarmUp.step, WarmUp.per_day)):
        curve = rules().curves.get(row.curve)
        # Each tick asks for all servers: by slices, not cap by cap.
        later = curve.caps[row.step + 1 : row.step + days] if curve and curve.by_itself else (row.per_day,) * (days - 1)
        found[row.server_id, row.provider] = (row.per_day, *later, *(None,) * (days - 1 - len(later)))[:days]
    return found


# --- by hand ------------------------------------------------------------------------------------------------------


def set_by_hand(connection: Connection, key: str, now: dt.datetime, *, provider: str | None = None, curve: str | None = None, step: int | None = None) -> None:
    """Begin a warm-up on a curve, change curve or step, or with the curve `none` end it; for all providers of a server, or for one.

    A new curve begins at its first step unless `step` is given; a step behind the last one is the end. Raises `WarmUpError` if there is nothing to change.
    """
    server = servers.find(connection, key)
    if curve == NONE:
        if provider is not None:
            raise WarmUpError(f"a warm-up is ended for all providers: leave {provider} out, or set its step to the end of the curve")
        connection.execute(sa.delete(WarmUp).where(WarmUp.server_id == server.id))
        registry.settle_warmth(connection, key)
        return
    if curve is not None:
        rules().curve(curve)
    if step is not None and step < 0:
        raise WarmUpError(f"step {step} is none: the first is 0")
    rows = {row.provider: row for row in standings(connection, now, server.id)}
    if not rows:
        if curve is None:
            raise WarmUpError(f"server {key} has no warm-up; `mail-pipelines server warm-up {key} --curve NAME` begins one: {', '.join(rules().curves)}")
        # This day will be judged when it is over.
        rows[ANY] = Standing(server.id, ANY, curve, 0, rules().curve(curve).cap(0), day_of(now) - DAY, None, "begun")
    if provider is not None and provider not in rows:
        rows[provider] = replace(rows[ANY], provider=provider)
    changed = []
    for row in rows.values():
        if provider in (None, row.provider):
            known = rules().curve(curve or row.curve)
            wanted = min(known.end, step if step is not None else row.step if curve is None else 0)
            changed.append(replace(row, curve=known.name, step=wanted, per_day=known.cap(wanted), reason=f"set by hand on {now:%Y-%m-%d %H:%M} UTC"))
        else:
            changed.append(row)
    _put(connection, changed)
    registry.settle_warmth(connection, key)


# --- judgement ----------------------------------------------------------------------------------------------------


def judge(engine: Engine, now: dt.datetime | None = None) -> list[Change]:
    """Judge all days that are over and have not been judged; returns the steps that follow. `now` is the database's time if not given.

    One read when there is nothing to judge. Safe to repeat, and to run in several places at once.
    """
    known = rules()
    with reading(engine) as connection:
        yesterday = day_of(now or database_now(connection)) - DAY
        waiting = sa.select(WarmUp.server_id, sa.func.min(WarmUp.judged)).join(Server, Server.id == WarmUp.server_id)
        waiting = waiting.where(WarmUp.judged < yesterday, Server.state != registry.ServerState.RETIRED.value).group_by(WarmUp.server_id)
        due = dict(connection.execute(waiting).tuples().all())
        if not due:
            return []
        first = max(min(due.values()), yesterday - _MOST_DAYS * DAY) + DAY
        counted = {day: warm_up_days.read(connection, day, sorted(due), known.ignored) for day in range(first, yesterday + 1, DAY)}
        heard = {day: told.about_servers(connection, day, sorted(due), known) for day in counted}
        keys = {server.id: server.key for server in servers.all_servers(connection)}
    changes: list[Change] = []
    for server_id in sorted(due):
        days = {day: _of(found, server_id) for day, found in counted.items()}
        words = {day: _of(found, server_id) for day, found in heard.items()}

        def work(connection: Connection, server_id: int = server_id, days: _Days = days, words: _Words = words) -> list[Change]:
            return _judge_server(connection, server_id, keys[server_id], days, words, known)

        changes += transact(engine, work)
    return changes


def _of(found: Mapping[Pair, _Found], server_id: int) -> dict[str, _Found]:
    """What was found of one server, by provider."""
    return {provider: one for (server, provider), one in found.items() if server == server_id}


@dataclass
class Course:
    """One pair while its days are judged. `recent` are days of the past, oldest first, and `written` those that were judged now."""

    at: Standing
    recent: list[tuple[int, Counts, Verdict]]
    written: list[dict[str, object]] = field(default_factory=list)

    def judge(self, day: int, counts: Counts, volume: int, known: Rules, heard: Sequence[Told] = ()) -> Judgement:
        back = max((past for past, _, verdict in self.recent if verdict is Verdict.BACK), default=0)
        first = max(back, day - known.complaint_days * DAY) + DAY
        days = sum((found for past, found, _ in self.recent if past >= first), counts)
        idle_days = 0 if self.at.last_used is None else (day - self.at.last_used) // DAY
        curve = known.curves.get(self.at.curve)
        if curve is None:
            judgement = Judgement(self.at.step, Verdict.HOLD, f"there is no curve {self.at.curve} any more")
        else:
            judgement = judge_day(curve, self.at.step, counts, days, idle_days=idle_days, volume=volume, known=known, told=heard, told_since=back + DAY)
        self.recent.append((day, counts, judgement.verdict))
        if counts.sent or counts.complaints or judgement.step != self.at.step:
            place = {"server_id": self.at.server_id, "provider": self.at.provider, "day": day, "step": self.at.step, "per_day": self.at.per_day}
            self.written.append(place | vars(counts) | {"verdict": judgement.verdict.value, "why": judgement.why[:200]})
        per_day = curve.cap(judgement.step) if curve is not None else self.at.per_day
        reason = self.at.reason if judgement.verdict is Verdict.IDLE else judgement.why[:200]
        used = day if counts.sent else self.at.last_used
        self.at = replace(self.at, step=judgement.step, per_day=per_day, judged=day, last_used=used, reason=reason)
        return judgement


def _judge_server(connection: Connection, server_id: int, key: str, days: _Days, heard: _Words, known: Rules) -> list[Change]:
    rows = connection.execute(sa.select(WarmUp.__table__).where(WarmUp.server_id == server_id).with_for_update()).mappings().all()
    courses = {row["provider"]: Course(Standing(**row), []) for row in rows}
    for row in _past(connection, server_id, min(days) - max(known.complaint_days, known.told_days) * DAY):
        if row.provider in courses:
            courses[row.provider].recent.append((row.day, _counts(row), Verdict(row.verdict)))
    changes = []
    for day, found in days.items():
        for provider, counts in found.items():
            if counts.sent and provider not in courses and ANY in courses:
                courses[provider] = Course(replace(courses[ANY].at, provider=provider, judged=day - DAY), [])
        for provider, course in courses.items():
            if course.at.judged >= day:
                continue
            before, counts = course.at, found.get(provider, Counts())
            forgotten = before.last_used is not None and not counts.sent and day - before.last_used >= known.idle_days * DAY
            volume = _volume(connection, course) if forgotten else 0
            judgement = course.judge(day, counts, volume, known, heard[day].get(provider, ()))
            if judgement.step != before.step:
                changes.append(Change(key, provider, _date(day), before.step, judgement))
    _put(connection, [course.at for course in courses.values()])
    put(connection, WarmUpDay, [row for course in courses.values() for row in course.written])
    registry.settle_warmth(connection, key)
    return changes


def _past(connection: Connection, server_id: int, since: int) -> list[sa.Row[tuple[object, ...]]]:
    return list(connection.execute(sa.select(WarmUpDay.__table__).where(WarmUpDay.server_id == server_id, WarmUpDay.day >= since).order_by(WarmUpDay.day)))


def _volume(connection: Connection, course: Course) -> int:
    """The most messages of a day in the last week with mail."""
    last = course.at.last_used or 0
    mine = (WarmUpDay.server_id == course.at.server_id, WarmUpDay.provider == course.at.provider, WarmUpDay.day > last - _WEEK)
    before: int = connection.execute(sa.select(sa.func.coalesce(sa.func.max(WarmUpDay.sent), 0)).where(*mine)).scalar_one()
    return max([before, *(counts.sent for day, counts, _ in course.recent if day > last - _WEEK)])


def _put(connection: Connection, rows: list[Standing]) -> None:
    columns = [column.name for column in WarmUp.__table__.columns]
    put(connection, WarmUp, [{name: getattr(row, name) for name in columns} for row in sorted(rows, key=lambda row: row.provider)])


def _counts(row: sa.Row[tuple[object, ...]]) -> Counts:
    return Counts(row.sent, row.delivered, row.bounced, row.deferred, row.complaints)


def _date(day: int) -> dt.date:
    return dt.datetime.fromtimestamp(day, dt.UTC).date()
