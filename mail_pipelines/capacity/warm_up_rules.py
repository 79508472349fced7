"""The curves of a warm-up and when a step is taken (`warm_up.toml`), as plain values and one pure rule.

What belongs here: what a day means for the next one. What does not: which server stands where, and what its days counted (`capacity.warm_up`).
"""

from __future__ import annotations

import enum
import functools
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from mail_pipelines.errors import MailPipelinesError, nearest

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


@dataclass(frozen=True)
class Rules:
    curves: Mapping[str, Curve]
    signals: tuple[Signal, ...]
    used_share: float
    idle_days: int
    complaint_days: int

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
    return Rules(curves, signals, raw["used_share"], raw["idle_days"], raw["complaint_days"])


@dataclass(frozen=True)
class Judgement:
    """The step of the days to come, and why."""

    step: int
    verdict: Verdict
    why: str


def judge(curve: Curve, step: int, day: Counts, days: Counts, *, idle_days: int, volume: int, known: Rules) -> Judgement:
    """What a day at `step` means.

    `days` are the last ones, this one among them, since the last step back. `idle_days` is how many days without mail end with this one, `volume` the most
    messages of a day before them.
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
        if bad:
            why = ", ".join(f"{part:.2%} {signal.of}, the limit is {getattr(signal, limit):.2%}" for signal, part in bad)
            return Judgement(max(0, step - steps), Verdict.BACK if steps and step else Verdict.HOLD, why)
    if used < known.used_share:
        return Judgement(step, Verdict.HOLD, f"{share}, fewer than {known.used_share:.0%}")
    return Judgement(step + 1, Verdict.UP, f"{share} with good signals")
