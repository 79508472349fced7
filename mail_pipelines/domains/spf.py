"""Whether an SPF record lets an address send (RFC 7208), as a receiver of mail would find it.

What belongs here: evaluating the mechanisms that this platform and its operators write. Macros, `exists` and `ptr` are told to be beyond it. What does
not: asking the DNS (`resolver`), and which record there should be (`records`).
"""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field

from mail_pipelines.domains.resolver import Answer, Question

Ask = Callable[[Collection[Question]], Mapping[Question, Answer]]
Address = ipaddress.IPv4Address | ipaddress.IPv6Address
# RFC 7208 §4.6.4.
MOST_LOOKUPS = 10
_RESULTS = {"+": "pass", "-": "fail", "~": "softfail", "?": "neutral"}


@dataclass(frozen=True)
class Verdict:
    """`result` is pass, fail, softfail, neutral, none, permerror or temperror; `why` says more where there is more."""

    result: str
    why: str = ""


class _Ended(Exception):
    """The evaluation ends with this verdict."""

    def __init__(self, result: str, why: str) -> None:
        super().__init__(why)
        self.verdict = Verdict(result, why)


def evaluate(ask: Ask, domain: str, address: str) -> Verdict:
    """What the record at `domain` says of mail from `address`."""
    try:
        return Verdict(_Evaluation(ask, ipaddress.ip_address(address)).of(domain))
    except _Ended as ended:
        return ended.verdict


@dataclass
class _Evaluation:
    ask: Ask
    address: Address
    lookups: int = field(default=0)

    def of(self, domain: str) -> str:
        policies = [text for text in self._values(domain, "TXT") if text.lower().split()[:1] == ["v=spf1"]]
        if not policies:
            return "none"
        if len(policies) > 1:
            raise _Ended("permerror", f"{domain} has several SPF records")
        terms = policies[0].lower().split()[1:]
        for term in terms:
            qualifier, mechanism = (term[0], term[1:]) if term[0] in _RESULTS else ("+", term)
            if "=" not in mechanism.partition(":")[0] and self._matches(mechanism, domain):
                return _RESULTS[qualifier]
        redirect = next((term.partition("=")[2] for term in terms if term.startswith("redirect=")), None)
        if redirect is None:
            return "neutral"
        self._count()
        return self.of(redirect)

    def _matches(self, mechanism: str, domain: str) -> bool:
        name, _, value = mechanism.partition(":")
        name, _, length = name.partition("/")
        value, _, prefix = (value.partition("/")) if name not in ("ip4", "ip6") else (value, "", "")
        if "%" in mechanism or name in ("exists", "ptr"):
            raise _Ended("permerror", f"{mechanism} of {domain} is not looked into")
        match name:
            case "all":
                return True
            case "ip4" | "ip6":
                return self._within(value)
            case "include":
                self._count()
                result = self.of(value)
                if result == "none":
                    raise _Ended("permerror", f"{domain} includes {value}, which has no SPF record")
                return result == "pass"
            case "a":
                self._count()
                return self._is_of(value or domain, prefix or length)
            case "mx":
                self._count()
                hosts = [text.partition(" ")[2] for text in self._values(value or domain, "MX")]
                return any(self._is_of(host, prefix or length) for host in hosts)
        raise _Ended("permerror", f"{domain} has {mechanism}, which is no mechanism")

    def _is_of(self, host: str, prefix: str) -> bool:
        found = self._values(host, "A" if self.address.version == 4 else "AAAA")
        return any(self._within(f"{text}/{prefix}" if prefix.isdigit() else text) for text in found)

    def _within(self, network: str) -> bool:
        try:
            return self.address in ipaddress.ip_network(network, strict=False)
        except ValueError:
            raise _Ended("permerror", f"{network} is no network") from None

    def _count(self) -> None:
        self.lookups += 1
        if self.lookups > MOST_LOOKUPS:
            raise _Ended("permerror", f"more than {MOST_LOOKUPS} look-ups")

    def _values(self, name: str, kind: str) -> tuple[str, ...]:
        question = Question(name, kind)
        answer = self.ask([question])[question]
        if answer.failure:
            raise _Ended("temperror", f"{kind} of {name}: {answer.failure}")
        return answer.values
