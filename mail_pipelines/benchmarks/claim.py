"""Benchmark: how fast rows are claimed and recorded on MariaDB, and how much memory a send run takes.

References measured in the same run: one bare UPDATE of as many rows by primary key, committed, on the same server by as
many processes; and for memory the process itself before it sends.
"""

from __future__ import annotations

import datetime as dt
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Engine

from mail_pipelines.benchmarks import campaigns
from mail_pipelines.benchmarks.campaigns import PROVIDER
from mail_pipelines.benchmarks.contract import Result, judge
from mail_pipelines.benchmarks.mariadb import MariaDB
from mail_pipelines.database import migrate
from mail_pipelines.database.engine import create_engine, transact
from mail_pipelines.database.models import Allotment, Claim, Delivery, LedgerGeneration, Server, State
from mail_pipelines.delivery.recording import SLOT_SECONDS, record, slot_at
from mail_pipelines.delivery.recording import Result as Outcome
from mail_pipelines.dispatch import claims, servers
from mail_pipelines.dispatch.claims import Memory, OpenClaim, Sender
from mail_pipelines.dispatch.journal import Position

CLAIMERS = 8
ROWS_PER_SHARD = 31_000
CLAIM_ROWS = 500
SINGLE_CLAIM_ROWS = 50
_CAMPAIGN = 1


def fill(engine: Engine, shards: int, rows_per_shard: int) -> None:
    """One sending campaign with contacts and pending rows, eight servers, and room for all of it."""
    campaigns.make(engine, _CAMPAIGN, shards, rows_per_shard)
    now = dt.datetime.now(dt.UTC)

    def fleet(connection: sa.Connection) -> None:
        fleet = [
            {"id": number, "key": f"s{number}", "kind": "catcher", "state": "active", "host": "h", "port": 1, "incarnation": "i", "created_at": now}
            for number in range(1, CLAIMERS + 1)
        ]
        connection.execute(sa.insert(Server), fleet)
        grant = {"campaign_id": _CAMPAIGN, "provider": PROVIDER, "granted": 2**30, "used": 0}
        rows = [grant | {"server_id": server["id"], "slot_start": slot_at(now) + step * SLOT_SECONDS} for server in fleet for step in range(3)]
        connection.execute(sa.insert(Allotment), rows)

    transact(engine, fleet)
    servers.set_limits(engine, None, "*", {"per_second": 1e6})


def _claim(engine: Engine, server: int, shard: int, memory: Memory, limit: int) -> OpenClaim | claims.NothingClaimed:
    return claims.open_claim(
        engine,
        Sender(server, f"s{server}", "i", "boot", "run"),
        memory,
        claim_id=claims.new_id(),
        campaign_id=_CAMPAIGN,
        shard=shard,
        provider=PROVIDER,
        limit=limit,
        position=Position(1, 0),
        lease_seconds=120,
    )


def _record(engine: Engine, claim: OpenClaim) -> int:
    outcomes = [Outcome(row.contact_id, row.attempt, State.DELIVERED, 250, "2.0.0") for row in claim.rows]
    transact(engine, lambda connection: record(connection, claim.ref, outcomes, claim_state="open"))
    return len(outcomes)


def _generation(engine: Engine) -> Memory:
    with engine.connect() as connection:
        return Memory(connection.execute(sa.select(LedgerGeneration.generation)).scalar_one())


def _claimer(url: str, server: int, shard: int, begin: Any, seconds: float, done: Any) -> None:
    """Claim and record for so many seconds; tells the number of rows and the seconds they took."""
    engine = create_engine(url)
    memory = _generation(engine)
    begin.wait()
    rows, start = 0, time.monotonic()
    while time.monotonic() - start < seconds:
        claim = _claim(engine, server, shard, memory, CLAIM_ROWS)
        if not isinstance(claim, OpenClaim):
            break
        rows += _record(engine, claim)
    done.put((rows, time.monotonic() - start))


def _updater(url: str, server: int, shard: int, begin: Any, seconds: float, done: Any) -> None:
    """The reference: bare updates of as many rows by primary key, one commit each."""
    engine = create_engine(url)
    begin.wait()
    rows, start = 0, time.monotonic()
    first = shard * ROWS_PER_SHARD + 1
    while time.monotonic() - start < seconds and rows < ROWS_PER_SHARD - CLAIM_ROWS:
        ids = list(range(first + rows, first + rows + CLAIM_ROWS))
        update = sa.update(Delivery).where(Delivery.campaign_id == _CAMPAIGN, Delivery.contact_id.in_(ids)).values(server_id=server)
        transact(engine, lambda connection, update=update: connection.execute(update))  # type: ignore[misc]
        rows += CLAIM_ROWS
    done.put((rows, time.monotonic() - start))


def _together(url: str, work: Any, shards: int, seconds: float) -> float:
    """Rows a second of eight processes that start at the same moment."""
    context = multiprocessing.get_context("spawn")
    begin, done = context.Barrier(CLAIMERS), context.Queue()
    processes = [context.Process(target=work, args=(url, number + 1, number % shards, begin, seconds, done)) for number in range(CLAIMERS)]
    for process in processes:
        process.start()
    results = [done.get() for _ in processes]
    for process in processes:
        process.join()
    return float(sum(rows for rows, _ in results) / max(taken for _, taken in results))


