"""Checks of what the world finds out about a server: its names, its keys, its reputation.

Each is a small function that returns a finding; the DNS is asked by the settings' resolvers. What does not belong here: what only the server's host
can try (`host_checks`).
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Sequence

import dns.reversename

from mail_pipelines.config import DnsSettings, Settings
from mail_pipelines.domains import checking, spf
from mail_pipelines.domains.domain import ALL_SERVERS, KeyState, SendingDomain, Status
from mail_pipelines.domains.resolver import Question, ask
from mail_pipelines.messages import verifying
from mail_pipelines.messages.keyring import KeyRing
from mail_pipelines.provisioning import block_lists, trial
from mail_pipelines.provisioning.block_lists import Standing
from mail_pipelines.provisioning.finding import Finding

_PUBLISH = "`mail-pipelines server dns {server}` prints the records"
# The name of that check.
BLOCK_LISTS = "block lists"
# A test message that another run has sent may be so old.
_RECENT = dt.timedelta(hours=1)


def public_addresses(dns_settings: DnsSettings, hostname: str) -> tuple[str, ...]:
    """The addresses of a name, for a server that knows only a private one of its own."""
    questions = [Question(hostname, kind) for kind in ("A", "AAAA")]
    answers = ask(dns_settings, questions)
    return tuple(value for question in questions for value in answers[question].values)


def helo(dns_settings: DnsSettings, server: str, hostname: str, addresses: Sequence[str]) -> Finding:
    """The name that it greets destinations with is that of its address."""
    questions = [Question(hostname, kind) for kind in ("A", "AAAA")]
    answers = ask(dns_settings, questions)
    found = {value for question in questions for value in answers[question].values}
    lacking = [address for address in addresses if address not in found]
    if not found and (failures := [answer.failure for answer in answers.values() if answer.failure]):
        return Finding("HELO", None, f"{hostname}: {failures[0]}; see dns.servers")
    if not found:
        return Finding("HELO", False, f"{hostname}, the name it greets with, has no address in the DNS: {_PUBLISH.format(server=server)}")
    if lacking:
        text = f"{hostname} is {', '.join(sorted(found))} in the DNS, and the server sends from {', '.join(lacking)}"
        return Finding("HELO", False, f"{text}: set server.hostname and server.address, or correct the record; {_PUBLISH.format(server=server)}")
    return Finding("HELO", True, f"{hostname} is {', '.join(addresses)}")


def reverse(dns_settings: DnsSettings, server: str, hostname: str, addresses: Sequence[str]) -> Finding:
    """The address's name is the one it greets with, and that name's address is this one (forward-confirmed reverse DNS)."""
    for address in addresses:
        name = dns.reversename.from_address(address).to_text(omit_final_dot=True)
        pointer, forward = Question(name, "PTR"), Question(hostname, "AAAA" if ":" in address else "A")
        answers = ask(dns_settings, [pointer, forward])
        if failure := answers[pointer].failure or answers[forward].failure:
            return Finding("reverse DNS", None, f"{address}: {failure}; see dns.servers")
        named = answers[pointer].values
        if hostname not in named:
            has = f"is {', '.join(named)}" if named else "is missing"
            return Finding("reverse DNS", False, f"the PTR of {address} {has}, and the server greets with {hostname}: set it where the address was rented")
        if address not in answers[forward].values:
            text = f"the PTR of {address} is {hostname}, whose address is {', '.join(answers[forward].values) or 'missing'}"
            return Finding("reverse DNS", False, f"{text}: {_PUBLISH.format(server=server)}")
    return Finding("reverse DNS", True, f"{', '.join(addresses)} and {hostname} name each other")


def dkim(settings: Settings, server_id: int, domains: Sequence[SendingDomain]) -> Finding:
    """Of every sending domain the key that this server signs with is in the DNS as it is here."""
    if not domains:
        return Finding("DKIM", None, "there is no sending domain yet: `mail-pipelines domain add DOMAIN`")
    unknown = []
    for domain in domains:
        key = domain.key(KeyState.ACTIVE, server_id) or domain.key(KeyState.ACTIVE, ALL_SERVERS)
        if key is None:
            return Finding("DKIM", False, f"{domain.names.domain} has no key to sign with: `mail-pipelines domain rotate {domain.names.domain}`")
        found = checking.check_key(settings, domain.names.domain, key)
        if found.status is Status.UNKNOWN:
            unknown.append(str(found))
        elif found.status is not Status.PUBLISHED:
            return Finding("DKIM", False, str(found))
    if unknown:
        return Finding("DKIM", None, unknown[0])
    return Finding("DKIM", True, f"the keys of {len(domains)} domain{'s' if len(domains) > 1 else ''} are published")


def sender_policy(dns_settings: DnsSettings, server: str, addresses: Sequence[str], domains: Sequence[SendingDomain]) -> Finding:
    """The SPF record of every return path lets its addresses send."""
    if not domains:
        return Finding("SPF", None, "there is no sending domain yet: `mail-pipelines domain add DOMAIN`")
    for domain in domains:
        for address in addresses:
            verdict = spf.evaluate(lambda questions: ask(dns_settings, questions), domain.names.return_path_domain, address)
            if verdict.result == "temperror":
                return Finding("SPF", None, f"{domain.names.return_path_domain}: {verdict.why}; see dns.servers")
            if verdict.result != "pass":
                why = f"{verdict.result}{f', {verdict.why}' if verdict.why else ''}"
                remedy = f"`mail-pipelines domain show {domain.names.domain}` and `mail-pipelines server dns {server}` print the records"
                return Finding("SPF", False, f"{domain.names.return_path_domain} does not let {address} send ({why}): {remedy}")
    return Finding("SPF", True, f"return paths let {', '.join(addresses)} send")


def listed(addresses: Sequence[str], looks: Sequence[block_lists.Look]) -> Finding:
    """None of its addresses is on a block list, by what all lists have said."""
    unknown = list(dict.fromkeys(look.text for look in looks if look.standing is Standing.UNKNOWN))
    if found := [look.text for look in looks if look.standing is Standing.LISTED]:
        return Finding(BLOCK_LISTS, False, "; ".join(found))
    if len(unknown) == len(block_lists.block_lists()):
        return Finding(BLOCK_LISTS, None, "; ".join(unknown))
    clear = f"{', '.join(addresses)} is on none of {len(block_lists.block_lists()) - len(unknown)} lists"
    return Finding(BLOCK_LISTS, True, "; ".join([clear, *unknown]))


def arrival(settings: Settings, keys: KeyRing, server: str, server_id: int, *, token: str | None, now: dt.datetime, wait_seconds: float) -> Finding:
    """The test message came to where bounces come, with a signature that holds."""
    data = trial.arrived(settings, keys, server_id, token=token, since=now - _RECENT, wait_seconds=wait_seconds)
    if data is None:
        way = f"{settings.sending.bounce_host} (sending.bounce_host, port 25, `mail-pipelines inbound run`)"
        first = "" if token else f"run `mail-pipelines server verify {server}` on its host first, which sends one; "
        return Finding("arrival", False, f"no test message of {server} has arrived: {first}see that the return path's MX leads to {way}")

    def text_of(name: str) -> str | None:
        question = Question(name, "TXT")
        return next(iter(ask(settings.dns, [question])[question].values), None)

    signature = verifying.verify(data, text_of)
    if signature is None:
        return Finding("arrival", False, "the test message arrived without a signature: something on its way has taken it off")
    if signature.broken:
        by = f"{signature.selector} of {signature.domain}"
        return Finding("arrival", False, f"the test message arrived, and its signature by {by} does not hold: {signature.broken}")
    return Finding("arrival", True, f"the test message arrived, signed by {signature.selector} of {signature.domain}")
