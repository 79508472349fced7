"""Benchmark: the ledger on MariaDB as the database grows: claims and results by eight servers at once, beside an import, and what sensors and pages ask.

A database of its own for each size, of which the campaigns have three tenths. References measured in the same run: as many rows inserted into a plain table
by as many processes; for times, the budget. `beside_import` has the part beside an import.
"""

from __future__ import annotations

import datetime as dt
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.engine import Engine

from mail_pipelines.benchmarks import beside_import, campaigns, claim
from mail_pipelines.benchmarks.claim import CLAIM_ROWS, CLAIMERS
from mail_pipelines.benchmarks.contract import Result, judge
from mail_pipelines.benchmarks.mariadb import MariaDB
from mail_pipelines.campaigns import progress, store
from mail_pipelines.campaigns.shards import MAX_SHARDS, shards_for
from mail_pipelines.capacity import allotments
from mail_pipelines.contacts.providers import providers
from mail_pipelines.database import migrate
from mail_pipelines.database.engine import create_engine, database_now, is_transient, reading, transact
from mail_pipelines.database.models import Allotment, Delivery, Server, State
from mail_pipelines.delivery.recording import SLOT_SECONDS, slot_at
from mail_pipelines.dispatch import final, openings, servers
from mail_pipelines.dispatch.claims import OpenClaim

CAMPAIGNS = 3
SIZES, QUICK_SIZES = (100_000, 1_000_000, 10_000_000), (100_000,)
IMPORTED, QUICK_IMPORTED = 1_000_000, 50_000
SECONDS, QUICK_SECONDS = 15.0, 3.0
ALONE_SECONDS, QUICK_ALONE_SECONDS = 30.0, 3.0
# Of the plain rows that as many processes insert; see `claim`.
TARGET_TOGETHER = claim.TARGET_TOGETHER
BUDGET_PER_SECOND = 20_000
# In smaller campaigns the rows are gone before all servers have begun.
RATES_FROM = 1_000_000
TICK_MILLISECONDS, STATUS_MILLISECONDS = 1000.0, 50.0
_HEARTBEAT_SECONDS = 3600.0
_MOST_PER_SECOND = 25_000
# What a database host of this kind would have.
_OPTIONS = ("--innodb-buffer-pool-size=4G", "--innodb-log-file-size=1G")


@dataclass
class Figures:
    """Of one size: rows a second, milliseconds. With nothing but `claims` where only those were asked for."""

    contacts: int
    claims: beside_import.Figures = field(init=False)
    together: float = 0.0
    inserted: float = 0.0
    beside_a_held_provider: float = 0.0
    retries: int = 0
    ticks: Mapping[str, float] = field(default_factory=dict)
    status: float = 0.0


def run(quick: bool, advance: Callable[[Figures], None] = lambda _: None, *, only_import: bool = False) -> list[Result]:
    """Measure each size, or only its claims beside an import; `advance` is called after each."""
    found: list[Result] = []
    for contacts in QUICK_SIZES if quick else SIZES:
        with tempfile.TemporaryDirectory(prefix="mail-pipelines-bench-") as folder:
            server = MariaDB(Path(folder), options=_OPTIONS).start()
            try:
                figures = _measure(server.database(), Path(folder), contacts, quick, only_import)
            finally:
                server.stop()
        advance(figures)
        found += [*beside_import.judged(f"{contacts:,} contacts", figures.claims), *([] if only_import else _judged(figures))]
    return found


