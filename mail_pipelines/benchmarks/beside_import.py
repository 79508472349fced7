"""Part of `bench ledger`: how long a claim takes while contacts are imported, how many are imported meanwhile, and the same claims with no import.

Each server is a process that keeps its rows claimed while it would send them, as in operation, and then gives them back unsent.
"""

from __future__ import annotations

import datetime as dt
import random
import statistics
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mail_pipelines.benchmarks import claim
from mail_pipelines.benchmarks.claim import CLAIM_ROWS, CLAIMERS
from mail_pipelines.benchmarks.contract import Result, judge
from mail_pipelines.database.engine import create_engine
from mail_pipelines.database.models import State
from mail_pipelines.dispatch.claims import OpenClaim

CLAIM_MILLISECONDS = 20.0
# With nothing being sent; beside sending an import must not starve.
IMPORT_PER_SECOND, IMPORT_SHARE = 50_000, 0.1


@dataclass(frozen=True)
class Load:
    """What each server asks for: up to so many rows, once in so many seconds, at a moment that is not the others'."""

    rows: int
    every_seconds: float

    @property
    def per_second(self) -> float:
        return CLAIMERS * self.rows / self.every_seconds

    def __str__(self) -> str:
        return f"claims of {self.rows} rows, {self.per_second:,.0f} rows/s in all"


# As many rows as a server sends in two seconds where it may send 25 a second; and the rate that the ledger is to reach with nothing beside it.
PACED, AT_FULL_RATE = Load(50, 2.0), Load(CLAIM_ROWS, CLAIMERS * CLAIM_ROWS / 20_000)


@dataclass(frozen=True)
class Claims:
    """Milliseconds of each claim, rows claimed a second, and contacts imported a second."""

    load: Load
    milliseconds: list[float]
    rows_per_second: float
    imported_per_second: float

    @property
    def median(self) -> float:
        return statistics.median(self.milliseconds)

    @property
    def p99(self) -> float:
        return statistics.quantiles(self.milliseconds, n=100, method="inclusive")[98]


@dataclass(frozen=True)
class Figures:
    """With no import for so many seconds, and beside one."""

    alone: Claims
    beside: Claims
    at_full_rate: Claims


def measure(url: str, folder: Path, people: int, seconds: float, to: Sequence[str]) -> Figures:
    """Claim rows of campaign 1, each server those to one provider; `people` new contacts are imported beside them, at full rate a fifth."""
    file, other = (_write(folder / f"{name}.csv", name, count) for name, count in (("contacts", people), ("others", people // 5)))
    alone = _run(url, PACED, to, seconds=seconds)
    return Figures(alone, _run(url, PACED, to, file=file, people=people), _run(url, AT_FULL_RATE, to, file=other, people=people // 5))


def judged(of: str, figures: Figures) -> Iterable[Result]:
    for beside, found in (("no import", figures.alone), ("an import", figures.beside), ("an import", figures.at_full_rate)):
        name = f"{of}: {found.load}, beside {beside}"
        yield judge(f"{name}, median", found.median, "ms", CLAIM_MILLISECONDS, target=1, better="lower")
        yield judge(f"{name}, 99 of 100", found.p99, "ms", CLAIM_MILLISECONDS, target=1, better="lower")
        if found.imported_per_second:
            yield judge(f"{name}: claimed", found.rows_per_second, "rows/s", found.load.per_second, target=0.9, better="higher")
            yield judge(f"{name}: imported", found.imported_per_second, "contacts/s", IMPORT_PER_SECOND, target=IMPORT_SHARE, better="higher")


def _write(file: Path, name: str, people: int) -> Path:
    with file.open("w", encoding="utf-8") as out:
        out.write("email,first_name,city\n")
        out.writelines(f"reader{number}@{name}{number % 500}.test,Maria,Berlin\n" for number in range(people))
    return file


def _run(url: str, load: Load, to: Sequence[str], *, seconds: float = 0.0, file: Path | None = None, people: int = 0) -> Claims:
    """For as long as the import takes, or for so many seconds if there is none."""
    begin, over, done = claim.CONTEXT.Barrier(CLAIMERS + 1), claim.CONTEXT.Event(), claim.CONTEXT.Queue()
    servers = [claim.CONTEXT.Process(target=_serve, args=(url, number, provider, load, begin, over, done)) for number, provider in enumerate(to, 1)]
    for process in servers:
        process.start()
    begin.wait()
    start = time.monotonic()
    if file is None:
        time.sleep(seconds)
    else:
        writer = claim.CONTEXT.Process(target=_import, args=(url, str(file)))
        writer.start()
        writer.join()
        assert writer.exitcode == 0
    taken = time.monotonic() - start
    over.set()
    found = [done.get() for _ in servers]
    for process in servers:
        process.join()
    return Claims(load, [moment for times, _ in found for moment in times], sum(rows for _, rows in found) / taken, people / taken)


def _import(url: str, file: str) -> None:
    from mail_pipelines.contacts import importing

    importing.import_file(create_engine(url), Path(file), list_name="news", now=dt.datetime.now(dt.UTC))


def _serve(url: str, server: int, provider: str, load: Load, begin: Any, over: Any, done: Any) -> None:
    """Claim until it is over; tells the milliseconds of each claim, and the rows."""
    engine = create_engine(url)
    memory = claim.memory_of(engine)
    moments = random.Random(server)

    def ask(rows: int) -> Any:
        return claim.claim_rows(engine, server, 0, memory, rows, campaign=1, provider=provider)

    def give_back(opened: Any) -> int:
        return claim.record_rows(engine, opened, State.PENDING) if isinstance(opened, OpenClaim) else 0

    # The first call of a connection makes its tables.
    give_back(ask(1))
    begin.wait()
    times, rows, sent = [], 0, None
    period = time.monotonic()
    while not over.wait(max(0.0, period + moments.uniform(0, load.every_seconds) - time.monotonic())):
        asked = time.monotonic()
        opened = ask(load.rows)
        times.append((time.monotonic() - asked) * 1000)
        # A session asks for its next rows before it is done with the last ones.
        rows += give_back(sent)
        sent = opened
        period = max(period + load.every_seconds, time.monotonic() - load.every_seconds)
    give_back(sent)
    done.put((times, rows))
