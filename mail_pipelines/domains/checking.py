"""Whether the DNS has what a sending domain needs: each record judged by what it means, not by how it is written.

What belongs here: the questions, the judgement (pure), and keeping the verdict. What does not: the records themselves (`records`)
and how the DNS is asked (`resolver`).
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable, Mapping, Sequence

from sqlalchemy.engine import Engine

from mail_pipelines.config import DnsSettings, Settings
from mail_pipelines.database.engine import reading, transact
from mail_pipelines.domains import store
from mail_pipelines.domains.domain import DkimKey, Finding, Names, SendingDomain, Status, Verdict
from mail_pipelines.domains.records import Hosts, Purpose, Record, dkim_record, records_of
from mail_pipelines.domains.resolver import Answer, Question, ask

Answers = Mapping[Question, Answer]
_POLICIES = ("none", "quarantine", "reject")
# A finding is kept and printed: no zone may make it long.
_SHOWN_VALUES, _SHOWN_CHARACTERS = 5, 600
_PUBLISH = "publish it as `mail-pipelines domain show {domain}` prints it"


def check(engine: Engine, settings: Settings, domain: str, now: dt.datetime) -> Verdict:
    """Look a domain up in the DNS and keep the verdict. No transaction is open meanwhile. Raises `DomainError`, `ResolverError`."""
    with reading(engine) as connection:
        registered = store.load(connection, domain)
        hosts = Hosts.of(settings, store.sending_hosts(connection))
    (verdict,) = look_up(settings.dns, [registered], hosts, now)
    transact(engine, lambda connection: store.keep(connection, registered.id, verdict))
    return verdict


def look_up(settings: DnsSettings, domains: Sequence[SendingDomain], hosts: Hosts, now: dt.datetime) -> list[Verdict]:
    """Verdicts on domains, in their order, by one look at the DNS that asks everything at once. Nothing is kept. Raises `ResolverError`."""
    records = [records_of(domain, hosts, now) for domain in domains]
    asked = [question for domain, its in zip(domains, records, strict=True) for question in questions(domain.names, its)]
    answers = ask(settings, list(dict.fromkeys(asked)))
    return [judge(domain, its, answers, now) for domain, its in zip(domains, records, strict=True)]


def check_key(settings: Settings, domain: str, key: DkimKey) -> Finding:
    """Look for one key's record."""
    record = dkim_record(domain, key)
    return look(record, ask(settings.dns, [Question(record.name, record.type)]), _PUBLISH.format(domain=domain))


def questions(names: Names, records: list[Record]) -> list[Question]:
    """Everything `judge` may want to know, so that it can be asked at once."""
    asked = [Question(record.name, record.type) for record in records]
    asked += [Question(name, "TXT") for name in _policy_names(names.domain)]
    asked.append(Question(names.tracking_domain, "A"))
    return list(dict.fromkeys(asked))


def judge(domain: SendingDomain, records: list[Record], answers: Answers, now: dt.datetime) -> Verdict:
    """The verdict by these answers, which has a finding for each record and one for the alignment of the return path."""
    findings = [look(record, answers, _PUBLISH.format(domain=domain.names.domain)) for record in records]
    return Verdict(now, (*findings, _alignment(domain.names, answers)))


def look(record: Record, answers: Answers, remedy: str = "publish it") -> Finding:
    """What these answers say of one record; `remedy` is the advice where there is no better."""
    name, found, status, advice = _JUDGED[record.purpose](record, answers)
    if not advice and status is not Status.PUBLISHED:
        advice = remedy
    shown = tuple(value[:_SHOWN_CHARACTERS] for value in found[:_SHOWN_VALUES])
    return Finding(record.purpose, name, record.type, record.value, shown, status, record.required, advice)


# Name, what was found there, status, advice.
_Judgement = tuple[str, tuple[str, ...], Status, str]


def _unanswered(name: str, answer: Answer) -> _Judgement:
    return name, (), Status.UNKNOWN, f"{answer.failure}; try again, or see the setting dns.servers"


def _tags(text: str) -> dict[str, str]:
    """A record of `tag=value;` (RFC 6376 §3.2), names in lower case, without white space."""
    pairs = (part.partition("=") for part in text.split(";"))
    return {name.strip().lower(): "".join(value.split()) for name, _, value in pairs if name.strip()}


def _dkim(record: Record, answers: Answers) -> _Judgement:
    answer = answers[Question(record.name, "TXT")]
    if answer.failure:
        return _unanswered(record.name, answer)
    if not answer.values:
        return record.name, (), Status.MISSING, ""
    if len(answer.values) > 1:
        return record.name, answer.values, Status.DIFFERENT, "a selector must have one TXT record: remove the others"
    tags = _tags(answer.values[0])
    same = tags.get("p") == _tags(record.value)["p"]
    usable = tags.get("v", "DKIM1") == "DKIM1" and tags.get("k", "rsa") == "rsa" and "sha256" in tags.get("h", "sha256").split(":")
    return record.name, answer.values, Status.PUBLISHED if same and usable else Status.DIFFERENT, ""


def _policy_names(domain: str) -> list[str]:
    """Where a DMARC policy may be: at the domain or, walking up, at one above it, but not at a top-level domain."""
    labels = domain.split(".")
    return [f"_dmarc.{'.'.join(labels[start:])}" for start in range(len(labels) - 1)]


