"""When a server is sick, and what follows: thresholds (`health.toml`) and one pure rule, as a table.

| a server is | seen | becomes |
|---|---|---|
| nothing | sick | suspect |
| suspect | sick for so long, and may go | drained |
| suspect | well | nothing; back, if it was that before |
| any | lost | drained |
| drained | sends again: an operator has taken it back | back |
| back | sick by what came since | suspect |
| back | not sick for a day | nothing |
| any | retired | nothing |

What belongs here: that decision, from plain values. What does not: reading and acting (`health`), and one provider alone (`breakers`).
"""

from __future__ import annotations

import datetime as dt
import enum
import functools
import statistics
import tomllib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

RULES = Path(__file__).with_name("health.toml")


@dataclass(frozen=True)
class Rules:
    """As `health.toml` has them."""

    hours: int
    least: int
    ignored: frozenset[str]
    refused: frozenset[str]
    share: float
    times: float
    providers: int
    part: float
    confirm: dt.timedelta
    fleet_part: float
    drained: float
    forget: dt.timedelta
    kept: dt.timedelta


@functools.cache
def rules() -> Rules:
    raw = tomllib.loads(RULES.read_text(encoding="utf-8"))
    answers, server, fleet, after = raw["answers"], raw["server"], raw["fleet"], raw["after"]
    return Rules(
        answers["hours"], answers["least"], frozenset(answers["ignored"]), frozenset(answers["refused"]),
        server["share"], server["times"], server["providers"], server["part"], dt.timedelta(minutes=server["confirm_minutes"]),
        fleet["part"], fleet["drained"], dt.timedelta(hours=after["forget_hours"]), dt.timedelta(hours=after["kept_hours"]),
    )  # fmt: skip


class Standing(enum.StrEnum):
    SUSPECT = "suspect"
    DRAINED = "drained"
    BACK = "back"


@dataclass(frozen=True)
class Record:
    """What was decided of a server, when, and why in words. What came before `since`, when it was taken back last, does not count any more."""

    standing: Standing
    at: dt.datetime
    why: str
    since: dt.datetime | None = None


@dataclass(frozen=True)
class Heard:
    """The answers of a provider to a server in the last hours; `stopped`: its breaker is not closed."""

    answers: int
    bad: int
    stopped: bool = False

    @property
    def share(self) -> float:
        return 1.0 if self.stopped else self.bad / self.answers


@dataclass(frozen=True)
class Seen:
    """A server at one look. `heard` by provider is without what came before it was taken back; `listed` is what a list that matters says, twice in a row."""

    key: str
    pool_id: int
    sends: bool
    lost: bool = False
    retired: bool = False
    heard: Mapping[str, Heard] = field(default_factory=dict)
    listed: str = ""


@dataclass(frozen=True)
class Outcome:
    """`records` by server as they have to become, the servers to `drain` now (one at most), and what is wrong with the whole fleet, in words."""

    records: Mapping[str, Record]
    drain: Sequence[str]
    trouble: str


def decide(fleet: Sequence[Seen], known: Mapping[str, Record], now: dt.datetime, given: Rules | None = None) -> Outcome:
    """What follows from a look at all servers."""
    rule = given or rules()
    heard = {one.key: {provider: found for provider, found in one.heard.items() if found.stopped or found.answers >= rule.least} for one in fleet if one.sends}
    trouble = _trouble([one for one in fleet if one.sends], heard, rule)
    records: dict[str, Record] = {}
    for one in fleet:
        sick, well = ("", False) if trouble else _sick(one, heard, rule)
        after = _next(one, known.get(one.key), sick, well, now, rule)
        if after is not None:
            records[one.key] = after
    drain = []
    for key, record in sorted(records.items(), key=lambda item: item[1].at):
        if trouble or record.standing is not Standing.SUSPECT or now - record.at < rule.confirm:
            continue
        one = next(one for one in fleet if one.key == key)
        if _sick(one, heard, rule)[0] and _may_go(one, fleet, records, rule):
            records[key] = replace(record, standing=Standing.DRAINED, at=now)
            drain.append(key)
            break
    return Outcome(records, drain, trouble)


def drained(records: Mapping[str, Record]) -> dict[str, Record]:
    """Those that are out of service by this."""
    return {key: record for key, record in records.items() if record.standing is Standing.DRAINED}


