"""A send window is open at a moment exactly if the recipient's clock says so, whatever the clock does."""

from __future__ import annotations

import datetime as dt
from itertools import pairwise
from typing import Any
from zoneinfo import ZoneInfo

import hypothesis
import pytest
from hypothesis import strategies as st

from mail_pipelines.campaigns.send_window import DAYS, SendWindow, WindowError
from mail_pipelines.contacts import time_zones
from mail_pipelines.dispatch import windows
from mail_pipelines.segments import ranks

OFFICE = {"from": "09:00", "until": "18:00", "days": ["mon", "tue", "wed", "thu", "fri"], "zone": "Europe/Berlin"}
# Half hours and three quarters, half an hour of daylight-saving time, none, the other side of the date line, a day that was left out.
ZONES = (
    "Europe/Berlin",
    "America/New_York",
    "Asia/Kolkata",
    "Asia/Kathmandu",
    "Australia/Lord_Howe",
    "Pacific/Apia",
    "Pacific/Kiritimati",
    "Africa/Casablanca",
)
# Both changes of the year in Europe, America and Australia, and the day that Samoa left out.
CHANGES = (
    dt.datetime(2026, 3, 29, 1), dt.datetime(2026, 10, 25, 1), dt.datetime(2026, 3, 8, 7), dt.datetime(2026, 11, 1, 6), dt.datetime(2026, 4, 4, 15),
    dt.datetime(2026, 10, 3, 15, 30), dt.datetime(2011, 12, 30, 10),
)  # fmt: skip
MINUTES = st.integers(0, 95).map(lambda number: number * 15)
WINDOWS = st.builds(
    SendWindow, MINUTES, MINUTES, st.sets(st.integers(0, 6), min_size=1).map(lambda days: tuple(sorted(days))), st.just("Europe/Berlin")
).filter(lambda window: window.begin != window.until)  # fmt: skip


def clock_says_open(window: SendWindow, zone: str, second: int) -> bool:
    """By what a clock on the wall shows, and nothing else."""
    local = dt.datetime.fromtimestamp(second, ZoneInfo(zone))
    minute, today = local.hour * 60 + local.minute, local.weekday()
    if window.begin < window.until:
        return window.begin <= minute < window.until and today in window.days
    return (minute >= window.begin and today in window.days) or (minute < window.until and (today - 1) % 7 in window.days)


@hypothesis.settings(max_examples=150, deadline=None)
@hypothesis.given(WINDOWS, st.sampled_from(ZONES), st.sampled_from(CHANGES), st.integers(-40, 40), st.integers(1, 96))
def test_it_is_open_exactly_when_the_clock_of_the_zone_says_so(window: SendWindow, zone: str, change: dt.datetime, before: int, hours: int) -> None:
    begin = int(change.replace(tzinfo=dt.UTC).timestamp()) + before * 3600 + 7
    end = begin + hours * 3600
    spans = window.spans(zone, begin, end)
    assert all(begin <= opens < closes <= end for opens, closes in spans)
    assert all(first[1] < second[0] for first, second in pairwise(spans))
    edges = {edge + near for span in spans for edge in span for near in (-1, 0)}
    for second in {*range(begin, end, 450), *edges}:
        if begin <= second < end:
            assert any(opens <= second < closes for opens, closes in spans) == clock_says_open(window, zone, second), dt.datetime.fromtimestamp(second, dt.UTC)


def test_an_office_day_in_three_zones() -> None:
    window = SendWindow.from_document(OFFICE)
    # Friday of the week before daylight-saving time begins in Europe; it has begun in America.
    begin, end = (int(dt.datetime(2026, 3, day, tzinfo=dt.UTC).timestamp()) for day in (27, 31))

    def hours(zone: str) -> list[str]:
        return [
            f"{dt.datetime.fromtimestamp(opens, dt.UTC):%a %H:%M}-{dt.datetime.fromtimestamp(closes, dt.UTC):%H:%M}"
            for opens, closes in window.spans(zone, begin, end)
        ]

    assert hours("Europe/Berlin") == ["Fri 08:00-17:00", "Mon 07:00-16:00"]
    assert hours("America/New_York") == ["Fri 13:00-22:00", "Mon 13:00-22:00"]
    assert hours("Asia/Kolkata") == ["Fri 03:30-12:30", "Mon 03:30-12:30"]


def test_days_that_touch_are_one_span() -> None:
    window = SendWindow.from_document(OFFICE | {"from": "00:00", "until": "24:00"})
    begin = int(dt.datetime(2026, 3, 2, tzinfo=dt.UTC).timestamp())
    assert window.spans("UTC", begin, begin + 7 * 86400) == [(begin, begin + 5 * 86400)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"from": "9 o'clock"}, "from: expected a time of day"),
        ({"until": "09:61"}, "until: expected a time of day"),
        ({"until": 1441}, "until: expected a time of day"),
        ({"until": "09:00"}, "until: the window is empty"),
        ({"days": []}, "days: expected a list"),
        ({"days": ["mon", "monday"]}, r"days\[1\]: expected one of mon, tue"),
        ({"zone": "Europe/Berln"}, "zone: expected the time zone of contacts who have none"),
        ({"zone": None}, "zone: expected"),
        ({"till": "18:00"}, "till: unknown key; did you mean 'until'"),
    ],
)
def test_what_is_no_window_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(WindowError, match=message):
        SendWindow.from_document(OFFICE | changes)


def test_a_time_without_quotes_is_what_yaml_makes_of_it() -> None:
    assert SendWindow.from_document(OFFICE | {"from": 630, "until": 1080}) == SendWindow(630, 1080, (0, 1, 2, 3, 4), "Europe/Berlin")
    assert SendWindow.from_document({"from": "22:00", "until": "06:00", "zone": "utc"}) == SendWindow(1320, 360, tuple(range(len(DAYS))), "UTC")


def test_names_of_zones_are_found_whatever_their_case() -> None:
    assert time_zones.normal(" europe/berlin ") == "Europe/Berlin"
    assert [time_zones.normal(name) for name in ("Europe/Berln", "localtime", "Factory", "")] == [None] * 4
    assert max(map(len, time_zones.names())) <= 48


def test_rows_of_an_opening_fall_due_by_engagement() -> None:
    """As `segments.ranks` places them: by rank, whatever the contact's number."""
    import numpy as np

    spans = windows.Windows({"": [(1_000, 2_000), (90_000, 95_000), (170_000, 170_000)]})
    keys = ranks.places(np.array([0, 3, 84, 91, ranks.NEVER_ENGAGED]), np.array([9_999_999, 5, 1_000_000, 5, 5])).tolist()
    due = [spans.due("", 90_000, windows.State.PENDING, key, None) for key in keys]
    assert due == [90_000, 90_003, 90_084, 90_091, 90_091]
    # Who is put off a second time keeps that place, and whoever was refused for now comes first.
    assert [spans.due("", 170_000, windows.State.DEFERRED, key, windows.WAITS) for key in due] == [170_000, 170_003, 170_084, 170_091, 170_091]
    assert spans.due("", 90_000, windows.State.DEFERRED, 5_000, "mailbox_full") == 90_000
    assert spans.next_opening("", 1_500, 1_999) is None
    assert spans.next_opening("", 1_500, 2_000) == 90_000
    assert spans.reason("", 90_000) == windows.WAITS
    assert spans.reason("", 170_000) == windows.NEVER
