"""Ranks by engagement: fine where it is recent, coarse where it is long ago, and never out of order."""

from __future__ import annotations

import numpy as np

from mail_pipelines.segments.ranks import NEVER_ENGAGED, places, ranks_of


def test_ranks_are_days_then_weeks_then_four_weeks_and_never_comes_last() -> None:
    days = [0, 1, 13, 14, 20, 21, 90, 91, 111, 112, 364, 365, 9998, NEVER_ENGAGED]
    assert ranks_of(np.array(days)).tolist() == [0, 1, 13, 14, 14, 21, 84, 84, 84, 112, 364, 364, 9996, 9999]


def test_who_was_engaged_later_never_ranks_behind() -> None:
    ranks = ranks_of(np.arange(NEVER_ENGAGED + 1))
    assert ranks.dtype == np.int32
    assert (np.diff(ranks) >= 0).all()
    assert ranks[NEVER_ENGAGED] > ranks[NEVER_ENGAGED - 1]


def test_places_go_by_rank_and_then_by_contact() -> None:
    ranks = np.array([0, 0, 0, 1, 1, NEVER_ENGAGED, NEVER_ENGAGED], np.int32)
    contacts = np.array([1, 1024, 2**40, 1, 5000, 1, 2**40])
    found = places(ranks, contacts)
    assert found.dtype == np.int32
    assert found.tolist() == sorted(set(found.tolist()))
