"""Sending domains: whether the DNS has what mail from each of them needs, by the questions and the judgement of `domain check`. Nothing is kept."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace

import sqlalchemy as sa

from mail_pipelines import config
from mail_pipelines.database.engine import DatabaseError, database_now
from mail_pipelines.doctor import waiting
from mail_pipelines.doctor.finding import Finding, names
from mail_pipelines.domains import checking, records, store
from mail_pipelines.domains.domain import KeyState, SendingDomain, Status, Verdict
from mail_pipelines.domains.resolver import ResolverError

# Each has about ten questions, which wait in as many threads.
AT_ONCE = 25
# Of all of them, and of one question, whatever the settings say: who asks what is wrong wants to hear it.
SECONDS, QUESTION_SECONDS = 10.0, 4.0


def check_domains(settings: config.Settings) -> Iterator[Finding]:
    """One line for each domain that lacks something. An installation that sends from unverified domains, as tests do, has none to look at."""
    if settings.sending.allow_unverified:
        return
    try:
        with waiting.connected(settings) as connection:
            domains = [_without_retired_keys(domain) for domain in store.all_domains(connection)]
            hosts, now = records.Hosts.of(settings, store.sending_hosts(connection)), database_now(connection)
    except (DatabaseError, sa.exc.SQLAlchemyError):
        # Another line says so.
        return
    dns = settings.dns.model_copy(update={"timeout_seconds": min(settings.dns.timeout_seconds, QUESTION_SECONDS)})
    unanswered: dict[str, str] = {}
    end = time.monotonic() + SECONDS
    for start in range(0, len(domains), AT_ONCE):
        if time.monotonic() > end:
            left = f"{len(domains) - start} of {len(domains)} domains were not looked up within {SECONDS:g} s"
            yield Finding("domains", left, "see dns.servers; `mail-pipelines domain check DOMAIN` looks one up")
            break
        some = domains[start : start + AT_ONCE]
        try:
            verdicts = checking.look_up(dns, some, hosts, now)
        except ResolverError as error:
            yield Finding("domains", str(error), "until then no domain can be looked up, and no campaign started")
            return
        for domain, verdict in zip(some, verdicts, strict=True):
            yield from _wrong(domain.names.domain, verdict)
            if failure := next((found.advice for found in verdict.findings if found.status is Status.UNKNOWN), ""):
                unanswered[domain.names.domain] = failure
    if unanswered:
        problem = f"the DNS does not answer about {names(list(unanswered))}: {next(iter(unanswered.values()))}"
        yield Finding("domains", problem, "no campaign is started from them until it does; dns.servers names the servers that are asked")


def _without_retired_keys(domain: SendingDomain) -> SendingDomain:
    """Of those nothing is signed any more, and the record of a stolen one has to be gone."""
    return replace(domain, keys=tuple(key for key in domain.keys if key.state is not KeyState.RETIRED))


def _wrong(domain: str, verdict: Verdict) -> Iterator[Finding]:
    # Where the return path is not aligned, the signature is.
    wrong = [found for found in verdict.findings if found.status in (Status.MISSING, Status.DIFFERENT) and found.purpose != "alignment"]
    if wrong:
        listed = ", ".join(f"{found.purpose} ({found.type} of {found.name}) is {found.status}" for found in wrong)
        effect = ": nothing is sent from it" if any(found.required for found in wrong) else ""
        yield Finding("domains", f"{domain}: {listed}{effect}", f"`mail-pipelines domain check {domain}` says what to publish")
