"""Which server made here is given back, and why the others are kept: cost against the worth of its warmth."""

from __future__ import annotations

import datetime as dt
from dataclasses import replace

import numpy as np
import pytest

from mail_pipelines.capacity.far import InFlight, Outlook
from mail_pipelines.capacity.horizon import DAYS
from mail_pipelines.capacity.new_servers import NewServer, of_curve
from mail_pipelines.capacity.retiring import Candidate, Offer, Policy, choose, judge
from mail_pipelines.capacity.verdicts import Verdict, from_document, to_document

NOW = dt.datetime(2026, 3, 2, 9, 0, tzinfo=dt.UTC)
TODAY = NOW.date()
# Made in a day; 100, 1,000 and 10,000 messages on its first days, then warm.
NEW = NewServer(1, (100, 1_000, 10_000))
OFFER = Offer(0.1, NEW)


def pool(peak_day: int | None, peak: float = 90_000, servers: int = 2) -> Outlook:
    """Servers of 50,000 a day each, and 10,000 messages each day but for a peak."""
    demand = np.full(DAYS, 10_000.0)
    if peak_day is not None:
        demand[peak_day] = peak
        # No rest before and after: what a day does not send the next has no room for.
        demand[peak_day + 1 : peak_day + 3] = peak
    return Outlook("default", {"google": demand}, {"google": np.full(DAYS, 50_000.0 * servers)}, {"google": 50_000.0})


def server(key: str = "mx1", cost: float = 0.1, **values: object) -> Candidate:
    return replace(Candidate(key, 1, "default", cost, [{"google": np.full(DAYS, 50_000.0)}]), **values)  # type: ignore[arg-type]


def test_a_server_that_is_never_needed_goes_when_it_costs_more_than_another_would() -> None:
    found = judge(pool(None), server(), [], OFFER, NOW)
    # Eight weeks, against a day to make another and four until it sends as much.
    assert not found.keep
    assert found.why == "needed not within eight weeks; until then it costs 134.40, and to make and warm up another one in 5 days 12.00"
    assert found.saves_per_month == pytest.approx(73.0)


def test_a_dear_replacement_makes_warmth_worth_keeping() -> None:
    """56 days at 0.1 against 5 days of another: even at nine times the price it is cheaper to keep."""
    assert not judge(pool(None), server(), [], Offer(0.1 * 56 / 5 / 1.25 * 0.99, NEW), NOW).keep
    assert judge(pool(None), server(), [], Offer(0.1 * 56 / 5 / 1.25 * 1.01, NEW), NOW).keep


def test_one_that_is_needed_soon_is_kept_and_one_that_is_needed_late_goes() -> None:
    assert judge(pool(2), server(), [], OFFER, NOW).keep
    soon = judge(pool(2), server(), [], OFFER, NOW)
    assert soon.why.startswith("needed on 2026-03-0")
    assert soon.why.endswith("and another one that is ordered today would not be warm by then")
    # In time, and for a few days it costs less than another.
    near = judge(pool(4), server(), [], OFFER, NOW)
    assert near.keep
    assert "until then it costs" in near.why
    late = judge(pool(40), server(), [], OFFER, NOW)
    assert not late.keep
    assert "needed on 2026-04-1" in late.why


def test_what_it_lacks_decides_how_far_another_has_to_be_warm() -> None:
    """Of a small lack the second day of the curve is enough; of a large one it has to be warm."""
    small = judge(pool(40, peak=68_000), server(), [], OFFER, NOW)
    large = judge(pool(40), server(), [], OFFER, NOW)
    assert "warm up another one in 4 days" in small.why
    assert "warm up another one in 5 days" in large.why


@pytest.mark.parametrize(
    ("one", "flights", "why"),
    [
        (server(kept_until=NOW + dt.timedelta(hours=1)), [], "until 2026-03-02 10:00 UTC (provisioning.minimum_hours)"),
        (server(cost=0.0), [], "it costs nothing"),
        (server(), [InFlight("default", 2, TODAY, of_curve("careful"))], "2 more are being made for its pool"),
    ],
)
def test_what_is_kept_whatever_it_costs(one: Candidate, flights: list[InFlight], why: str) -> None:
    found = judge(pool(None), one, flights, OFFER, NOW)
    assert (found.keep, found.why) == (True, why)


def test_one_whose_shortest_lifetime_is_just_over_may_go() -> None:
    assert not judge(pool(None), server(kept_until=NOW), [], OFFER, NOW).keep


def test_a_pool_that_never_sent_needs_none_and_a_warm_source_makes_warmth_cheap() -> None:
    nothing = Outlook("default", {}, {}, {})
    assert not judge(nothing, server(), [], OFFER, NOW).keep
    warm = judge(pool(None), server(), [], Offer(0.1, of_curve("")), NOW)
    assert "warm up another one in 4 days" in warm.why


def test_at_most_one_goes_after_days_in_which_it_was_the_same() -> None:
    verdicts = [Verdict(key, "default", keep, "why", saves) for key, keep, saves in (("a", False, 5.0), ("b", False, 9.0), ("c", True, 99.0))]
    first = choose(verdicts, [], TODAY)
    assert [(one.server, one.keep, one.since, one.due) for one in first] == [("a", True, None, False), ("b", False, TODAY, False), ("c", True, None, False)]
    assert first[0].why == "b goes first; why"
    # Prices have changed: the one that was chosen stays it.
    dearer = [replace(verdicts[0], saves_per_month=50.0), *verdicts[1:]]
    days = Policy().confirm_days
    for day in range(1, days):
        first = choose(dearer, first, TODAY + dt.timedelta(days=day))
        assert [one.server for one in first if not one.keep] == ["b"]
        assert not any(one.due for one in first)
    last = choose(dearer, first, TODAY + dt.timedelta(days=days))
    assert [one.server for one in last if one.due] == ["b"]
    # A day on which it is needed begins it anew.
    needed = choose([verdicts[2]], last, TODAY + dt.timedelta(days=days + 1))
    assert [one.due for one in choose(verdicts[1:2], needed, TODAY + dt.timedelta(days=days + 2))] == [False]


def test_a_verdict_is_kept_as_plain_values() -> None:
    for one in (Verdict("mx1", "default", True, "why"), Verdict("mx1", "default", False, "why", 7.3, TODAY, due=True)):
        assert from_document(to_document(one)) == one
