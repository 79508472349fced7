"""What each kind of mail is read as; and that nothing which was not said by us and about us counts."""

from __future__ import annotations

import base64
import datetime as dt

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mail_pipelines.delivery.evidence import Evidence, Kind
from mail_pipelines.inbound import reports
from mail_pipelines.inbound.reports import Ignored
from tests.inbound.mails import AT, complaint, dsn, headers, qmail_bounce, request, token, vacation
from tests.inbound.receiving import key_ring

NOW = dt.datetime(2026, 3, 2, 9, 0, tzinfo=dt.UTC)
OWN = token(12, 1, 7)


def read(data: bytes) -> Evidence | Ignored:
    return reports.read(data, key_ring(), NOW)


def kind(data: bytes) -> Kind | Ignored:
    found = read(data)
    if isinstance(found, Ignored):
        return found
    assert (found.campaign_id, found.contact_id, found.attempt) == (7, 12, 1)
    return found.kind


# --- notifications (RFC 3464) ---------------------------------------------------------------------------------------


def test_a_notification_of_failure_tells_code_and_words() -> None:
    found = read(dsn(OWN))
    assert found == Evidence(Kind.BOUNCE_REPORT, 7, 12, 1, NOW, 550, "5.1.1", "550 5.1.1 <someone@example.net>: user unknown")


@pytest.mark.parametrize(
    ("words", "status", "code", "enhanced"),
    [
        ("smtp; 550-5.1.1 The account\r\n 550 5.1.1 does not exist", "5.0.0", 550, "5.1.1"),
        ("smtp;552 5.2.2 over quota", "5.2.2 (full)", 552, "5.2.2"),
        ("smtp; user unknown", "5.1.1", None, "5.1.1"),
        ('X-Postfix; unknown user: "someone"', "5.1.1", None, "5.1.1"),
        ("", "5.4.7", None, "5.4.7"),
        ("smtp; 554 delivery error: dd This user doesn't have an account 192.0.2.1", "", 554, None),
    ],
)
def test_codes_come_from_the_diagnostic_before_the_status(words: str, status: str, code: int | None, enhanced: str | None) -> None:
    found = read(dsn(OWN, words=words, status=status))
    assert isinstance(found, Evidence)
    assert (found.kind, found.code, found.enhanced) == (Kind.BOUNCE_REPORT, code, enhanced)


@pytest.mark.parametrize(
    ("action", "status", "expected"),
    [
        ("failed", "", Kind.BOUNCE_REPORT),
        ("Failed (really)", "5.1.1", Kind.BOUNCE_REPORT),
        ("delayed", "4.4.1", Ignored.DELAYED),
        ("delivered", "2.0.0", Kind.DELIVERY_REPORT),
        ("relayed", "2.0.0", Kind.DELIVERY_REPORT),
        ("", "5.1.1", Kind.BOUNCE_REPORT),
        ("", "4.4.1", Ignored.DELAYED),
        ("nonsense", "", Ignored.NO_REPORT),
    ],
)
def test_the_action_decides(action: str, status: str, expected: Kind | Ignored) -> None:
    assert kind(dsn(OWN, action=action, status=status, words="")) == expected


@pytest.mark.parametrize("returned", ["text/rfc822-headers", "message/rfc822"])
def test_a_notification_that_came_elsewhere_is_known_by_the_quoted_headers(returned: str) -> None:
    assert kind(dsn(OWN, to="postmaster@example.test", returned=returned)) is Kind.BOUNCE_REPORT


def test_quoted_headers_in_base64_are_read() -> None:
    data = dsn("x", to="postmaster@example.test", quoted="y")
    quoted = base64.encodebytes(headers(OWN).encode()).replace(b"\n", b"\r\n")
    begin = data.index(b"Content-Type: text/rfc822-headers")
    assert (
        kind(data[:begin] + b"Content-Type: text/rfc822-headers\r\nContent-Transfer-Encoding: base64\r\n\r\n" + quoted + b"\r\n--=_b--\r\n")
        is Kind.BOUNCE_REPORT
    )


def test_the_address_it_came_to_counts_before_what_it_quotes() -> None:
    assert kind(dsn(OWN, quoted=token(99, 0, 99))) is Kind.BOUNCE_REPORT


# --- other forms ----------------------------------------------------------------------------------------------------


def test_another_form_of_bounce_is_read_with_its_words() -> None:
    found = read(qmail_bounce(OWN))
    assert isinstance(found, Evidence)
    assert (found.kind, found.code, found.enhanced, found.text) == (Kind.BOUNCE_REPORT, 550, "5.1.1", "550 5.1.1 No such user here")


def test_an_automatic_answer_is_no_bounce() -> None:
    assert kind(vacation(OWN)) is Ignored.NO_REPORT


# --- people ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("feedback", "expected"),
    [
        ("abuse", Kind.COMPLAINT),
        ("Fraud", Kind.COMPLAINT),
        ("something new", Kind.COMPLAINT),
        (None, Kind.COMPLAINT),
        ("not-spam", Ignored.NOT_SPAM),
        ("auth-failure", Ignored.AUTHENTICATION_FAILURE),
        ("opt-out", Kind.UNSUBSCRIBE),
    ],
)
def test_a_feedback_report_is_a_complaint_but_for_those_that_say_otherwise(feedback: str | None, expected: Kind | Ignored) -> None:
    assert kind(complaint(OWN, kind=feedback)) == expected


def test_a_mail_to_the_unsubscribe_address_unsubscribes_whatever_it_says() -> None:
    assert kind(request(OWN)) is Kind.UNSUBSCRIBE
    assert kind(request(OWN) + b"please take me off your list\xff\xfe") is Kind.UNSUBSCRIBE


def test_a_quoted_unsubscribe_address_is_no_request() -> None:
    data = f"From: a@example.net\r\nTo: abuse@{AT}\r\nSubject: Fwd\r\n\r\n{headers(OWN)}".encode()
    assert kind(data) is Ignored.NO_REPORT


# --- what is not ours -----------------------------------------------------------------------------------------------


def test_without_a_token_that_verifies_nothing_counts() -> None:
    foreign = token(12, 1, 7, key="another key")
    for data in (dsn(foreign), complaint(foreign), request(foreign), qmail_bounce(foreign)):
        assert read(data) is Ignored.FOREIGN_TOKEN
    assert read(b"From: a@b\r\n\r\nHello.\r\n") is Ignored.NO_TOKEN
    assert read(b"") is Ignored.NO_TOKEN


@given(st.binary(max_size=300), st.sampled_from([dsn(OWN), complaint(OWN), request(OWN), qmail_bounce(OWN)]), st.integers(0, 1200), st.integers(0, 200))
@settings(max_examples=150)
def test_damaged_mails_prove_what_they_say_or_nothing(noise: bytes, mail: bytes, place: int, cut: int) -> None:
    """Bytes put in and taken out anywhere: whatever is made of it names the one recipient, in words that a database takes."""
    found = read(mail[:place] + noise + mail[place + cut :])
    if isinstance(found, Evidence):
        assert (found.campaign_id, found.contact_id, found.attempt) == (7, 12, 1)
        assert len(found.text) <= 500
        assert "\0" not in found.text.encode("utf-8").decode()
        assert found.enhanced is None or len(found.enhanced) <= 11
