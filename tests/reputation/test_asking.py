"""Both providers are asked as they want to be, understood where they are odd, and a failure names the remedy and no secret."""

from __future__ import annotations

import dataclasses
import datetime as dt
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from mail_pipelines.config import ReputationSettings
from mail_pipelines.reputation import google, microsoft, readings
from mail_pipelines.reputation.microsoft_login import SignIn
from mail_pipelines.reputation.readings import MICROSOFT, Fetched, Reading, second_of
from mail_pipelines.sources.errors import SourceError
from mail_pipelines.sources.kinds.http import PatientSession
from tests.reputation.providers import REFRESH, SECRET, Google, Microsoft, error, serving

FIRST, LAST = dt.date(2026, 10, 31), dt.date(2026, 11, 29)
DAY = dt.date(2026, 11, 27)
BUSY = (429, {"Retry-After": "7"}, b'{"error": {"code": 429, "status": "RESOURCE_EXHAUSTED"}}')


@pytest.fixture
def postmaster() -> Iterator[Google]:
    with serving(Google()) as there:
        yield there


@pytest.fixture
def snds(tmp_path: Path) -> Iterator[Microsoft]:
    with serving(Microsoft(tmp_path / "secrets" / "snds")) as there:
        there.login.parent.mkdir()
        yield there


class Waits(list[float]):
    """A session's waits, which are not waited for."""

    def session(self) -> PatientSession:
        return PatientSession(first_wait_seconds=1, sleep=self.append)


def ask_google(settings: ReputationSettings, *domains: str, waits: Waits | None = None) -> Fetched:
    return google.read(settings, domains, FIRST, LAST, (waits if waits is not None else Waits()).session())


def ask_microsoft(settings: ReputationSettings, days: int = 2, waits: Waits | None = None) -> Fetched:
    asked = [DAY - dt.timedelta(days=back) for back in range(days)]
    return microsoft.read(settings, asked, (waits if waits is not None else Waits()).session())


# --- Google -------------------------------------------------------------------------------------------------------


def test_all_statistics_of_all_days_over_all_pages(postmaster: Google) -> None:
    """30 days of 5 statistics of two domains, of which one has none on most days."""
    auth = {f'AUTH_SUCCESS_RATEauth_type = "{kind}"': 0.99 for kind in ("spf", "dkim", "dmarc")}
    days = [FIRST + dt.timedelta(days=number) for number in range(-3, 30)]
    for number, day in enumerate(days):
        postmaster.tell("shop.test", day, number / 10_000, DELIVERY_ERROR_RATE=0.02, **auth)
    postmaster.tell("quiet.test", DAY, DELIVERY_ERROR_RATE=0.5)
    postmaster.page_most = 40
    found = ask_google(postmaster.settings(), "shop.test", "quiet.test")
    of_shop = [one for one in found.readings if one.subject == "shop.test"]
    assert [one.day for one in of_shop] == [second_of(day) for day in days[3:]]
    assert [one.spam_rate for one in of_shop] == [number / 10_000 for number in range(3, 33)]
    assert {(one.delivery_errors, *sorted(one.details)) for one in of_shop} == {(0.02, "dkim_success", "dmarc_success", "spf_success")}
    (quiet,) = (one for one in found.readings if one.subject == "quiet.test")
    assert (quiet.spam_rate, quiet.delivery_errors, quiet.day) == (None, 0.5, second_of(DAY))
    assert not found.refused
    assert not found.rejected
    # Four pages of the 150 values, and one.
    assert postmaster.tokens == [5]


def test_a_token_that_has_expired_is_renewed_once(postmaster: Google) -> None:
    postmaster.tell("a.test", DAY, 0.001)
    postmaster.tell("b.test", DAY, 0.002)
    postmaster.token_uses = 1
    assert [one.spam_rate for one in ask_google(postmaster.settings(), "a.test", "b.test").readings] == [0.001, 0.002]
    assert postmaster.tokens == [1, 1]
    postmaster.token_uses = 0
    with pytest.raises(SourceError, match="Google refuses the login"):
        ask_google(postmaster.settings(), "a.test")


