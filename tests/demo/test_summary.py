"""The demo's figures are what they are called."""

from __future__ import annotations

import pytest

from mail_pipelines.demo.summary import overlap


@pytest.mark.parametrize(
    ("spans", "share"),
    [
        ([], 0),
        # One server alone overlaps with nobody, whatever it does.
        ([(1, 0, 10), (1, 5, 15)], 0),
        ([(1, 0, 10), (2, 0, 10)], 1),
        # Half of the first ten seconds, then a gap in which nobody sends, then one server.
        ([(1, 0, 10), (2, 5, 10), (1, 20, 30)], 0.25),
        # Several claims of one server at once count once.
        ([(1, 0, 8), (1, 2, 10), (2, 1, 3), (2, 2, 9)], 0.8),
    ],
)
def test_overlap_is_the_share_of_the_sending_time_in_which_all_servers_send(spans: list[tuple[int, float, float]], share: float) -> None:
    assert overlap(spans) == pytest.approx(share)
