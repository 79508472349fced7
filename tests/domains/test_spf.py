"""SPF as receivers evaluate it."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import pytest

from mail_pipelines.domains.resolver import Answer, Question
from mail_pipelines.domains.spf import Verdict, evaluate

RECORDS = {
    ("rp.test", "TXT"): "v=spf1 include:_spf.test ~all",
    ("_spf.test", "TXT"): "v=spf1 ip4:192.0.2.8/31 ip4:198.51.100.1 ip6:2001:db8::/32 ~all",
    ("hosts.test", "TXT"): "v=spf1 a a:other.test mx:mail.test/24 -all",
    ("hosts.test", "A"): "192.0.2.50",
    ("other.test", "A"): "192.0.2.51",
    ("mail.test", "MX"): "10 mx.mail.test",
    ("mx.mail.test", "A"): "203.0.113.7",
    ("moved.test", "TXT"): "v=spf1 redirect=_spf.test",
    ("silent.test", "TXT"): "v=spf1 ip4:192.0.2.9",
    ("lost.test", "TXT"): "v=spf1 include:nowhere.test ~all",
    ("loop.test", "TXT"): "v=spf1 include:loop.test ~all",
    ("clever.test", "TXT"): "v=spf1 exists:%{i}.test ~all",
    ("odd.test", "TXT"): "v=spf1 ipv4:192.0.2.9 ~all",
    ("broken.test", "TXT"): "v=spf1 ip4:192.0.2.999 ~all",
    ("neutral.test", "TXT"): "v=spf1 ?ip4:192.0.2.9 exp=why.test -all",
}


def ask(questions: Collection[Question]) -> Mapping[Question, Answer]:
    return {
        question: Answer(failure="no answer within 1 s")
        if question.name == "away.test"
        else Answer(("v=spf1 a", "v=spf1 mx") if question == ("two.test", "TXT") else (RECORDS[question],) if question in RECORDS else ())
        for question in questions
    }


@pytest.mark.parametrize(
    ("domain", "address", "result"),
    [
        ("rp.test", "192.0.2.9", "pass"),
        ("rp.test", "2001:db8::5", "pass"),
        ("rp.test", "192.0.2.10", "softfail"),
        ("hosts.test", "192.0.2.50", "pass"),
        ("hosts.test", "192.0.2.51", "pass"),
        ("hosts.test", "203.0.113.200", "pass"),
        ("hosts.test", "203.0.114.7", "fail"),
        ("hosts.test", "2001:db8::5", "fail"),
        ("moved.test", "198.51.100.1", "pass"),
        ("silent.test", "192.0.2.8", "neutral"),
        ("neutral.test", "192.0.2.9", "neutral"),
        ("none.test", "192.0.2.9", "none"),
        ("lost.test", "192.0.2.9", "permerror"),
        ("loop.test", "192.0.2.9", "permerror"),
        ("clever.test", "192.0.2.9", "permerror"),
        ("odd.test", "192.0.2.9", "permerror"),
        ("broken.test", "192.0.2.9", "permerror"),
        ("two.test", "192.0.2.9", "permerror"),
        ("away.test", "192.0.2.9", "temperror"),
    ],
)
def test_a_record_is_judged_as_a_receiver_does(domain: str, address: str, result: str) -> None:
    assert evaluate(ask, domain, address).result == result


def test_the_reason_is_said() -> None:
    assert evaluate(ask, "loop.test", "192.0.2.9") == Verdict("permerror", "more than 10 look-ups")
    assert evaluate(ask, "away.test", "192.0.2.9").why == "TXT of away.test: no answer within 1 s"