def test_a_busy_api_is_asked_again_when_it_says(postmaster: Google) -> None:
    postmaster.tell("a.test", DAY, 0.001)
    postmaster.before = [BUSY, error(503, "UNAVAILABLE", "later")]
    waits = Waits()
    assert len(ask_google(postmaster.settings(), "a.test", waits=waits).readings) == 1
    assert waits == [7.0, 2.0]


def test_a_service_account_signs_for_its_user(postmaster: Google) -> None:
    settings = postmaster.service_account()
    postmaster.tell("a.test", DAY, 0.001)
    assert len(ask_google(settings, "a.test").readings) == 1
    (claims,) = postmaster.claims
    assert (claims["iss"], claims["sub"], claims["aud"]) == ("robot@p.iam", "ann@shop.test", f"{postmaster.url}/token")
    assert claims["exp"] - claims["iat"] == 3600


def test_a_domain_that_google_does_not_know_keeps_none_of_the_others(postmaster: Google) -> None:
    postmaster.tell("a.test", DAY, 0.001)
    found = ask_google(postmaster.settings(), "a.test", "new.test")
    assert len(found.readings) == 1
    assert dict(found.refused) == {"new.test": "PERMISSION_DENIED The caller does not have permission"}
    with pytest.raises(SourceError, match=r"any sending domain \(new\.test: PERMISSION_DENIED .*\): add them in Postmaster Tools"):
        ask_google(postmaster.settings(), "new.test")


def test_a_statistic_that_is_no_more_costs_the_others_but_not_the_spam_rate(postmaster: Google) -> None:
    postmaster.tell("a.test", DAY, 0.004, DELIVERY_ERROR_RATE=0.1)
    postmaster.gone = {"AUTH_SUCCESS_RATE"}
    (reading,) = ask_google(postmaster.settings(), "a.test").readings
    assert (reading.spam_rate, reading.delivery_errors) == (0.004, None)
    postmaster.gone = {"SPAM_RATE"}
    with pytest.raises(SourceError, match="does not understand the question any more"):
        ask_google(postmaster.settings(), "a.test")


def test_values_that_are_none_are_counted_and_left_out(postmaster: Google) -> None:
    date = {"year": 2026, "month": 11, "day": 27}
    good = {"metric": "spam_rate", "date": date, "value": {"floatValue": 0.002}}
    odd = [{"metric": "spam_rate", "date": date, "value": {}}, good | {"date": {"year": 2026}}, good | {"value": {"doubleValue": 7}}, good | {"metric": "x"}]
    postmaster.before = [(200, {}, json.dumps({"domainStats": [*odd, good]}).encode())]
    found = ask_google(postmaster.settings(), "a.test")
    assert [one.spam_rate for one in found.readings] == [0.002]
    assert dict(found.rejected) == {"no date or value": 2, "an unknown statistic, or not a part of 1": 2}


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (error(403, "PERMISSION_DENIED", "scopes", "ACCESS_TOKEN_SCOPE_INSUFFICIENT"), "make new credentials with the scope"),
        (error(500, "INTERNAL", "oops"), "status 500"),
        ((200, {}, b"<html>"), "is not a JSON object"),
    ],
)
def test_google_refuses_as_a_whole(postmaster: Google, answer: tuple[int, dict[str, str], bytes], words: str) -> None:
    postmaster.tell("a.test", DAY, 0.001)
    postmaster.before = [answer] * 6
    with pytest.raises(SourceError, match=words):
        ask_google(postmaster.settings(), "a.test")


def test_credentials_that_are_withdrawn_or_none_are_named_without_a_secret(postmaster: Google) -> None:
    postmaster.refresh = "another"
    with pytest.raises(SourceError, match=r"invalid_grant.*docs/reputation\.md") as caught:
        ask_google(postmaster.settings(), "a.test")
    assert REFRESH not in str(caught.value)
    assert SECRET not in str(caught.value)
    for text in ("", "{", '{"type": "service_account", "private_key": "-----"}', '{"type": "robot"}', "[]"):
        with pytest.raises(SourceError, match="authorized_user"):
            ask_google(ReputationSettings(google_credentials=text), "a.test")
    with pytest.raises(SourceError, match="no RSA key in PEM"):
        ask_google(ReputationSettings(google_credentials='{"type": "service_account", "client_email": "r", "private_key": "xyz"}'), "a.test")


