"""Benchmark: how fast a server's log is read and held against the ledger on MariaDB.

The log is one of Exim's in cutthrough mode, four lines a message, of a campaign whose rows the ledger calls delivered. The reference reads the
same file in the same run and looks for one thing only: the words that end a delivery. A program that understands no line must do at least that.
"""

from __future__ import annotations

import datetime as dt
import os
import re
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import sqlalchemy as sa
from sqlalchemy.engine import Engine

from mail_pipelines import config, home
from mail_pipelines.benchmarks import claim
from mail_pipelines.benchmarks.contract import Result, best_of, judge
from mail_pipelines.benchmarks.mariadb import MariaDB
from mail_pipelines.config import Settings
from mail_pipelines.database.engine import create_engine, reading, transact
from mail_pipelines.database.models import SyncState
from mail_pipelines.dispatch import audit, servers, settlement
from mail_pipelines.dispatch.files import ServerFolders
from mail_pipelines.dispatch.servers import ServerInfo
from mail_pipelines.dispatch.session import journal_of
from mail_pipelines.errors import MailPipelinesError

# On a free core the reference reads 4.1 million lines a second: the ratio is the budget of 150,000.
TARGET = 0.037
_LINES_A_MESSAGE = 4
_ROUNDS = 5
_DELIVERED = re.compile(rb'C="250 [^"]*"')


def run(quick: bool) -> list[Result]:
    """Lines a second, of a log of 400,000 (`quick`: 80,000)."""
    return [measure(20_000 if quick else 100_000)]


def measure(messages: int) -> Result:
    """The audit of the log of so many deliveries."""
    with tempfile.TemporaryDirectory(prefix="mail-pipelines-bench-") as folder:
        database = MariaDB(Path(folder) / "database")
        database.folder.mkdir()
        try:
            settings = _settings(Path(folder), database.start().database())
            engine = create_engine(settings.database.url)
            server = _sent(engine, settings, messages)
            rounds = [(_audited(engine, settings, server, messages), _searched(settings, server)) for _ in range(_ROUNDS)]
            engine.dispose()
        finally:
            database.stop()
    seconds, reference_seconds = (min(times) for times in zip(*rounds, strict=True))
    lines = messages * _LINES_A_MESSAGE
    return judge("audit of a log", lines / seconds, "lines/s", lines / reference_seconds, target=TARGET, better="higher")


def _settings(folder: Path, url: str) -> Settings:
    environ = {name: value for name, value in os.environ.items() if not name.startswith("MAIL_PIPELINES_")}
    environ |= {"MAIL_PIPELINES_HOME": str(folder / "home"), "MAIL_PIPELINES_DATABASE__URL": url}
    home.make(environ)
    return config.load(environ)


def _sent(engine: Engine, settings: Settings, messages: int) -> ServerInfo:
    """A server that has delivered so many messages, by its log and by the ledger."""
    claim.fill(engine, 1, messages)
    servers.register(engine, "mx1", kind="exim", host="127.0.0.1", port=1, now=dt.datetime.now(dt.UTC))
    with reading(engine) as connection:
        server = servers.find(connection, "mx1")
    folders = ServerFolders.of(settings.server, server.key)
    folders.make()
    key = settings.token_key()
    with folders.journal.open("w", encoding="ascii") as file:
        for claimed in claim.claims_of(engine):
            for row in claimed.rows:
                file.writelines(_lines(settlement.token_of(claimed.ref, row.contact_id, row.attempt, key), row.email))
    return server


def _lines(token: str, address: str) -> Iterator[str]:
    begin, sender = "2026-11-24 12:15:42.927 [23506] 1xVpQB-0005at-08", f"b+{token}@bounces.shop.example.test"
    yield f"{begin} INTENT {token} 23506 c8101532772921837.1795000000\n"
    yield f'{begin} >> {address} F=<{sender}> R=mail_exchangers T=onward H=mx.other.test [192.0.2.1] C="250 2.0.0 Ok: queued as 4B1D3" QT=0.100s\n'
    yield f"{begin} <= {sender} H=(c8101532772921837.1795907618) [127.0.0.1] P=esmtp S=16911 id={token}@bounces.shop.example.test\n"
    yield f"{begin} Completed\n"


def _audited(engine: Engine, settings: Settings, server: ServerInfo, messages: int) -> float:
    """Seconds of an audit from the beginning of the log."""
    transact(engine, lambda connection: connection.execute(sa.delete(SyncState).where(SyncState.source == audit.SOURCE)))
    journal = journal_of(ServerFolders.of(settings.server, server.key), server.kind)
    begin = time.perf_counter()
    found = audit.run(engine, settings, server, journal, dt.datetime.now(dt.UTC) + dt.timedelta(minutes=1))
    seconds = time.perf_counter() - begin
    counts = found.numbers()
    if (told := (counts["lines"], counts["delivered"], counts["disagreements"])) != (messages * _LINES_A_MESSAGE, messages, 0):
        raise MailPipelinesError(f"the audit has not understood the log: lines, deliveries and disagreements are {told}")
    return seconds


def _searched(settings: Settings, server: ServerInfo) -> float:
    """Seconds of the reference."""
    path = ServerFolders.of(settings.server, server.key).journal

    def read() -> int:
        with path.open("rb") as file:
            return sum(1 for line in file if _DELIVERED.search(line))

    return best_of(read, runs=1)
