"""The curves of a warm-up and when a step is taken (`warm_up.toml`), as plain values and one pure rule.

What belongs here: what a day means for the next one. What does not: which server stands where, and what its days counted (`capacity.warm_up`).
"""

from __future__ import annotations

import enum
import functools
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mail_pipelines.errors import MailPipelinesError, nearest
from mail_pipelines.reputation.readings import FILTER_RESULTS, Reading, date_of

RULES = Path(__file__).with_name("warm_up.toml")


class WarmUpError(MailPipelinesError):
    """There is no such curve, or nothing to be set."""


class Verdict(enum.StrEnum):
    """What came of a day."""

    UP = "up"
    HOLD = "hold"
    BACK = "back"
    IDLE = "idle"
    REWARM = "rewarm"


@dataclass(frozen=True)
class Curve:
    """Messages a day by step. `by_itself`: steps are taken by the rule, and not by an operator; `fast`: its first two days are worth an order."""

    name: str
    caps: tuple[int, ...]
    by_itself: bool
    fast: bool = False

    @property
    def end(self) -> int:
        """The step that has no cap any more."""
        return len(self.caps)

    def cap(self, step: int) -> int | None:
        return self.caps[step] if step < self.end else None

    def step_of(self, volume: float) -> int:
        """The highest step that allows no more than so many messages a day; the first if all do."""
        return max((step for step, cap in enumerate(self.caps) if cap <= volume), default=0)


@dataclass(frozen=True)
class Counts:
    """What a server sent to a provider on a day, or on some, and what it was answered; `deferred` without the classes that are ignored."""

    sent: int = 0
    delivered: int = 0
    bounced: int = 0
    deferred: int = 0
    complaints: int = 0

    def __add__(self, other: Counts) -> Counts:
        return Counts(
            self.sent + other.sent,
            self.delivered + other.delivered,
            self.bounced + other.bounced,
            self.deferred + other.deferred,
            self.complaints + other.complaints,
        )


@dataclass(frozen=True)
class Signal:
    """From which part of the answers on no step is taken, and from which on one or two steps back."""

    of: str
    ignored: frozenset[str]
    least: int
    hold: float
    back: float
    far_back: float

    def part(self, day: Counts, days: Counts) -> float:
        """The bad part: of complaints among what was delivered in the last days, of others among the day's answers. 0 if they are too few."""
        if self.of == "complaints":
            bad, total = days.complaints, days.delivered
        else:
            bad, total = (day.deferred if self.of == "deferrals" else day.bounced), day.delivered + day.bounced + day.deferred
        return bad / max(total, bad) if bad >= self.least else 0.0


_MEASURES = {"spam_rate": "reported as spam", "filter_result": "as filter result", "trap_hits": "trap hits"}


@dataclass(frozen=True)
class ToldSignal:
    """From which value of a measure of `reputation.readings` on no step is taken, and from which on one or two steps back (None: from none)."""

    of: str
    by: str
    provider: str
    hold: float
    back: float
    far_back: float | None

    def number(self, value: float) -> str:
        """A value of this measure, for people."""
        if self.of == "filter_result":
            return FILTER_RESULTS[int(value)]
        return f"{value:.2%}" if self.of == "spam_rate" else f"{value:g}"


@dataclass(frozen=True)
class Told:
    """What a provider told of one of our domains or addresses, by the measure of one signal."""

    signal: ToldSignal
    reading: Reading

    @property
    def value(self) -> float:
        return self.reading.measure(self.signal.of) or 0.0

    def reaches(self, limit: str) -> bool:
        """Whether the value is at one of the signal's limits: hold, back or far_back."""
        given: float | None = getattr(self.signal, limit)
        return given is not None and self.value >= given

    def words(self, limit: str) -> str:
        """The value and the limit, for people."""
        what = f"{self.signal.number(self.value)} {_MEASURES[self.signal.of]} of {self.reading.subject} on {date_of(self.reading.day)}"
        return f"{what} ({self.signal.by}), the limit is {self.signal.number(getattr(self.signal, limit))}"


@dataclass(frozen=True)
class Rules:
    curves: Mapping[str, Curve]
    signals: tuple[Signal, ...]
    told: tuple[ToldSignal, ...]
    used_share: float
    idle_days: int
    complaint_days: int
    told_days: int

    def curve(self, name: str) -> Curve:
        if name not in self.curves:
            raise WarmUpError(f"there is no warm-up curve {name!r}; {nearest(name, self.curves)}")
        return self.curves[name]

    @property
    def ignored(self) -> frozenset[str]:
        """The classes of deferrals that are not counted."""
        return frozenset[str]().union(*(signal.ignored for signal in self.signals))


@functools.cache
def rules() -> Rules:
    raw = tomllib.loads(RULES.read_text(encoding="utf-8"))
    curves = {name: Curve(name, tuple(curve["caps"]), curve["by_itself"], curve.get("fast", False)) for name, curve in raw["curve"].items()}
    signals = tuple(
        Signal(signal["of"], frozenset(signal.get("ignored", ())), signal["least"], signal["hold"], signal["back"], signal["far_back"])
        for signal in raw["signal"]
    )
    told = tuple(ToldSignal(one["of"], one["by"], one["provider"], one["hold"], one["back"], one.get("far_back")) for one in raw["told"])
    return Rules(curves, signals, told, raw["used_share"], raw["idle_days"], raw["complaint_days"], raw["told_days"])


@dataclass(frozen=True)
class Judgement:
    """The step of the days to come, and why."""

    step: int
    verdict: Verdict
    why: str


def judge(
    curve: Curve, step: int, day: Counts, days: Counts, *, idle_days: int, volume: int, known: Rules, told: Sequence[Told] = (), told_since: int = 0
) -> Judgement:
    """What a day at `step` means.

    `days` are the last ones, this one among them, since the last step back. `idle_days` is how many days without mail end with this one, `volume` the most
    messages of a day before them. `told` is what the provider told last; of days before `told_since`, for which a step back was taken, it only holds.
    """
    if not day.sent:
        half = min(step, curve.step_of(volume / 2))
        if curve.by_itself and idle_days >= known.idle_days and half < step:
            return Judgement(half, Verdict.REWARM, f"{idle_days} days without mail: the step of half of {volume:,} a day")
        return Judgement(step, Verdict.IDLE, "no mail")
    cap = curve.cap(step)
    if cap is None:
        return Judgement(step, Verdict.HOLD, "warm")
    used = day.sent / cap
    share = f"used {used:.0%} of {cap:,}"
    if not curve.by_itself:
        return Judgement(step, Verdict.HOLD, f"{share}; steps are taken by hand")
    parts = [(signal, signal.part(day, days)) for signal in known.signals]
    for steps, limit in ((2, "far_back"), (1, "back"), (0, "hold")):
        bad = [(signal, part) for signal, part in parts if part and part >= getattr(signal, limit)]
        worse = [one for one in told if one.reaches(limit) and (not steps or one.reading.day >= told_since)]
        if bad or worse:
            answered = (f"{part:.2%} {signal.of}, the limit is {getattr(signal, limit):.2%}" for signal, part in bad)
            why = ", ".join([*answered, *(one.words(limit) for one in worse)])
            return Judgement(max(0, step - steps), Verdict.BACK if steps and step else Verdict.HOLD, why)
    if used < known.used_share:
        return Judgement(step, Verdict.HOLD, f"{share}, fewer than {known.used_share:.0%}")
    return Judgement(step + 1, Verdict.UP, f"{share} with good signals")
