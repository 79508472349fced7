"""Questions to the DNS, all at once and within a bounded time. Not on the send path."""

from __future__ import annotations

import ipaddress
from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple
from urllib.parse import urlsplit

import dns.exception
import dns.nameserver
import dns.rdatatype
import dns.resolver

from mail_pipelines.config import DnsSettings
from mail_pipelines.domains.domain import DomainError

_PORT = 53


class ResolverError(DomainError):
    """The DNS cannot be asked with these settings."""


class Question(NamedTuple):
    """`name` without the final dot, `type` as in TXT."""

    name: str
    type: str


@dataclass(frozen=True)
class Answer:
    """What there is: texts of TXT records, `10 host` of MX records, names and addresses. With a `failure` nobody knows."""

    values: tuple[str, ...] = ()
    failure: str = ""


def ask(settings: DnsSettings, questions: Collection[Question]) -> Mapping[Question, Answer]:
    """An answer to every question, after `settings.timeout_seconds` at the latest. Raises `ResolverError`."""
    resolver = _resolver(settings)
    with ThreadPoolExecutor(max_workers=max(1, len(questions)), thread_name_prefix="dns") as pool:
        return dict(zip(questions, pool.map(lambda question: _answer(resolver, question), questions), strict=True))


def _resolver(settings: DnsSettings) -> dns.resolver.Resolver:
    try:
        resolver = dns.resolver.Resolver(configure=not settings.servers)
    except dns.resolver.NoResolverConfiguration as error:
        raise ResolverError("this machine names no DNS server in /etc/resolv.conf: give the setting dns.servers") from error
    if settings.servers:
        resolver.nameservers = [server(text) for text in settings.servers]
    # `lifetime` bounds a whole question with all its tries; a lost packet is tried again within it.
    resolver.lifetime = settings.timeout_seconds
    resolver.timeout = settings.timeout_seconds / 3
    return resolver


def server(text: str, setting: str = "dns.servers") -> dns.nameserver.Do53Nameserver:
    """`192.0.2.1`, `192.0.2.1:5353`, `2001:db8::1` or `[2001:db8::1]:5353`. Raises `ResolverError`, which names the setting."""
    try:
        return dns.nameserver.Do53Nameserver(str(ipaddress.ip_address(text)), _PORT)
    except ValueError:
        pass
    try:
        parts = urlsplit(f"//{text}")
        return dns.nameserver.Do53Nameserver(str(ipaddress.ip_address(parts.hostname or "")), parts.port or _PORT)
    except ValueError:
        raise ResolverError(f"{setting} has {text!r}; expected an IP address, with a port if it is not {_PORT}, as in 192.0.2.1:5353") from None


def _answer(resolver: dns.resolver.Resolver, question: Question) -> Answer:
    try:
        found = resolver.resolve(f"{question.name}.", question.type, search=False)
    except (dns.resolver.NXDOMAIN, dns.resolver.NoAnswer):
        return Answer()
    except dns.resolver.LifetimeTimeout:
        return Answer(failure=f"no answer within {resolver.lifetime:g} s")
    except dns.exception.DNSException as error:
        return Answer(failure=f"the name servers fail ({type(error).__name__})")
    return Answer(tuple(sorted(_text(question.type, record) for record in found)))


def _text(kind: str, record: object) -> str:
    if kind == "TXT":
        return b"".join(record.strings).decode("utf-8", "replace")  # type: ignore[attr-defined]
    return str(record).lower().removesuffix(".")