@contextmanager
def _private_database(url: str | None) -> Iterator[str]:
    if url is not None:
        yield url
        return
    with tempfile.TemporaryDirectory(prefix="mail-pipelines-bench-") as folder:
        server = MariaDB(Path(folder)).start()
        try:
            yield server.database()
        finally:
            server.stop()


def run(quick: bool, url: str | None = None) -> list[Result]:
    """Measure on the empty database at `url`, or on a MariaDB server started for it."""
    shards = CLAIMERS if quick else 64
    with _private_database(url) as database:
        engine = create_engine(database)
        migrate.upgrade(engine)
        fill(engine, shards, ROWS_PER_SHARD)
        memory = _generation(engine)
        durations = []
        for _ in range(20 if quick else 60):
            start = time.perf_counter()
            claim = _claim(engine, 1, shards - 1, memory, SINGLE_CLAIM_ROWS)
            durations.append(time.perf_counter() - start)
            assert isinstance(claim, OpenClaim)
            _record(engine, claim)
        median = sorted(durations)[len(durations) // 2]
        reference_update = _one_update(engine, shards)
        seconds = 4 if quick else 15
        claimed = _together(database, _claimer, shards, seconds)
        bare = _together(database, _updater, shards, seconds)
        still_open = transact(engine, lambda connection: connection.execute(sa.select(sa.func.count()).where(Claim.state != "closed")).scalar_one())
        assert still_open == 0
        engine.dispose()
    memory_small, memory_large = (_memory(recipients) for recipients in ((10_000, 100_000) if quick else (10_000, 1_000_000)))
    return [
        judge("claim transaction", median * 1000, "ms", reference_update * 1000, target=2.65, better="lower"),
        judge("claimed and recorded by 8 claimers", claimed, "rows/s", bare, target=0.25, better="higher"),
        judge("memory of a send run above its imports, small audience", memory_small[0], "MB", 60, target=1, better="lower"),
        judge("memory of a send run above its imports, large audience", memory_large[0], "MB", 60, target=1, better="lower"),
    ]


def _one_update(engine: Engine, shards: int) -> float:
    """Median seconds of one bare update of `SINGLE_CLAIM_ROWS` rows by primary key, with its commit."""
    durations = []
    first = (shards - 1) * ROWS_PER_SHARD + 20_000
    for number in range(20):
        ids = list(range(first + number * SINGLE_CLAIM_ROWS, first + (number + 1) * SINGLE_CLAIM_ROWS))
        update = sa.update(Delivery).where(Delivery.campaign_id == _CAMPAIGN, Delivery.contact_id.in_(ids)).values(server_id=number + 1)
        start = time.perf_counter()
        transact(engine, lambda connection, update=update: connection.execute(update))  # type: ignore[misc]
        durations.append(time.perf_counter() - start)
    return sorted(durations)[len(durations) // 2]


# --- memory -----------------------------------------------------------------------------------------------------

_SENDER = """
import json
from mail_pipelines import config, definitions
from mail_pipelines.database.engine import open_engine, reading
from mail_pipelines.dispatch import sending, servers
def megabytes(field):
    # Not getrusage: that counts what this process was before it became a Python of its own.
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(field)) / 1024
baseline = megabytes("VmRSS")
settings = config.load()
engine = open_engine(settings.database)
with reading(engine) as connection:
    server = servers.find(connection, "bench")
report = sending.run(engine, settings, server, sending.plan(engine, "bench-1", 0), 0, "run", lambda _: None)
peak = megabytes("VmHWM")
print(json.dumps([peak - baseline, report.sent, peak]))
"""


def _memory(recipients: int) -> tuple[float, int]:
    """(MB above the imports, messages sent) of a real session of some seconds through a catcher, one shard of all recipients."""
    from mail_pipelines import home
    from mail_pipelines.supervision import Processes
    from mail_pipelines.up import start_catcher

    with tempfile.TemporaryDirectory(prefix="mail-pipelines-bench-") as folder:
        environ = {"MAIL_PIPELINES_HOME": folder, "MAIL_PIPELINES_SENDING__SESSION_SECONDS": "8"}
        os.environ.update(environ)
        home.make(os.environ)
        from mail_pipelines import config

        settings = config.load()
        engine = create_engine(settings.database.url)
        fill(engine, 1, recipients)
        campaigns.write_version(engine, _CAMPAIGN, campaigns.letter(500), {"first_name": "text"})
        with Processes() as processes:
            start_catcher(processes, engine, settings, "bench")
            servers.set_limits(engine, None, "*", {"connections": 16, "per_second": 2000.0})
            folders = Path(settings.server.log_folder) / "bench" / "main.log"
            processes.wait_until_ready(folders.exists, seconds=30, what="the catcher")
            answer = subprocess.run([sys.executable, "-c", _SENDER], env=os.environ.copy(), capture_output=True, text=True, check=True)
        above, sent, _ = json.loads(answer.stdout.splitlines()[-1])
        for name in environ:
            del os.environ[name]
    return above, sent
