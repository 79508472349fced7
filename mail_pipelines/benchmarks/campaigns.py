"""Campaigns with any number of contacts and pending rows, written in bulk, for measurements."""

from __future__ import annotations

import datetime as dt
import json
from collections.abc import Mapping

import sqlalchemy as sa
from sqlalchemy.engine import Engine

from mail_pipelines.database import bulk, models, partitions
from mail_pipelines.database.engine import transact
from mail_pipelines.database.models import Campaign, CampaignVersion, Contact, Delivery, State
from mail_pipelines.delivery import counters
from mail_pipelines.messages.compilation import compile_content
from mail_pipelines.messages.content import Content

PROVIDER = "other"
_ATTRIBUTES = json.dumps({"first_name": "Maria", "city": "Berlin", "orders": 3})


def make(engine: Engine, campaign_id: int, shards: int, rows_per_shard: int) -> None:
    """A sending campaign `bench-<id>` with version `campaign_id`, new contacts of provider `other`, and a pending row for each of them."""
    import numpy as np
    import pyarrow as pa

    total = shards * rows_per_shard
    now = dt.datetime.now(dt.UTC)
    partitions.extend(engine, now.date())

    def campaign(connection: sa.Connection) -> None:
        connection.execute(
            sa.insert(Campaign).values(
                id=campaign_id,
                key=f"bench-{campaign_id}",
                name="Bench",
                state="sending",
                brand_id=1,
                segments={},
                unsubscribe="all",
                on_unknown="hold",
                priority=1,
                shards=shards,
                version_id=campaign_id,
                created_at=now,
                updated_at=now,
            )
        )

    transact(engine, campaign)
    with engine.connect() as connection:
        first = (connection.execute(sa.select(sa.func.max(Contact.id))).scalar() or 0) + 1
    for start in range(0, total, bulk.CHUNK_ROWS):
        places = np.arange(start, min(start + bulk.CHUNK_ROWS, total), dtype=np.int64)
        ids = places + first
        count = len(ids)
        hashes = [number.to_bytes(16, "big") for number in ids.tolist()]
        addresses = [f"person{number}@other.test" for number in ids.tolist()]
        when = pa.array([now.replace(tzinfo=None)] * count, pa.timestamp("us"))
        contacts = pa.table(
            {
                "id": ids,
                "email": addresses,
                "address": addresses,
                "address_hash": pa.array(hashes, pa.binary(16)),
                "domain": ["other.test"] * count,
                "provider": [PROVIDER] * count,
                "attributes": [_ATTRIBUTES] * count,
                "tracking_allowed": pa.array([True] * count),
                "created_at": when,
                "updated_at": when,
            }
        )
        ledger = pa.table(
            {
                "campaign_id": np.full(count, campaign_id, dtype=np.int32),
                "contact_id": ids,
                "address_hash": pa.array(hashes, pa.binary(16)),
                "shard": (places // rows_per_shard).astype(np.int16),
                "provider": [PROVIDER] * count,
                "state": np.zeros(count, dtype=np.int16),
                "sort_key": (ids % 365).astype(np.int32),
                "attempt": np.zeros(count, dtype=np.int16),
                "variant": np.zeros(count, dtype=np.int16),
            }
        )

        def work(connection: sa.Connection, contacts: pa.Table = contacts, ledger: pa.Table = ledger) -> None:
            bulk.load(connection, _table(Contact), contacts, ignore_duplicates=True)
            bulk.load(connection, _table(Delivery), ledger, ignore_duplicates=True)

        transact(engine, work)
    moves = {(shard, PROVIDER, State.PENDING, ""): rows_per_shard for shard in range(shards)}
    transact(engine, lambda connection: counters.add(connection, campaign_id, counters.CENTRE, moves, now))


def letter(paragraphs: int) -> Content:
    """So many paragraphs of 54 characters around a greeting and a link to unsubscribe; its only field is `first_name`, a text."""
    return Content(
        subject="Hello {{ first_name }}",
        from_address="news@shop.test",
        body="<p>Dear {{ first_name }}</p>"
        + "<p>A paragraph of some length, as offers have them.</p>" * paragraphs
        + '<a href="{{ unsubscribe_url }}">Unsubscribe</a>',
    )


def write_version(engine: Engine, campaign_id: int, content: Content, fields: Mapping[str, str]) -> None:
    """Compile the content and make it the campaign's version."""
    compiled = compile_content(content, fields, lambda urls: list(range(1, len(urls) + 1)))
    version = {"id": campaign_id, "campaign_id": campaign_id, "number": 1, "source": content.to_document()}
    version |= {"sha256": compiled.sha256, "compiled": compiled.to_bytes(), "created_at": dt.datetime.now(dt.UTC)}
    transact(engine, lambda connection: connection.execute(sa.insert(CampaignVersion).values(**version)))


def _table(model: type[models.Base]) -> sa.Table:
    table = model.__table__
    assert isinstance(table, sa.Table)
    return table
