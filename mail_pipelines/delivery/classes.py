"""Replies to classes: what a destination's code and words mean for the address, the server and the campaign. Rules are data (`replies.toml`)."""

from __future__ import annotations

import enum
import functools
import re
import tomllib
from dataclasses import dataclass
from pathlib import Path

RULES = Path(__file__).with_name("replies.toml")
# The class whose rows wait for the server that was told so (`dispatch.greylisting`).
GREYLISTED = "greylisted"


class Action(enum.StrEnum):
    """What follows from a class; `replies.toml` explains each."""

    HARD = "hard"
    HARD_SECOND = "hard_second"
    SOFT = "soft"
    RETRY = "retry"
    SHAPE = "shape"
    BREAKER = "breaker"
    CAMPAIGN = "campaign"
    ALERT = "alert"


@dataclass(frozen=True)
class Meaning:
    """The class of a reply, what to do about it, and which rule said so."""

    reason: str
    action: Action
    rule: str


UNCLASSIFIED = Meaning("unclassified", Action.RETRY, "none")


@dataclass(frozen=True)
class _Rule:
    meaning: Meaning
    provider: str | None
    text: re.Pattern[str] | None
    enhanced: re.Pattern[str] | None
    codes: frozenset[int]

    def matches(self, provider: str, code: int | None, enhanced: str | None, text: str) -> bool:
        return (
            (self.provider is None or self.provider == provider)
            and (not self.codes or code in self.codes)
            and (self.enhanced is None or (enhanced is not None and self.enhanced.fullmatch(enhanced) is not None))
            and (self.text is None or self.text.search(text) is not None)
        )


@functools.cache
def _rules() -> tuple[_Rule, ...]:
    document = tomllib.loads(RULES.read_text(encoding="utf-8"))
    return tuple(
        _Rule(
            Meaning(raw["class"], Action(raw["action"]), raw["id"]),
            raw.get("provider"),
            re.compile(raw["text"], re.IGNORECASE) if "text" in raw else None,
            re.compile("|".join(re.escape(code).replace(r"\*", r"\d+") for code in raw["enhanced"])) if "enhanced" in raw else None,
            frozenset(raw.get("code", ())),
        )
        for raw in document["rule"]
    )


@functools.lru_cache(maxsize=4096)
def classify(provider: str, code: int | None, enhanced: str | None, text: str) -> Meaning:
    """The meaning of a refusal or deferral by a provider group."""
    return next((rule.meaning for rule in _rules() if rule.matches(provider, code, enhanced, text)), UNCLASSIFIED)


@functools.cache
def classes_of(*actions: Action) -> frozenset[str]:
    """The classes of all rules with one of these actions."""
    return frozenset(rule.meaning.reason for rule in _rules() if rule.meaning.action in actions)


def bad_address_classes() -> frozenset[str]:
    """The classes that say the address itself is bad: a bounce of one of them is a hard bounce."""
    return classes_of(Action.HARD, Action.HARD_SECOND)
