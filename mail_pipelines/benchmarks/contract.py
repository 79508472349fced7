"""What every benchmark prints: figures with a reference measured in the same run, so that a slow machine does not fail a fast program."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class Result:
    """One figure. `ratio` is value ÷ reference; `met` is judged by the ratio against `target`."""

    name: str
    value: float
    unit: str
    reference: float
    ratio: float
    target: float
    met: bool


def judge(name: str, value: float, unit: str, reference: float, *, target: float, better: Literal["lower", "higher"]) -> Result:
    """A result whose ratio must be at most (`lower`) or at least (`higher`) the target."""
    ratio = value / reference if reference else float("inf")
    met = ratio <= target if better == "lower" else ratio >= target
    return Result(name, round(value, 6), unit, round(reference, 6), round(ratio, 4), target, met)


def document(bench: str, results: list[Result]) -> str:
    """The last line a benchmark prints with `--json`."""
    return json.dumps({"bench": bench, "results": [asdict(result) for result in results]})


def best_of(work: Callable[[], Any], runs: int = 5, clock: Callable[[], float] = time.perf_counter) -> float:
    """The shortest of several runs (s), which other programs disturb least. Work that waits for nothing they do not disturb by `time.process_time`."""
    times = []
    for _ in range(runs):
        begin = clock()
        work()
        times.append(clock() - begin)
    return min(times)
