"""How a catcher plays the destinations: which recipient is refused, delayed, dropped, left in silence. Rules are data (`play.toml`)."""

from __future__ import annotations

import hashlib
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mail_pipelines.dispatch.files import DispatchError
from mail_pipelines.dispatch.journal import Kind, Outcome

DEFAULT_RULES = Path(__file__).with_name("play.toml")


@dataclass(frozen=True)
class Rule:
    """The behaviour of some domains; `play.toml` explains each value. `keeps_percent` of dropped or silent bodies were taken all the same."""

    domains: tuple[str, ...]
    reply_seconds: tuple[float, float] = (0.05, 0.2)
    refuse_percent: float = 0
    refusals: tuple[str, ...] = ("550 5.1.1 User unknown",)
    refuse_body_percent: float = 0
    body_refusals: tuple[str, ...] = ("554 5.7.1 Message content rejected",)
    greylist_percent: float = 0
    greylist_seconds: float = 60
    per_second: float | None = None
    drop_percent: float = 0
    silent_percent: float = 0
    silent_seconds: float = 60
    keeps_percent: float = 50

    def matches(self, domain: str) -> bool:
        return any(pattern in ("*", domain) or (pattern.startswith("*.") and domain.endswith(pattern[1:])) for pattern in self.domains)


@dataclass(frozen=True)
class Ending:
    """What the destination does with a body after `seconds`: keep it or not, and reply or not."""

    seconds: float
    keeps: bool
    outcome: Outcome


ACCEPTED = Outcome(Kind.DELIVERED, 250, "2.0.0", "Ok: kept")


def load_rules(path: Path = DEFAULT_RULES) -> list[Rule]:
    """The rules of a TOML file; raises `DispatchError` naming the rule that cannot be used."""
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise DispatchError(f"{path}: {error}") from error
    rules = []
    for number, raw in enumerate(document.get("rule", []), 1):
        try:
            values: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in raw.items()}
            rules.append(Rule(**values))
        except TypeError as error:
            raise DispatchError(f"{path}: rule {number}: {error}") from error
    return rules


def reply(text: str) -> Outcome:
    """The outcome that a reply line such as `550 5.1.1 User unknown` means."""
    code, _, rest = text.partition(" ")
    enhanced, _, words = rest.partition(" ")
    if enhanced.count(".") != 2:
        enhanced, words = "", rest
    kind = {"2": Kind.DELIVERED, "4": Kind.DEFERRED, "5": Kind.BOUNCED}[code[0]]
    return Outcome(kind, int(code), enhanced or None, words)


@dataclass
class Play:
    """The destinations behind one catcher. Time (`now`, in seconds) is an argument."""

    rules: list[Rule]
    _first_seen: dict[str, float] = field(default_factory=dict)
    _last_message: dict[tuple[str, ...], float] = field(default_factory=dict)

    def _rule(self, recipient: str) -> Rule:
        domain = recipient.rpartition("@")[2].lower()
        return next((rule for rule in self.rules if rule.matches(domain)), Rule(("*",)))

    def at_recipient(self, recipient: str, now: float) -> Outcome | None:
        """A refusal at RCPT, or None if the recipient is taken."""
        rule = self._rule(recipient)
        if _percent(recipient, "refuse") < rule.refuse_percent:
            return _pick(rule.refusals, recipient)
        if _percent(recipient, "greylist") < rule.greylist_percent and now - self._first_seen.setdefault(recipient, now) < rule.greylist_seconds:
            return reply("451 4.7.1 Greylisted, please try again later")
        if rule.per_second is not None:
            if now - self._last_message.get(rule.domains, 0) < 1 / rule.per_second:
                return reply("421 4.7.28 Our system has detected an unusual rate of mail")
            self._last_message[rule.domains] = now
        return None

    def at_body(self, recipient: str, token: str) -> Ending:
        """What happens after the final dot; drawn by the token too, so that a second try may go otherwise."""
        rule = self._rule(recipient)
        low, high = rule.reply_seconds
        seconds = low + (high - low) * _percent(token, "reply") / 100
        keeps = _percent(token, "keeps") < rule.keeps_percent
        if _percent(recipient, "body") < rule.refuse_body_percent:
            return Ending(seconds, False, _pick(rule.body_refusals, recipient))
        draw = _percent(token, "ending")
        if draw < rule.drop_percent:
            return Ending(seconds, keeps, Outcome(Kind.UNKNOWN, text="connection dropped after the body"))
        if draw < rule.drop_percent + rule.silent_percent:
            return Ending(rule.silent_seconds, keeps, Outcome(Kind.UNKNOWN, text="no reply after the body"))
        return Ending(seconds, True, ACCEPTED)


def _pick(replies: tuple[str, ...], recipient: str) -> Outcome:
    return reply(replies[int(_percent(recipient, "which") * len(replies) / 100)])


def _percent(text: str, salt: str) -> float:
    """A number in [0, 100) that depends on the text only."""
    return int.from_bytes(hashlib.blake2b(text.encode(), key=salt.encode(), digest_size=4).digest(), "big") / 2**32 * 100
