"""Texts and times as PHP programs and old character sets left them."""

from __future__ import annotations

import datetime as dt

import pytest

from mail_pipelines.migration import cleaning


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("MÃ¼ller", "Müller"),
        ("Müller", "Müller"),
        ("â‚¬ 5", "€ 5"),
        ("Ã\x81vila", "Ávila"),
        ("Tom &amp; Jerry &#39;s", "Tom & Jerry 's"),
        ("日本 😀", "日本 😀"),
        ("  x ", "x"),
        (None, ""),
    ],
)
def test_text_is_read_as_it_was_meant(given: str | None, expected: str) -> None:
    assert cleaning.text(given) == expected


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ('a:2:{i:0;s:3:"Red";i:1;s:4:"Blue";}', "Red, Blue"),
        ('a:1:{s:1:"k";s:7:"Grün &";}', "Grün &"),
        # The length is of Latin-1, the text is not any more.
        ('a:1:{i:0;s:4:"Grün";}', "Grün"),
        ('a:1:{i:0;s:6:"a";b}c";}', 'a";b}c'),
        ("a:2:{i:0;i:7;i:1;d:1.5;}", "7, 1.5"),
        ("a:0:{}", ""),
        ("a: no array", "a: no array"),
        ("plain", "plain"),
    ],
)
def test_serialised_choices_are_their_texts(given: str, expected: str) -> None:
    assert cleaning.choices(given) == expected


def test_times_that_no_calendar_has_are_none() -> None:
    assert cleaning.time("0000-00-00 00:00:00") is None
    assert cleaning.time(None) is None
    assert cleaning.unix_time(0) is None
    assert cleaning.unix_time("x") is None
    assert cleaning.unix_time(86_400) == dt.datetime(1970, 1, 2, tzinfo=dt.UTC)
    assert cleaning.time("2020-01-02T03:04:05+02:00") == dt.datetime(2020, 1, 2, 1, 4, 5, tzinfo=dt.UTC)
    # As listmonk's export has them.
    assert cleaning.time("2020-01-02 03:04:05.123456 +0200 CEST") == dt.datetime(2020, 1, 2, 1, 4, 5, 123456, tzinfo=dt.UTC)
    assert cleaning.time("0001-01-01 00:00:00 +0000 UTC") is None
    assert (cleaning.day("01/02/2020", month_first=True), cleaning.day("2020/1/2")) == ("2020-01-02", "2020-01-02")
    assert cleaning.time(dt.datetime(2020, 1, 2)) == dt.datetime(2020, 1, 2, tzinfo=dt.UTC)
    assert (cleaning.day("31/12/1999"), cleaning.day("00/00/0000"), cleaning.day("1999-12-31"), cleaning.day("soon")) == (
        "1999-12-31",
        "",
        "1999-12-31",
        "soon",
    )
