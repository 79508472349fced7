"""Whether a server can send: all checks, as one table, each where it can be made.

What belongs here: which checks there are, in which order, and what each is given. What does not: the checks (`host_checks`, `dns_checks`). What is not
the host of the server makes those of the DNS; what is not the centre makes those of the host; one host that is both makes all of them.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from sqlalchemy.engine import Connection, Engine

from mail_pipelines.config import Settings
from mail_pipelines.database.engine import reading, transact
from mail_pipelines.dispatch import last_checks, servers, token_keys
from mail_pipelines.dispatch.files import ServerFolders
from mail_pipelines.dispatch.servers import ServerInfo
from mail_pipelines.domains import store
from mail_pipelines.domains.domain import DomainError, SendingDomain
from mail_pipelines.messages.keyring import KeyRing
from mail_pipelines.provisioning import block_lists, dns_checks, host_checks, last_verified, listing, trial
from mail_pipelines.provisioning.block_lists import Look
from mail_pipelines.provisioning.dns.records import is_public
from mail_pipelines.provisioning.finding import Finding

MESSAGE = "test message"
# From the server's Exim by a real mail exchanger to ours takes seconds.
ARRIVAL_SECONDS = 60.0


@dataclass
class Subject:
    """A server with what its checks need. `sent` is the token of the test message, once this host has sent one; `expected`: another has just done so. `looks`
    are what block lists have said.
    """

    engine: Engine
    settings: Settings
    server: ServerInfo
    hostname: str
    addresses: tuple[str, ...]
    now: dt.datetime
    arrival_seconds: float = ARRIVAL_SECONDS
    egress_port: int = 25
    egress_domains: tuple[str, ...] | None = None
    domains: Sequence[SendingDomain] = ()
    keys: KeyRing | None = None
    here: bool = False
    expected: bool = False
    sent: str | None = field(default=None)
    looks: Sequence[Look] = ()


def _listed(subject: Subject) -> Finding:
    subject.looks = block_lists.look(subject.settings.dns, subject.addresses, block_lists.block_lists())
    return dns_checks.listed(subject.addresses, subject.looks)


def _message(subject: Subject) -> Finding:
    """A signed test message is taken by the mail exchanger of the return path."""
    try:
        with reading(subject.engine) as connection:
            subject.sent = trial.send(connection, subject.settings, subject.server, subject.now)
    except (trial.TrialError, DomainError) as error:
        return Finding(MESSAGE, False, str(error))
    return Finding(MESSAGE, True, f"{subject.sent} was taken")


def _egress(subject: Subject) -> Finding:
    source = subject.settings.server.address
    return host_checks.egress(subject.settings.dns, subject.hostname, source, subject.egress_domains, subject.egress_port)


def _arrival(subject: Subject) -> Finding:
    assert subject.keys is not None
    if subject.here and subject.sent is None:
        return Finding("arrival", None, "no test message was sent, so none can arrive")
    return dns_checks.arrival(
        subject.settings,
        subject.keys,
        subject.server.key,
        subject.server.id,
        token=subject.sent,
        now=subject.now,
        # It was taken, and is filed in a moment.
        wait_seconds=subject.arrival_seconds if subject.sent or subject.expected else 0,
    )


Check = Callable[[Subject], Finding]
ON_THE_HOST: tuple[Check, ...] = (
    lambda it: host_checks.smtp(it.server.host, it.server.port),
    lambda it: host_checks.tls(it.server.host, it.server.port),
    lambda it: host_checks.auth(it.server.host, it.server.port),
    _egress,
    _message,
)
# What is asked of the DNS about addresses that nobody knows has no answer.
BY_THE_DNS: tuple[Check, ...] = (
    lambda it: dns_checks.helo(it.settings.dns, it.server.key, it.hostname, it.addresses),
    lambda it: dns_checks.reverse(it.settings.dns, it.server.key, it.hostname, it.addresses),
    lambda it: dns_checks.dkim(it.settings, it.server.id, it.domains),
    lambda it: dns_checks.sender_policy(it.settings.dns, it.server.key, it.addresses, it.domains),
    _listed,
    _arrival,
)


@dataclass(frozen=True)
class Verdict:
    """`elsewhere` says what was not looked at, and where it can be; empty if all was."""

    server: str
    findings: tuple[Finding, ...]
    elsewhere: str = ""

    @property
    def ok(self) -> bool:
        return not any(finding.ok is False for finding in self.findings)


def verify(
    engine: Engine,
    settings: Settings,
    key: str,
    now: dt.datetime,
    *,
    arrival_seconds: float = ARRIVAL_SECONDS,
    egress_port: int = 25,
    egress_domains: tuple[str, ...] | None = None,
    expected: bool = False,
) -> Verdict:
    """Make all checks of a server that can be made on this host; `expected`: its own host has just sent a test message.

    Raises `DispatchError` for an unknown server, `ResolverError` without a resolver.
    """
    with reading(engine) as connection:
        server = servers.find(connection, key)
    health = server.health or {}
    hostname = str(health.get("hostname") or "")
    addresses = tuple(text for text in health.get("addresses", ()) if is_public(text))
    here = ServerFolders.of(settings.server, key).journal.exists()
    centre = settings.this_server is None
    subject = Subject(engine, settings, server, hostname, addresses, now, arrival_seconds, egress_port, egress_domains, here=here, expected=expected)
    findings: list[Finding] = []
    by_the_dns: list[Finding] = []
    if here:
        findings += [check(subject) for check in ON_THE_HOST]
        last_checks.keep(ServerFolders.of(settings.server, key), last_verified.failed(findings), now)
    if centre and not hostname:
        by_the_dns = [Finding("HELO", False, f"{key} has not told its name: it is no Exim, or has never run on this version; `mail-pipelines server list`")]
    elif centre:
        subject.addresses = addresses or dns_checks.public_addresses(settings.dns, hostname)
        with reading(engine) as connection:
            subject.domains, subject.keys = store.all_domains(connection), token_keys.accepted(connection, settings.token_key())
        by_the_dns = [check(subject) for check in BY_THE_DNS]
    if centre:
        findings += by_the_dns
        transact(engine, lambda connection: _keep(connection, key, by_the_dns, subject.looks, now))
    lacking = [*([] if here else ["SMTP, port 25 and test message: on its host"]), *([] if centre else ["DNS, block lists and arrival: at the centre"])]
    elsewhere = f"not looked at here: {'; '.join(lacking)}, by the same command" if lacking else ""
    return Verdict(key, tuple(findings), elsewhere)


def _keep(connection: Connection, key: str, findings: Sequence[Finding], looks: Sequence[Look], now: dt.datetime) -> None:
    """What block lists say is kept where their own look keeps it: the newer one counts."""
    last_verified.keep(connection, key, [finding for finding in findings if finding.name != dns_checks.BLOCK_LISTS], now)
    if looks:
        listing.keep(connection, {key: listing.of(looks, listing.listings(connection).get(key), now)})