def plot(found: Sequence[Figures], place: Path) -> None:
    """How rates and times grow with the number of contacts, as a picture of the kind that the file's name says."""
    from matplotlib.figure import Figure

    contacts = [figures.contacts for figures in found]
    claims = [figures.claims.beside for figures in found]
    picture = Figure(figsize=(9, 5), layout="constrained")
    rates, times = picture.subplots(1, 2)
    large = [figures for figures in found if figures.contacts >= RATES_FROM]
    for name, told in (
        (f"claimed and recorded by {CLAIMERS} servers", [figures.together for figures in large]),
        ("by the others while one provider's rows are held", [figures.beside_a_held_provider for figures in large]),
    ):
        rates.plot([figures.contacts for figures in large], told, "o-", label=name)
    rates.axhline(BUDGET_PER_SECOND, color="0.6", linestyle="--", label="budget")
    rates.set_title("rows a second")
    rates.set_ylim(bottom=0)
    times.plot(contacts, [found.median for found in claims], "o-", label="claim beside an import, median")
    times.plot(contacts, [found.p99 for found in claims], "o-", label="claim beside an import, 99 of 100")
    for name in found[0].ticks:
        times.plot(contacts, [figures.ticks[name] for figures in found], "o-", label=name)
    times.plot(contacts, [figures.status for figures in found], "o-", label="status of a campaign")
    times.set_title("milliseconds")
    times.set_yscale("log")
    for axes in (rates, times):
        axes.set_xscale("log")
        axes.set_xlabel("contacts")
        axes.legend(fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.15))
    picture.savefig(place)


def _judged(figures: Figures) -> list[Result]:
    of = f"{figures.contacts:,} contacts"
    others = figures.together * (1 - 1 / CLAIMERS)
    rates = [
        judge(f"{of}: claimed and recorded by {CLAIMERS} servers", figures.together, "rows/s", figures.inserted, target=TARGET_TOGETHER, better="higher"),
        judge(f"{of}: by the others while rows of one provider are held", figures.beside_a_held_provider, "rows/s", others, target=0.85, better="higher"),
    ]
    return [
        *(rates if figures.contacts >= RATES_FROM else []),
        judge(f"{of}: transactions tried again", figures.retries, "of a hundred each", CLAIMERS * 100, target=1, better="lower"),
        *(judge(f"{of}: {name}", value, "ms", TICK_MILLISECONDS, target=1, better="lower") for name, value in figures.ticks.items()),
        judge(f"{of}: status of a campaign", figures.status, "ms", STATUS_MILLISECONDS, target=1, better="lower"),
    ]


def _measure(url: str, folder: Path, contacts: int, quick: bool, only_import: bool) -> Figures:
    engine = create_engine(url)
    migrate.upgrade(engine)
    to = providers()[:CLAIMERS]
    _fill(engine, contacts, to)
    figures = Figures(contacts)
    if not only_import:
        figures.ticks = _ticks(engine)
        figures.status = _milliseconds(lambda: _status(engine))
    people, alone = (QUICK_IMPORTED, QUICK_ALONE_SECONDS) if quick else (IMPORTED, ALONE_SECONDS)
    figures.claims = beside_import.measure(url, folder, people, alone, to)
    if not only_import:
        _rates(url, engine, figures, quick, to)
    engine.dispose()
    return figures


def _rates(url: str, engine: Engine, figures: Figures, quick: bool, to: Sequence[str]) -> None:
    # Small campaigns are claimed to the end in longer.
    seconds = min(QUICK_SECONDS if quick else SECONDS, CAMPAIGNS * figures.contacts / 10 / _MOST_PER_SECOND / 3)
    claim.PLAIN.create(engine)
    with engine.connect() as holder:
        holder.execute(_rows_of(to[0]))
        figures.beside_a_held_provider, retries = _together(url, to, seconds)
        holder.rollback()
    figures.together, more = _together(url, to, seconds)
    figures.retries = retries + more
    figures.inserted = claim.rate(claim.at_once(url, claim.inserter, to, seconds))


