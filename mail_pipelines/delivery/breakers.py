"""The thresholds at which sending stops by itself (`breakers.toml`), as plain values.

What belongs here: reading them. What is done about them is in `capacity.breakers` (one server to one provider), `capacity.domain_breakers` (one sending domain)
and `campaigns.stopping` (one campaign).
"""

from __future__ import annotations

import datetime as dt
import enum
import functools
import tomllib
from dataclasses import dataclass
from pathlib import Path

RULES = Path(__file__).with_name("breakers.toml")


@dataclass(frozen=True)
class ProviderRule:
    """Answers of `classes` that stop a server towards a provider: at least `least` of them, and at least `share` of all."""

    id: str
    classes: frozenset[str]
    least: int
    share: float
    first_wait: dt.timedelta

    def trips(self, bad: int, answers: int) -> bool:
        return bad >= self.least and bad >= self.share * answers


@dataclass(frozen=True)
class ProviderRules:
    rules: tuple[ProviderRule, ...]
    trial_messages: int
    window: dt.timedelta
    last_wait: dt.timedelta
    forget: dt.timedelta


class Counts(enum.StrEnum):
    """What a campaign's rule counts."""

    BAD_ADDRESSES = "bad addresses"
    REFUSED_CONTENT = "refused content"
    COMPLAINTS = "complaints"


@dataclass(frozen=True)
class CampaignRule:
    """Bad answers that stop a campaign: at least `share` of at least `least` answers."""

    id: str
    counts: Counts
    least: int
    share: float

    def trips(self, bad: int, answers: int) -> bool:
        return answers >= self.least and bad >= self.share * answers


@dataclass(frozen=True)
class CampaignRules:
    rules: tuple[CampaignRule, ...]
    window: dt.timedelta


@dataclass(frozen=True)
class DomainRules:
    """`open` and `close` are parts of the mail that people reported as spam, as source `by` tells of a domain's mail to `provider`."""

    by: str
    provider: str
    open: float
    close: float
    told_days: int
    first_wait: dt.timedelta
    last_wait: dt.timedelta
    trial_messages: int
    quiet: dt.timedelta
    forget: dt.timedelta


@functools.cache
def provider_rules() -> ProviderRules:
    raw = tomllib.loads(RULES.read_text(encoding="utf-8"))["provider"]
    rules = tuple(
        ProviderRule(rule["id"], frozenset(rule["classes"]), rule["least"], rule["share"], dt.timedelta(minutes=rule["first_wait_minutes"]))
        for rule in raw["rule"]
    )
    window, last_wait, forget = (dt.timedelta(minutes=raw[f"{name}_minutes"]) for name in ("window", "last_wait", "forget"))
    return ProviderRules(rules, raw["trial_messages"], window, last_wait, forget)


@functools.cache
def campaign_rules() -> CampaignRules:
    raw = tomllib.loads(RULES.read_text(encoding="utf-8"))["campaign"]
    rules = tuple(CampaignRule(rule["id"], Counts(rule["counts"]), rule["least"], rule["share"]) for rule in raw["rule"])
    return CampaignRules(rules, dt.timedelta(minutes=raw["window_minutes"]))


@functools.cache
def domain_rules() -> DomainRules:
    raw = tomllib.loads(RULES.read_text(encoding="utf-8"))["domain"]
    first_wait, last_wait, quiet, forget = (dt.timedelta(hours=raw[f"{name}_hours"]) for name in ("first_wait", "last_wait", "quiet", "forget"))
    limits = (raw["by"], raw["provider"], raw["open"], raw["close"], raw["told_days"])
    return DomainRules(*limits, first_wait, last_wait, raw["trial_messages"], quiet, forget)