# --- Microsoft ----------------------------------------------------------------------------------------------------


def test_rows_of_several_days_and_bands(snds: Microsoft) -> None:
    snds.tell(DAY, "192.0.2.1", rate="< 0.1%", recipients=1200)
    snds.tell(DAY, "2001:DB8::1", rate="0.4%", result="yellow", traps=2)
    snds.tell(DAY - dt.timedelta(days=1), "192.0.2.1", rate="> 4.0%", result="RED")
    found = ask_microsoft(snds.settings())
    assert snds.days_asked == ["2026-11-27", "2026-11-26"]
    rows = {(one.subject, one.day): (one.spam_rate, one.filter_result, one.trap_hits, one.messages) for one in found.readings}
    assert rows == {
        ("192.0.2.1", second_of(DAY)): (0.0, "GREEN", 0, 1200),
        ("2001:db8::1", second_of(DAY)): (0.004, "YELLOW", 2, 1000),
        ("192.0.2.1", second_of(DAY) - 86400): (0.04, "RED", 0, 1000),
    }


def test_odd_rows_are_counted_and_left_out(snds: Microsoft) -> None:
    snds.tell(DAY, "192.0.2.1", rate="")
    snds.days[DAY] += [
        "",
        "192.0.2.2,11/27/2026 1:00 AM",
        "nobody,11/27/2026 1:00 AM,,1,1,1,GREEN,< 0.1%,,,0,,,",
        "192.0.2.3,yesterday,,1,1,1,GREEN,< 0.1%,,,0,,,",
        "192.0.2.4,11/27/2026 1:00 AM,,1,1,1,PURPLE,< 0.1%,,,0,,,",
        "192.0.2.5,11/27/2026 1:00 AM,,1,1,1,GREEN,many,,,0,,,",
        "192.0.2.6,11/27/2026 1:00 AM,,1,1,lots,GREEN,< 0.1%,,,0,,,",
        # Fewer columns than there are, quotes, a clock of 24 hours, and a band with two ends.
        "192.0.2.7,11/27/2026 13:00:00,,1,1,500,GREEN,0.1 - 0.3%,,,1",
        '192.0.2.8,11/27/2026 1:00 AM,,1,1,600,GREEN,N/A,,,,"helo, with a comma",a@b.test,"blocked, they say"',
    ]
    found = ask_microsoft(snds.settings())
    rows = {one.subject: (one.spam_rate, one.messages, one.trap_hits) for one in found.readings}
    assert rows == {"192.0.2.1": (None, 1000, 0), "192.0.2.7": (0.001, 500, 1), "192.0.2.8": (None, 600, None)}
    assert {one.details.get("comments") for one in found.readings} == {None, "blocked, they say"}
    assert dict(found.rejected) == {
        "2 columns, expected 11 at least": 1,
        "no address in the first column": 1,
        "no time in the second column": 1,
        "an unknown filter result": 1,
        "an unknown complaint rate": 1,
        "a count that is no number": 1,
    }


def test_several_periods_of_a_day_are_one(snds: Microsoft) -> None:
    snds.tell(DAY, "192.0.2.1", rate="0.2%", traps=1, recipients=300)
    snds.tell(DAY, "192.0.2.1", rate="< 0.1%", result="YELLOW", traps=2, recipients=400)
    (reading,) = ask_microsoft(snds.settings()).readings
    expected = Reading("microsoft_snds", "192.0.2.1", second_of(DAY), 0.002, None, 700, "YELLOW", 3)
    assert dataclasses.replace(reading, details={}) == expected