def _fill(engine: Engine, contacts: int, to: Sequence[str]) -> None:
    """Campaigns of a tenth each, people in none, and servers that speak and have grants."""
    shards = shards_for(contacts // 10)
    rows_per_shard = contacts // 10 // shards
    for number in range(1, CAMPAIGNS + 1):
        campaigns.make(engine, number, shards, rows_per_shard, to)
    for _ in campaigns.add_contacts(engine, contacts - CAMPAIGNS * shards * rows_per_shard, to):
        pass
    with reading(engine) as connection:
        now = database_now(connection)
    fleet = [
        {"id": number, "key": f"s{number}", "kind": "catcher", "state": "active", "host": "h", "port": 1, "incarnation": "i", "created_at": now}
        | {"heartbeat_at": now}
        for number in range(1, CLAIMERS + 1)
    ]
    grants = [
        {
            "campaign_id": campaign,
            "server_id": server["id"],
            "provider": provider,
            "slot_start": slot_at(now) + step * SLOT_SECONDS,
            "granted": 2**30,
            "used": 0,
        }
        for campaign, server, provider, step in itertools.product(range(1, CAMPAIGNS + 1), fleet, to, range(4))
    ]

    def work(connection: sa.Connection) -> None:
        connection.execute(sa.insert(Server), fleet)
        connection.execute(sa.insert(Allotment), grants)

    transact(engine, work)
    servers.set_limits(engine, None, "*", {"per_second": 1e6})
    with engine.connect() as connection:
        connection.exec_driver_sql("ANALYZE TABLE contacts, deliveries, campaign_counters")


def _milliseconds(work: Callable[[], object], runs: int = 7) -> float:
    """The median of several."""
    times = []
    for _ in range(runs):
        begin = time.perf_counter()
        work()
        times.append(time.perf_counter() - begin)
    return statistics.median(times) * 1000


def _ticks(engine: Engine) -> dict[str, float]:
    """What the busiest sensors ask of the database."""

    def find() -> None:
        with reading(engine) as connection:
            openings.find(connection, database_now(connection), slots=2, heartbeat_seconds=_HEARTBEAT_SECONDS, in_flight=())

    def finished() -> None:
        with reading(engine) as connection:
            final.final_shards(connection, final.recent_campaigns(connection, dt.datetime.now(dt.UTC)), MAX_SHARDS, {})

    return {
        "tick of open_shards, grants": _milliseconds(lambda: allotments.fill(engine, _HEARTBEAT_SECONDS)),
        "tick of open_shards, runs": _milliseconds(find),
        "tick of finished_shards": _milliseconds(finished),
    }


def _status(engine: Engine) -> None:
    with reading(engine) as connection:
        campaign = store.load(connection, "bench-1")
        progress.totals(connection, campaign)
        progress.by_provider(connection, 1)
        progress.per_minute(connection, 1, State.DELIVERED, dt.datetime.now(dt.UTC))


def _rows_of(provider: str) -> sa.Select[int]:
    """Locks the pending rows of a provider in one campaign, as a statement that nobody has foreseen might."""
    place = (Delivery.campaign_id == 1, Delivery.provider == provider, Delivery.shard == 0, Delivery.state == int(State.PENDING))
    return sa.select(Delivery.contact_id).where(*place).with_for_update()


# --- claims -------------------------------------------------------------------------------------------------------


def _claimer(url: str, server: int, provider: str, begin: Any, seconds: float, done: Any) -> None:
    """Claim rows to one provider from all campaigns and record them, for so many seconds or until none is left; tells rows, seconds and retries."""
    engine = create_engine(url)
    retries = 0

    @event.listens_for(engine, "handle_error")
    def count(context: sa.engine.ExceptionContext) -> None:
        nonlocal retries
        error = context.sqlalchemy_exception
        retries += isinstance(error, sa.exc.DBAPIError) and is_transient(error)

    memory = claim.memory_of(engine)
    # The first call of a connection takes longer than all that a small campaign has.
    first = claim.claim_rows(engine, server, 0, memory, 1, campaign=1, provider=provider)
    if isinstance(first, OpenClaim):
        claim.record_rows(engine, first)
    begin.wait()
    rows, start = 0, time.monotonic()
    for campaign, shard in itertools.product(range(1, CAMPAIGNS + 1), range(MAX_SHARDS)):
        while time.monotonic() - start < seconds and isinstance(
            opened := claim.claim_rows(engine, server, shard, memory, CLAIM_ROWS, campaign=campaign, provider=provider), OpenClaim
        ):
            rows += claim.record_rows(engine, opened)
    done.put((rows, time.monotonic() - start, retries))


def _together(url: str, to: Sequence[str], seconds: float) -> tuple[float, int]:
    """Rows a second of eight servers, each to a provider of its own; and how many transactions were tried again."""
    results = claim.at_once(url, _claimer, to, seconds)
    return claim.rate([(rows, taken) for rows, taken, _ in results if rows]), sum(retries for *_, retries in results)
