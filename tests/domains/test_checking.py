"""The DNS is asked by real packets and judged by what records mean; what is wrong is named with what was expected and found."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import sqlalchemy as sa

from mail_pipelines.config import DnsSettings, Settings
from mail_pipelines.database.engine import reading, transact
from mail_pipelines.database.models import Server
from mail_pipelines.dispatch import servers
from mail_pipelines.domains import checking, keys, records, store
from mail_pipelines.domains.domain import ALL_SERVERS, DkimKey, Finding, KeyState, Names, SendingDomain, Status
from mail_pipelines.domains.resolver import Answer, Question, ResolverError, ask
from tests.domains.conftest import HOSTS, NOW, impatient, publish
from tests.parts.dns import Zone

DKIM = "mp20260302._domainkey.shop.example"


def test_what_is_printed_can_be_pasted_and_is_then_found(engine: sa.Engine, settings: Settings, zone: Zone, domain: SendingDomain) -> None:
    publish(zone, domain)
    verdict = checking.check(engine, settings, "shop.example", NOW)
    assert [finding.purpose for finding in verdict.findings] == ["DKIM", "DMARC", "SPF", "bounces", "links", "alignment"]
    assert {finding.status for finding in verdict.findings} == {Status.PUBLISHED}
    assert verdict.hindrances == []
    assert zone.asked["tcp"] == 0
    # Too much for one packet: the question is asked again by TCP.
    zone.publish(*(f'bounces.shop.example. 60 IN TXT "{str(number) * 200}"' for number in range(3)))
    assert checking.check(engine, settings, "shop.example", NOW) == verdict
    assert zone.asked["tcp"] == 1
    with reading(engine) as connection:
        assert store.load(connection, "shop.example").verdict == verdict


def test_with_an_empty_zone_everything_is_missing_and_the_verdict_is_kept(engine: sa.Engine, settings: Settings, domain: SendingDomain) -> None:
    verdict = checking.check(engine, settings, "shop.example", NOW)
    assert [finding.purpose for finding in verdict.hindrances] == ["DKIM", "DMARC"]
    assert {finding.status for finding in verdict.findings if finding.purpose != "alignment"} == {Status.MISSING}
    assert str(verdict.findings[1]) == (
        "DMARC: TXT of _dmarc.shop.example: expected v=DMARC1; p=none, found nothing: publish it as `mail-pipelines domain show shop.example` prints it"
    )
    with reading(engine) as connection:
        assert store.load(connection, "shop.example").verdict == verdict


@contextmanager
def own_time() -> Iterator[Callable[[], float]]:
    """A clock (s) that stands still while this process does."""
    ticks, over = 0, threading.Event()

    def count() -> None:
        nonlocal ticks
        while not over.wait(0.02):
            ticks += 1

    thread = threading.Thread(target=count)
    thread.start()
    try:
        yield lambda: ticks * 0.02
    finally:
        over.set()
        thread.join()


@pytest.mark.parametrize("fault", ["silent", "failing"])
@pytest.mark.slow
def test_a_dns_that_does_not_answer_is_waited_for_no_longer_than_agreed(
    engine: sa.Engine, settings: Settings, zone: Zone, domain: SendingDomain, fault: str
) -> None:
    publish(zone, domain)
    getattr(zone, fault).update({DKIM, "_dmarc.shop.example", "bounces.shop.example", "links.shop.example"})
    given = impatient(settings) if fault == "silent" else settings
    with own_time() as passed:
        verdict = checking.check(engine, given, "shop.example", NOW)
        # A question that fails is not waited for at all.
        assert passed() < impatient(settings).dns.timeout_seconds + 2
    assert {finding.status for finding in verdict.findings} == {Status.UNKNOWN}
    assert [finding.purpose for finding in verdict.hindrances] == ["DKIM", "DMARC"]
    words = "no answer within 1 s" if fault == "silent" else "the name servers fail"
    assert all(words in finding.advice for finding in verdict.hindrances)


@pytest.mark.slow
def test_no_transaction_is_open_while_the_dns_is_asked(engine: sa.Engine, settings: Settings, zone: Zone, domain: SendingDomain) -> None:
    answer, written = zone.answer, []

    def writes_before(wire: bytes, transport: str) -> bytes | None:
        transact(engine, lambda connection: connection.execute(sa.text("UPDATE sending_domains SET ready = ready")))
        written.append(wire)
        return answer(wire, transport)

    zone.answer = writes_before  # type: ignore[method-assign]
    verdict = checking.check(engine, settings, "shop.example", NOW)
    # Each answer waited for a write, which would have waited for the transaction.
    assert len(written) >= 6
    assert Status.UNKNOWN not in {finding.status for finding in verdict.findings}


@pytest.mark.slow
def test_servers_are_addresses(zone: Zone) -> None:
    question = Question("shop.example", "TXT")
    assert ask(DnsSettings(servers=[zone.address], timeout_seconds=60), [question]) == {question: Answer()}
    # The first one is silent: nothing listens there.
    zone.publish('shop.example. 60 IN TXT "one" " text"')
    assert ask(DnsSettings(servers=["127.0.0.1:1", zone.address], timeout_seconds=15), [question]) == {question: Answer(("one text",))}
    for wrong in ("dns.example", "127.0.0.1:x", "", "[::1"):
        with pytest.raises(ResolverError, match=r"expected an IP address, .* as in 192\.0\.2\.1:5353"):
            ask(DnsSettings(servers=[wrong]), [question])


def test_the_spf_record_names_the_servers(engine: sa.Engine, settings: Settings, domain: SendingDomain) -> None:
    for key, host in {"a": "192.0.2.7", "b": "mx2.example", "c": "2001:db8::7", "d": "127.0.0.1", "gone": "192.0.2.9"}.items():
        servers.register(engine, key, kind="catcher", host=host, port=25, now=NOW)
    transact(engine, lambda connection: connection.execute(sa.update(Server).where(Server.key == "gone").values(state="retired")))
    with reading(engine) as connection:
        hosts = replace(HOSTS, senders=store.sending_hosts(connection))
    values = {record.purpose: record.value for record in records.records_of(domain, hosts, NOW)}
    assert values[records.Purpose.SPF] == "v=spf1 ip4:192.0.2.7 ip6:2001:db8::7 a:mx2.example ~all"
    assert records.spf_mechanisms(("127.0.0.1",)) == ["mx"]


# --- judging ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def judged() -> Callable[..., dict[str, Finding]]:
    """Judges a domain by a perfect zone in which some places hold other values; `{key}` stands for the public key."""
    key = DkimKey("mp20260302", ALL_SERVERS, KeyState.ACTIVE, keys.public_text(keys.generate()), NOW, None)
    domain = SendingDomain(1, Names.of("shop.example"), (key,), None, NOW)
    wanted = records.records_of(domain, HOSTS, NOW)
    perfect = dict.fromkeys(checking.questions(domain.names, wanted), Answer())
    perfect |= {Question(record.name, record.type): Answer((record.value,)) for record in wanted}

    def judge(changes: dict[tuple[str, str], tuple[str, ...]]) -> dict[str, Finding]:
        changed = {Question(*place): Answer(tuple(value.replace("{key}", key.public_key) for value in values)) for place, values in changes.items()}
        return {finding.purpose: finding for finding in checking.judge(domain, wanted, perfect | changed, NOW).findings}

    return judge


POLICY = "_dmarc.shop.example"
BOUNCES = "bounces.shop.example"
PUBLISHED, MISSING, DIFFERENT = Status.PUBLISHED, Status.MISSING, Status.DIFFERENT


@pytest.mark.parametrize(
    ("purpose", "place", "values", "status"),
    [
        ("DKIM", (DKIM, "TXT"), ("p={key}",), PUBLISHED),
        ("DKIM", (DKIM, "TXT"), (" v = DKIM1 ;k=rsa; h=sha1:sha256; t=s; p= {key} ;",), PUBLISHED),
        ("DKIM", (DKIM, "TXT"), ("v=DKIM1; k=rsa; p=",), DIFFERENT),
        ("DKIM", (DKIM, "TXT"), ("v=DKIM1; k=rsa; p=A{key}",), DIFFERENT),
        ("DKIM", (DKIM, "TXT"), ("v=DKIM1; k=ed25519; p={key}",), DIFFERENT),
        ("DKIM", (DKIM, "TXT"), ("v=DKIM1; h=sha1; p={key}",), DIFFERENT),
        ("DKIM", (DKIM, "TXT"), ("v=DKIM2; p={key}",), DIFFERENT),
        ("DKIM", (DKIM, "TXT"), ('"v=DKIM1; p={key}"',), DIFFERENT),
        ("DKIM", (DKIM, "TXT"), ("v=DKIM1; p={key}", "v=DKIM1; p=old"), DIFFERENT),
        ("DKIM", (DKIM, "TXT"), (), MISSING),
        ("DMARC", (POLICY, "TXT"), ("v=DMARC1;p=reject; rua=mailto:d@shop.example",), PUBLISHED),
        ("DMARC", (POLICY, "TXT"), ("a note", "v=DMARC1; p=Quarantine"), PUBLISHED),
        ("DMARC", (POLICY, "TXT"), ("v=DMARC1; rua=mailto:d@shop.example",), DIFFERENT),
        ("DMARC", (POLICY, "TXT"), ("v=DMARC1; p=block",), DIFFERENT),
        ("DMARC", (POLICY, "TXT"), ("v=DMARC1; p=none", "v=DMARC1; p=reject"), DIFFERENT),
        ("DMARC", (POLICY, "TXT"), ("p=none",), MISSING),
        ("SPF", (BOUNCES, "TXT"), ("V=SPF1 +mx -all",), PUBLISHED),
        ("SPF", (BOUNCES, "TXT"), ("v=spf1 include:spf.shop.example -all", "a note"), PUBLISHED),
        ("SPF", (BOUNCES, "TXT"), ("v=spf1 ip4:192.0.2.1 -all",), DIFFERENT),
        ("SPF", (BOUNCES, "TXT"), ("v=spf1 mx -all", "v=spf1 -all"), DIFFERENT),
        ("SPF", (BOUNCES, "TXT"), ("v=spf10 mx",), MISSING),
        ("bounces", (BOUNCES, "MX"), ("0 mail.example.test",), PUBLISHED),
        ("bounces", (BOUNCES, "MX"), ("10 mail.example.test", "20 other.example"), DIFFERENT),
        ("bounces", (BOUNCES, "MX"), (), MISSING),
        ("links", ("links.shop.example", "CNAME"), ("other.example",), DIFFERENT),
        ("links", ("links.shop.example", "CNAME"), (), MISSING),
        ("alignment", (POLICY, "TXT"), ("v=DMARC1; p=none; aspf=s",), DIFFERENT),
        ("alignment", (POLICY, "TXT"), ("v=DMARC1; p=none; adkim=s",), PUBLISHED),
    ],
)  # fmt: skip
def test_records_are_judged_by_what_they_mean(
    judged: Callable[..., dict[str, Finding]], purpose: str, place: tuple[str, str], values: tuple[str, ...], status: Status
) -> None:
    findings = judged({place: values})
    assert findings[purpose].status is status
    assert {finding.status for name, finding in findings.items() if name != purpose and not (purpose == "DMARC" and name == "alignment")} == {PUBLISHED}


def test_addresses_in_place_of_the_alias_are_shown(judged: Callable[..., dict[str, Finding]]) -> None:
    found = judged({("links.shop.example", "CNAME"): (), ("links.shop.example", "A"): ("192.0.2.1",)})["links"]
    assert (found.status, found.found) == (DIFFERENT, ("A 192.0.2.1",))


def test_a_policy_above_the_domain_counts_but_not_a_registrys(engine: sa.Engine, settings: Settings, zone: Zone) -> None:
    below = store.add(engine, replace(Names.of("news.shop.example"), return_path_domain="bounces.shop.example"), settings.token_key(), NOW)
    publish(zone, below)
    zone.withdraw("_dmarc.news.shop.example", "TXT")

    def statuses() -> dict[str, str]:
        return {finding.purpose: finding.status for finding in checking.check(engine, settings, "news.shop.example", NOW).findings}

    assert statuses() | {"alignment": "", "DMARC": ""} == dict.fromkeys(statuses(), "published") | {"alignment": "", "DMARC": ""}
    assert (statuses()["DMARC"], statuses()["alignment"]) == ("missing", "different")
    zone.publish('_dmarc.shop.example. 60 IN TXT "v=DMARC1; p=none; psd=y"')
    assert statuses()["DMARC"] == "missing"
    zone.withdraw("_dmarc.shop.example", "TXT")
    zone.publish('_dmarc.shop.example. 60 IN TXT "v=DMARC1; p=none; sp=block"')
    assert statuses()["DMARC"] == "different"
    zone.withdraw("_dmarc.shop.example", "TXT")
    zone.publish('_dmarc.shop.example. 60 IN TXT "v=DMARC1; p=none"')
    assert (statuses()["DMARC"], statuses()["alignment"]) == ("published", "published")
