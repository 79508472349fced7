"""Random small cases for planning, and the limits that a plan breaks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from hypothesis import strategies as st

from mail_pipelines.capacity.demand import Demand, Job
from mail_pipelines.capacity.horizon import DAY, HOUR
from mail_pipelines.capacity.lines import Line
from mail_pipelines.capacity.near import NearPlan
from mail_pipelines.delivery.recording import SLOT_SECONDS

# 2026-03-02 09:00 UTC.
NOON = 1_772_442_000
NOW = NOON + 7 * 60
PROVIDERS = ("google", "yahoo")


def caps(low: int, high: int) -> st.SearchStrategy[int | None]:
    return st.none() | st.integers(low, high)


@st.composite
def fleets(draw: st.DrawFn, most: int = 4) -> list[Line]:
    """Up to `most` servers in two pools, with limits that bind in turn."""
    lines = []
    for server in range(1, draw(st.integers(1, most)) + 1):
        pool = draw(st.sampled_from((1, 1, 2)))
        for provider in PROVIDERS:
            lines.append(
                Line(
                    server, pool, provider,
                    per_second=draw(st.sampled_from((0.01, 0.1, 0.5, 2.0))),
                    per_hour=draw(caps(0, 900)),
                    per_day=tuple(draw(st.lists(caps(0, 5_000), min_size=1, max_size=3))),
                    used_slot=draw(st.integers(0, 200)),
                    used_hour=draw(st.integers(0, 500)),
                    used_day=draw(st.integers(0, 1_000)),
                    flow=draw(st.sampled_from((1.0, 1.0, 0.7))),
                    opens_at=draw(st.sampled_from((0, 0, 0, NOW + 1800))),
                )
            )  # fmt: skip
    return lines


@st.composite
def mailings(draw: st.DrawFn, most: int = 4) -> tuple[list[Job], list[Demand]]:
    """Up to `most` campaigns with demand for both providers, now and later."""
    jobs, demands = [], []
    for number in range(1, draw(st.integers(1, most)) + 1):
        deadline = draw(st.none() | st.integers(NOW + HOUR, NOW + 40 * HOUR))
        pool = draw(st.sampled_from((1, 1, 2)))
        job = Job(number, f"c{number}", draw(st.integers(0, 3)), pool, draw(st.sampled_from((None, 3 - pool))), NOW - number, deadline)
        jobs.append(job)
        for provider in PROVIDERS:
            demands.append(Demand(job, provider, draw(st.integers(1, 3_000)), draw(st.sampled_from((0, 0, NOW + 2 * HOUR + 60)))))
    return jobs, demands


def exceeded(plan: NearPlan, lines: Iterable[Line]) -> list[str]:
    """Every limit of every server that a plan would break, counted from the grants alone."""
    found = []
    sent: Counter[tuple[int, str, int, int]] = Counter()
    for part in plan.providers:
        for slot, number in enumerate(part.placed.sum(axis=0)):
            start = plan.horizon.slots[slot].start
            for line, count in zip(part.lines, number.tolist(), strict=True):
                for length in (HOUR, DAY):
                    sent[line.server_id, line.provider, length, start // length * length] += count
                if count > line.per_second * plan.horizon.usable(plan.horizon.slots[slot]) + 1e-6:
                    found.append(f"rate of {line} in slot {slot}: {count}")
                if slot == 0 and count and count + line.used_slot > line.per_second * SLOT_SECONDS + 1e-6:
                    found.append(f"rate of {line} in the current slot: {count} and what is used")
                if count and plan.horizon.slots[slot].end <= line.opens_at:
                    found.append(f"closed {line} in slot {slot}: {count}")
    known = {(line.server_id, line.provider): line for line in lines}
    for (server, provider, length, start), count in sent.items():
        line = known[server, provider]
        days = (start - NOW // DAY * DAY) // DAY
        cap = line.per_hour if length == HOUR else line.per_day[min(days, len(line.per_day) - 1)]
        used = {HOUR: line.used_hour, DAY: line.used_day}[length] if start == NOW // length * length else 0
        if count and cap is not None and count + used > cap:
            found.append(f"{length} s of {line} from {start}: {count} and {used} used of {cap}")
    return found