def test_what_is_not_told_is_not_zero(snds: Microsoft) -> None:
    snds.days[DAY] = ["192.0.2.1,11/27/2026 1:00 AM,,1,1,,GREEN,,,,,,,", "192.0.2.1,11/27/2026 2:00 AM,,1,1,,GREEN,,,,,,,"]
    (reading,) = ask_microsoft(snds.settings()).readings
    assert (reading.spam_rate, reading.messages, reading.trap_hits) == (None, None, None)


def test_a_day_without_data_is_no_failure_and_a_busy_server_is_asked_again(snds: Microsoft) -> None:
    assert ask_microsoft(snds.settings()).readings == ()
    snds.tell(DAY, "192.0.2.1")
    snds.before = [BUSY]
    waits = Waits()
    assert len(ask_microsoft(snds.settings(), waits=waits).readings) == 1
    assert waits == [7.0]


def test_each_run_renews_the_login_and_keeps_what_is_newest(snds: Microsoft) -> None:
    """A token of 90 days that is never renewed would end every three months."""
    settings = snds.settings()
    for day in range(4):
        snds.tell(DAY - dt.timedelta(days=day), "192.0.2.1")
    snds.token_uses = 1
    assert len(ask_microsoft(settings, days=3).readings) == 3
    assert snds.tokens == [1, 1, 1]
    assert snds.login.read_text() == snds.refresh == f"{REFRESH}-3"
    assert snds.login.stat().st_mode & 0o777 == 0o600
    assert len(ask_microsoft(settings, days=1).readings) == 1


def test_who_signs_in_is_asked_for_from_then_on(snds: Microsoft) -> None:
    settings = snds.settings(signed_in=False)
    assert readings.configured(settings) == ()
    snds.tell(DAY, "192.0.2.1")
    begun = SignIn.begin(settings)
    ended_at = snds.browser(begun.address)
    wrong = {
        "whole address": "http://localhost/",
        r"did not sign you in \(access_denied\)": "http://localhost/?error=access_denied&state=x",
        "another sign-in": snds.browser(SignIn.begin(settings).address),
    }
    for words, address in wrong.items():
        with pytest.raises(SourceError, match=words):
            begun.finish(address, Waits().session())
    with pytest.raises(SourceError, match="status 400 invalid_grant"):
        begun.finish(snds.browser(begun.address, "M.C5_stale"), Waits().session())
    assert not snds.login.exists()
    begun.finish(snds.browser(begun.address), Waits().session())
    assert ended_at not in snds.login.read_text()
    assert readings.configured(settings) == (MICROSOFT,)
    assert len(ask_microsoft(settings).readings) == 1


@pytest.mark.parametrize(
    ("answers", "words"),
    [
        ([(403, {}, b"Forbidden")], "status 403.*reputation sign-in` with the account that has access"),
        ([(200, {}, b"\r\n<!DOCTYPE html><html>Sign in")], "answers with a page and not with CSV"),
        ([(200, {}, b"a;b;c\r\n")], "another form than they had"),
        ([(200, {}, b'[{"ipAddress": "192.0.2.1"}]')], "another form than they had"),
    ],
)
def test_microsoft_refuses_as_a_whole(snds: Microsoft, answers: list[tuple[int, dict[str, str], bytes]], words: str) -> None:
    snds.before = answers
    with pytest.raises(SourceError, match=words):
        ask_microsoft(snds.settings())


def test_a_sign_in_that_was_withdrawn_is_named_without_its_token(snds: Microsoft) -> None:
    settings = snds.settings()
    snds.refresh = "another"
    with pytest.raises(SourceError, match="withdrawn, or not used for 90 days; sign in by `mail-pipelines reputation sign-in`") as caught:
        ask_microsoft(settings)
    assert REFRESH not in str(caught.value)
    snds.login.unlink()
    with pytest.raises(SourceError, match=r"cannot be read .*: sign in by"):
        ask_microsoft(settings)


def test_a_login_that_cannot_be_kept_is_said_at_once_and_not_in_three_months(snds: Microsoft) -> None:
    """The file can be read; another one beside it, whose name is longer, cannot be made."""
    snds.login = snds.login.with_name("s" * 250)
    with pytest.raises(SourceError, match=r"newest token cannot be kept: .*File name too long"):
        ask_microsoft(snds.settings())