def _policy(domain: str, answers: Answers) -> tuple[str, Answer, dict[str, str]]:
    """The first name of the walk that decides, its answer with DMARC records only, and the record's tags if it is exactly one."""
    names = _policy_names(domain)
    for name in names:
        answer = answers[Question(name, "TXT")]
        policies = tuple(value for value in answer.values if _tags(value).get("v") == "DMARC1")
        # A registry's own policy (psd=y) is nobody's.
        if answer.failure or (policies and _tags(policies[0]).get("psd") != "y"):
            return name, Answer(policies, answer.failure), _tags(policies[0]) if len(policies) == 1 else {}
    return names[0], Answer(answers[Question(names[0], "TXT")].values), {}


def _dmarc(record: Record, answers: Answers) -> _Judgement:
    name, answer, tags = _policy(record.name.removeprefix("_dmarc."), answers)
    if answer.failure:
        return _unanswered(name, answer)
    if tags:
        policy = tags.get("p", "") if name == record.name else tags.get("sp", tags.get("p", ""))
        if policy.lower() in _POLICIES:
            return name, answer.values, Status.PUBLISHED, ""
        return name, answer.values, Status.DIFFERENT, f"p={policy} is no policy: give p=none, p=quarantine or p=reject"
    if len(answer.values) > 1:
        return name, answer.values, Status.DIFFERENT, "several DMARC records count as none: remove all but one"
    return name, answer.values, Status.MISSING, ""


def _spf(record: Record, answers: Answers) -> _Judgement:
    answer = answers[Question(record.name, "TXT")]
    if answer.failure:
        return _unanswered(record.name, answer)
    policies = tuple(value for value in answer.values if value.lower().split()[:1] == ["v=spf1"])
    if len(policies) != 1:
        advice = "several SPF records count as an error: remove all but one" if policies else ""
        return record.name, policies, Status.DIFFERENT if policies else Status.MISSING, advice
    found = {term.removeprefix("+") for term in policies[0].lower().split()[1:]}
    # What an include allows is another zone's matter; it is taken as meant.
    included = any(term.startswith(("include:", "redirect=")) for term in found)
    lacking = [] if included else [term for term in record.value.lower().split()[1:-1] if term not in found]
    return record.name, policies, Status.DIFFERENT if lacking else Status.PUBLISHED, f"add {' '.join(lacking)}" if lacking else ""


def _bounces(record: Record, answers: Answers) -> _Judgement:
    answer = answers[Question(record.name, "MX")]
    if answer.failure:
        return _unanswered(record.name, answer)
    hosts = {value.partition(" ")[2] for value in answer.values}
    status = Status.PUBLISHED if hosts == {record.value.partition(" ")[2]} else Status.DIFFERENT if hosts else Status.MISSING
    return record.name, answer.values, status, ""


def _links(record: Record, answers: Answers) -> _Judgement:
    answer = answers[Question(record.name, "CNAME")]
    if answer.failure:
        return _unanswered(record.name, answer)
    if not answer.values:
        addresses = answers[Question(record.name, "A")].values
        return record.name, tuple(f"A {address}" for address in addresses), Status.DIFFERENT if addresses else Status.MISSING, ""
    return record.name, answer.values, Status.PUBLISHED if answer.values == (record.value,) else Status.DIFFERENT, ""


def _listed(record: Record, answers: Answers) -> _Judgement:
    """Among what is there, which may be more."""
    answer = answers[Question(record.name, record.type)]
    if answer.failure:
        return _unanswered(record.name, answer)
    status = Status.PUBLISHED if record.value in answer.values else Status.DIFFERENT if answer.values else Status.MISSING
    return record.name, answer.values, status, ""


_JUDGED: Mapping[Purpose, Callable[[Record, Answers], _Judgement]] = {
    Purpose.DKIM: _dkim,
    Purpose.DMARC: _dmarc,
    Purpose.SPF: _spf,
    Purpose.BOUNCES: _bounces,
    Purpose.LINKS: _links,
    Purpose.HOST: _listed,
    Purpose.REVERSE: _listed,
}


def _alignment(names: Names, answers: Answers) -> Finding:
    """Whether SPF counts for DMARC too (RFC 7489 §3.1.2). Not required: a signature is always by the From domain itself, and one of both is enough."""
    place, answer, tags = _policy(names.domain, answers)
    # Relaxed: the same organisation, which the place of the policy tells; without one, the From domain.
    organisation = place.removeprefix("_dmarc.") if tags else names.domain
    aligned = tags.get("aspf", "r") != "s" and f".{names.return_path_domain}".endswith(f".{organisation}")
    expected = f"at or below {organisation}"
    if aligned or answer.failure:
        return Finding("alignment", names.return_path_domain, "return path", expected, (), Status.UNKNOWN if answer.failure else Status.PUBLISHED, False)
    advice = "SPF does not count for DMARC; the signature by the From domain does" + (" (aspf=s)" if tags.get("aspf") == "s" else "")
    return Finding("alignment", names.return_path_domain, "return path", expected, (names.return_path_domain,), Status.DIFFERENT, False, advice)
