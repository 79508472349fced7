"""A claim on its way: whether there is still something to hand out."""

from __future__ import annotations

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest

from mail_pipelines.dispatch.batch import Batch
from mail_pipelines.dispatch.claims import Row
from mail_pipelines.dispatch.meetings import Meetings

ROWS = [Row(number, 0, f"p{number}@a.test", {}) for number in range(1, 4)]


@pytest.mark.parametrize(("seconds_left", "has_next"), [(60, True), (-0.001, False)])
def test_a_claim_whose_time_is_over_has_nothing_to_hand_out(seconds_left: float, has_next: bool) -> None:
    """A connection that found rows there and then could offer none would ask again at once and for ever, and hold up everything else in its session."""

    async def look() -> bool:
        nobody: Any = None
        claim: Any = SimpleNamespace(rows=ROWS)
        with ThreadPoolExecutor(1) as threads:
            batch = Batch(claim, nobody, nobody, {}, nobody, threads, time.monotonic() + seconds_left, 0, Meetings(1), nobody)
            assert batch.waiting == len(ROWS)
            return batch.has_next

    assert asyncio.run(look()) is has_next
