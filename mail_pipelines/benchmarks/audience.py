"""Freezing an audience of a million contacts into the central database, from "it is due" to "ready to send".

The reference loads the same number of ledger-shaped rows, in transactions of the same size, into a table without any index: the
least that putting them into this database on this disk can cost. The freeze besides evaluates the segment, asks the database for
consent, writes the manifest, and keeps the ledger's four indexes and the counters.
"""

from __future__ import annotations

import datetime as dt
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine

from mail_pipelines.benchmarks.contract import Result, judge
from mail_pipelines.campaigns import audience, store
from mail_pipelines.campaigns.campaign import Definition
from mail_pipelines.campaigns.states import CampaignState
from mail_pipelines.config import Settings, SnapshotSettings
from mail_pipelines.contacts.addresses import address_hash
from mail_pipelines.contacts.consent import suppress
from mail_pipelines.database import bulk, models
from mail_pipelines.database.engine import reading, transact
from mail_pipelines.segments import saved
from mail_pipelines.segments.snapshots import refresh_contacts, refresh_engagement

if TYPE_CHECKING:
    import pyarrow as pa

NOW = dt.datetime(2026, 3, 2, 9, tzinfo=dt.UTC)
PROVIDERS = ("google",) * 5 + ("microsoft",) * 3 + ("yahoo",) * 2 + ("apple", "gmx", "other", "other")
# One in so many addresses is suppressed after the snapshot.
SUPPRESSED_EACH = 100
# 30 s for a million, where the reference took 5 s: 2 cores and an SSD, other programs at work. Measured there: 22 s, a ratio of 3.9.
TARGET = 6.0


def run(quick: bool, engine: Engine) -> list[Result]:
    """Fill the given, empty database (best: MariaDB) with contacts and freeze them all; 1 M contacts, or 100,000 if `quick`."""
    contacts = 100_000 if quick else 1_000_000
    with tempfile.TemporaryDirectory(prefix="mail-pipelines-bench-") as home:
        settings = Settings(home=Path(home), snapshots=SnapshotSettings(folder=f"{home}/snapshots"))
        make_contacts(engine, contacts)
        refresh_contacts(engine, settings.snapshot_folder, now=NOW)
        refresh_engagement(engine, settings.snapshot_folder, now=NOW)
        hashes = [address_hash(_address(number)) for number in range(0, contacts, SUPPRESSED_EACH)]
        transact(engine, lambda connection: suppress(connection, hashes, reason="bounce", now=NOW))
        make_campaign(engine)
        begin = time.perf_counter()
        frozen = audience.build(engine, settings, "bench", NOW)
        seconds = time.perf_counter() - begin
        assert frozen.campaign.state is CampaignState.SENDING
        assert (frozen.matched, frozen.audience) == (contacts, contacts - len(hashes))
        reference = load_plainly(engine, frozen.campaign.id, contacts)
    return [judge(f"audience frozen ({contacts:,} contacts, {engine.dialect.name})", seconds, "s", reference, target=TARGET, better="lower")]


def _address(number: int) -> str:
    return f"reader{number}@mail{number % 1000}.example.test"


def make_contacts(engine: Engine, count: int) -> None:
    import pyarrow as pa

    table = models.Contact.metadata.tables[models.Contact.__tablename__]
    moment = pa.scalar(NOW.replace(tzinfo=None), pa.timestamp("us"))
    for start in range(0, count, bulk.CHUNK_ROWS):
        numbers = range(start, min(start + bulk.CHUNK_ROWS, count))
        addresses = [_address(number) for number in numbers]
        rows = pa.table(
            {
                "id": pa.array([number + 1 for number in numbers], pa.int64()),
                "email": addresses,
                "address": addresses,
                "address_hash": pa.array([address_hash(address) for address in addresses], pa.binary(16)),
                "domain": [address.partition("@")[2] for address in addresses],
                "provider": [PROVIDERS[number % len(PROVIDERS)] for number in numbers],
                "attributes": [f'{{"city": "City {number % 500}"}}' for number in numbers],
                "tracking_allowed": pa.repeat(True, len(numbers)),
                "created_at": pa.repeat(moment, len(numbers)),
                "updated_at": pa.repeat(moment, len(numbers)),
            }
        )
        _load(engine, table, rows)


def _load(engine: Engine, table: sa.Table, rows: pa.Table) -> None:
    transact(engine, lambda connection: bulk.load(connection, table, rows, ignore_duplicates=True))


def make_campaign(engine: Engine) -> None:
    saved.save(engine, saved.SavedSegment("everybody", "Everybody", {"all": []}), now=NOW)

    def work(connection: Connection) -> None:
        store.create(connection, Definition(name="Bench", key="bench", include=("everybody",), start_at=NOW), NOW)
        connection.execute(sa.update(models.Campaign).where(models.Campaign.key == "bench").values(state=CampaignState.SCHEDULED.value))

    transact(engine, work)


def load_plainly(engine: Engine, campaign_id: int, count: int) -> float:
    """Seconds that loading `count` rows of the ledger's shape into a table without indexes takes."""
    import pyarrow as pa

    ledger = models.Delivery.metadata.tables[models.Delivery.__tablename__]
    plain = sa.Table("bench_plain_ledger", sa.MetaData(), *(sa.Column(column.name, column.type, nullable=column.nullable) for column in ledger.columns))
    with reading(engine) as connection:
        query = sa.select(ledger).where(ledger.c.campaign_id == campaign_id).limit(bulk.CHUNK_ROWS)
        sample: list[dict[str, Any]] = [dict(row) for row in connection.execute(query).mappings()]
    names = [name for name, value in sample[0].items() if value is not None]
    rows: pa.Table = pa.table({name: pa.array([row[name] for row in sample], pa.binary(16) if name == "address_hash" else None) for name in names})
    plain.create(engine)
    try:
        begin = time.perf_counter()
        for start in range(0, count, rows.num_rows):
            _load(engine, plain, rows.slice(0, min(rows.num_rows, count - start)))
        return time.perf_counter() - begin
    finally:
        plain.drop(engine)