def gone(drained: Mapping[str, Record], now: dt.datetime) -> list[str]:
    """Those of them that were drained so long ago that nobody will take them back."""
    return [key for key, record in drained.items() if now - record.at >= rules().kept]


def _next(one: Seen, before: Record | None, sick: str, well: bool, now: dt.datetime, rule: Rules) -> Record | None:
    """The table, but for the drain itself, of which there is one at a look."""
    if one.retired:
        return None
    if one.lost:
        return before if before and before.standing is Standing.DRAINED else Record(Standing.DRAINED, now, "it was declared lost")
    if before is None:
        return Record(Standing.SUSPECT, now, sick) if sick else None
    match before.standing:
        case Standing.DRAINED:
            return replace(before, standing=Standing.BACK, at=now, since=now) if one.sends else before
        case Standing.SUSPECT:
            if not one.sends:
                # Somebody else has seen to it.
                return None
            if not well:
                return replace(before, why=sick or before.why)
            # One that was taken back is still watched by what came since.
            return None if before.since is None else replace(before, standing=Standing.BACK, at=now)
        case Standing.BACK:
            if sick:
                return replace(before, standing=Standing.SUSPECT, at=now, why=sick)
            return None if now - before.at >= rule.forget else before


def _sick(one: Seen, heard: Mapping[str, Mapping[str, Heard]], rule: Rules) -> tuple[str, bool]:
    """Why a server is sick (or ""), and whether it is well; neither in between."""
    if not one.sends:
        return "", False
    if one.listed:
        return one.listed, False
    mine = heard[one.key]
    worse = {provider: found for provider, found in mine.items() if found.share >= rule.share and _alone(one.key, provider, found, heard, rule)}
    if len(worse) >= rule.providers and len(worse) >= rule.part * len(mine):
        return "; ".join(_words(provider, found) for provider, found in sorted(worse.items())), False
    bad = sum(found.share >= rule.share / 2 for found in mine.values())
    return "", bad < rule.providers or bad < rule.part * len(mine)


def _alone(key: str, provider: str, mine: Heard, heard: Mapping[str, Mapping[str, Heard]], rule: Rules) -> bool:
    """Whether it is this server that the provider minds: its peers there are taken."""
    peers = [found[provider].share for other, found in heard.items() if other != key and provider in found]
    return bool(peers) and sum(share >= rule.share for share in peers) < len(peers) / 2 and mine.share >= rule.times * statistics.median(peers)


def _words(provider: str, found: Heard) -> str:
    return f"{provider} has stopped it" if found.stopped else f"{provider} {found.bad:,} of {found.answers:,} answers"


def _trouble(sending: Sequence[Seen], heard: Mapping[str, Mapping[str, Heard]], rule: Rules) -> str:
    """What is wrong with all, in words; "" if nothing is."""
    known = [found for found in heard.values() if found]
    refused = [found for found in known if _refused(found, rule)]
    if len(refused) > rule.fleet_part * len(known):
        providers = Counter(provider for found in refused for provider, one in found.items() if one.share >= rule.share)
        names = ", ".join(provider for provider, _ in providers.most_common(3))
        return f"{len(refused)} of {len(known)} servers are refused at once, by {names}: it is what they send, not the servers, and none is drained"
    listed = [one.key for one in sending if one.listed]
    if len(listed) > rule.fleet_part * len(sending):
        return f"{len(listed)} of {len(sending)} servers are listed at once, and none is drained: {next(one.listed for one in sending if one.listed)}"
    return ""


def _refused(found: Mapping[str, Heard], rule: Rules) -> bool:
    bad = sum(one.share >= rule.share for one in found.values())
    return bad >= rule.providers and bad >= rule.part * len(found)


def _may_go(one: Seen, fleet: Sequence[Seen], records: Mapping[str, Record], rule: Rules) -> bool:
    """Whether its pool can spare it: others send, and not too many are drained already."""
    pool = [other for other in fleet if other.pool_id == one.pool_id and not other.retired]
    gone = sum(other.key in records and records[other.key].standing is Standing.DRAINED for other in pool)
    return sum(other.sends for other in pool) > 1 and gone + 1 <= max(1, int(rule.drained * len(pool)))
