"""What is simulated: the fleet, its limits, the campaigns, and how often what goes wrong (`world.toml`)."""

from __future__ import annotations

import datetime as dt
import functools
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mail_pipelines.campaigns.send_window import SendWindow
from mail_pipelines.capacity.demand import Job
from mail_pipelines.capacity.horizon import DAY, HOUR
from mail_pipelines.delivery.recording import SLOT_SECONDS
from mail_pipelines.dispatch.windows import Span

_DATA = Path(__file__).with_name("world.toml")
# A Monday.
BEGIN = int(dt.datetime(2026, 3, 2, tzinfo=dt.UTC).timestamp())
POOL_ID, POOL = 1, "main"
# Every fourth campaign is a small and urgent one, which comes while the one before is being sent.
_URGENT, _URGENT_SIZE, _URGENT_AFTER, _URGENT_HOURS = 4, 0.15, 4 * HOUR, 10
_GROWTH = (0.6, 1.4)
Counts = NDArray[np.int64]
Numbers = NDArray[np.float64]


@dataclass(frozen=True)
class Size:
    """`days` is the time in which campaigns begin and, if all goes well, end."""

    recipients: int = 100_000_000
    servers: int = 300
    campaigns: int = 12
    days: int = 28
    seed: int = 1


def key_of(server: int) -> str:
    """The name of a server."""
    return f"mx{server + 1}"


@functools.cache
def world() -> dict[str, Any]:
    return tomllib.loads(_DATA.read_text(encoding="utf-8"))


@dataclass(frozen=True)
class Scenario:
    """C campaigns with `rows` (C × P) for the P providers. Limits are V × P for all servers that there may ever be, infinite where there is none.

    The first `size.servers` are there at the beginning; `steps` (V × P) says which of their lines are on a warm-up, -1: none. `windows` (C) are their send
    windows, `spans` when these are open.
    """

    size: Size
    providers: tuple[str, ...]
    jobs: tuple[Job, ...]
    rows: Counts
    per_second: Numbers
    per_hour: Numbers
    per_day: Numbers
    steps: Counts
    windows: tuple[SendWindow | None, ...]
    spans: tuple[tuple[Span, ...] | None, ...]

    @classmethod
    def of(cls, size: Size, rng: np.random.Generator) -> Scenario:
        data = world()
        most = size.servers + round(max(4, size.servers * data["making"]["hosts"]))
        limits = [np.array([float(provider.get(name, np.inf)) for provider in data["provider"]]) for name in ("per_second", "per_hour", "per_day")]
        factors = np.ones(most)
        factors[: size.servers] = rng.choice(data["fleet"]["factors"], size.servers)
        per_second, per_hour, per_day = (np.outer(factors, limit) for limit in limits)
        steps = np.full(per_day.shape, -1)
        first, last = data["fleet"]["steps"]
        warming = rng.permutation(size.servers)[: round(size.servers * data["fleet"]["warming"])]
        steps[warming] = rng.integers(first, last, (len(warming), 1))
        windows = tuple(_windows(size.campaigns))
        jobs = tuple(_jobs(size, rng, windows))
        spans = tuple(None if window is None else tuple(window.spans(window.zone, job.start_at, _end(size))) for window, job in zip(windows, jobs, strict=True))
        growth = np.linspace(*_GROWTH, size.campaigns) * [_URGENT_SIZE if job.priority == 3 else 1.0 for job in jobs]
        sizes = rng.multinomial(size.recipients, growth / growth.sum())
        shares = np.array([provider["share"] for provider in data["provider"]])
        rows = np.array([rng.multinomial(count, shares / shares.sum()) for count in sizes])
        names = tuple(provider["name"] for provider in data["provider"])
        return cls(size, names, jobs, rows, per_second, np.floor(per_hour), np.floor(per_day), steps, windows, spans)

    @property
    def end(self) -> int:
        """Nothing is waited for after this (epoch seconds)."""
        return _end(self.size)

    def open(self, now: int) -> NDArray[np.bool_]:
        """Whose window is open in all of a slot: C."""
        return np.array([spans is None or any(opens <= now and now + SLOT_SECONDS <= closes for opens, closes in spans) for spans in self.spans])


def _end(size: Size) -> int:
    return BEGIN + (size.days + 7) * DAY


def _windows(campaigns: int) -> Iterator[SendWindow | None]:
    data = dict(world()["window"])
    every = data.pop("every")
    window = SendWindow.from_document(data)
    others = 0
    for number in range(campaigns):
        urgent = number % _URGENT == _URGENT - 1
        others += not urgent
        yield window if not urgent and not others % every else None


def _jobs(size: Size, rng: np.random.Generator, windows: Sequence[SendWindow | None]) -> list[Job]:
    """Campaigns, the first a day after the beginning, the last three days before the end; those that are not urgent begin between 6 and 10 o'clock UTC."""
    jobs: list[Job] = []
    for number, day in enumerate(np.linspace(1, max(1, size.days - 3), size.campaigns).astype(int)):
        if number % _URGENT == _URGENT - 1:
            start, priority, hours = jobs[-1].start_at + _URGENT_AFTER, 3, _URGENT_HOURS
        else:
            start = BEGIN + int(day) * DAY + 6 * HOUR + int(rng.integers(0, 17)) * SLOT_SECONDS
            priority, hours = int(rng.integers(0, 3)), int(rng.integers(18, 40)) + 24 * (windows[number] is not None)
        jobs.append(Job(number + 1, f"c{number + 1:02}", priority, POOL_ID, None, start, start + hours * HOUR))
    return jobs
