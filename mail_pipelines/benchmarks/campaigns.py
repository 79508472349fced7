"""Campaigns with any number of contacts and pending rows, written in bulk, for measurements."""

from __future__ import annotations

import datetime as dt
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import sqlalchemy as sa
from sqlalchemy.engine import Engine

from mail_pipelines.database import bulk, models, partitions
from mail_pipelines.database.engine import transact
from mail_pipelines.database.models import Campaign, CampaignVersion, Contact, Delivery, State
from mail_pipelines.delivery import counters
from mail_pipelines.messages.compilation import compile_content
from mail_pipelines.messages.content import Content

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import pyarrow as pa

PROVIDER = "other"
_ATTRIBUTES = json.dumps({"first_name": "Maria", "city": "Berlin", "orders": 3})


def make(engine: Engine, campaign_id: int, shards: int, rows_per_shard: int, providers: Sequence[str] = (PROVIDER,)) -> None:
    """A sending campaign `bench-<id>` with version `campaign_id`, new contacts in turn at each provider, and a pending row for each of them."""
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
                segments={"include": [], "exclude": []},
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
    moves: Counter[counters.Place] = Counter()
    for ids, first in add_contacts(engine, shards * rows_per_shard, providers):
        moves.update(_add_rows(engine, campaign_id, ids, (ids - first) // rows_per_shard, providers))
    transact(engine, lambda connection: counters.add(connection, campaign_id, counters.CENTRE, moves, now))


def add_contacts(engine: Engine, total: int, providers: Sequence[str] = (PROVIDER,)) -> Iterator[tuple[npt.NDArray[np.int64], int]]:
    """New contacts, portion by portion: their numbers, and the first number of all."""
    import numpy as np
    import pyarrow as pa

    now = dt.datetime.now(dt.UTC)
    with engine.connect() as connection:
        first = (connection.execute(sa.select(sa.func.max(Contact.id))).scalar() or 0) + 1
    for start in range(0, total, bulk.CHUNK_ROWS):
        ids = np.arange(start, min(start + bulk.CHUNK_ROWS, total), dtype=np.int64) + first
        count = len(ids)
        at = [providers[number % len(providers)] for number in ids.tolist()]
        addresses = [f"person{number}@{provider}.test" for number, provider in zip(ids.tolist(), at, strict=True)]
        when = pa.array([now.replace(tzinfo=None)] * count, pa.timestamp("us"))
        contacts = pa.table(
            {
                "id": ids,
                "email": addresses,
                "address": addresses,
                "address_hash": _hashes(ids),
                "domain": [f"{provider}.test" for provider in at],
                "provider": at,
                "attributes": [_ATTRIBUTES] * count,
                "tracking_allowed": pa.array([True] * count),
                "created_at": when,
                "updated_at": when,
            }
        )
        transact(engine, lambda connection, contacts=contacts: bulk.load(connection, _table(Contact), contacts, ignore_duplicates=True))  # type: ignore[misc]
        yield ids, first


def _add_rows(engine: Engine, campaign_id: int, ids: npt.NDArray[np.int64], shards: npt.NDArray[np.int64], providers: Sequence[str]) -> Counter[counters.Place]:
    """A pending row for each contact; returns how many by shard and provider."""
    import numpy as np
    import pyarrow as pa

    from mail_pipelines.segments.ranks import places, ranks_of

    count = len(ids)
    at = [providers[number % len(providers)] for number in ids.tolist()]
    ledger = pa.table(
        {
            "campaign_id": np.full(count, campaign_id, dtype=np.int32),
            "contact_id": ids,
            "address_hash": _hashes(ids),
            "shard": shards.astype(np.int16),
            "provider": at,
            "state": np.zeros(count, dtype=np.int16),
            "sort_key": places(ranks_of(ids % 365), ids),
            "attempt": np.zeros(count, dtype=np.int16),
            "variant": np.zeros(count, dtype=np.int16),
        }
    )
    transact(engine, lambda connection: bulk.load(connection, _table(Delivery), ledger, ignore_duplicates=True))
    return Counter((shard, provider, State.PENDING, "") for shard, provider in zip(shards.tolist(), at, strict=True))


def _hashes(ids: npt.NDArray[np.int64]) -> pa.Array:
    import pyarrow as pa

    return pa.array([number.to_bytes(16, "big") for number in ids.tolist()], pa.binary(16))


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
