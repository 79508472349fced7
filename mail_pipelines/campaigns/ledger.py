"""Loading the ledger of a campaign from its manifest: in chunks, each with its counters in one transaction, resumable after any kill."""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable
from itertools import accumulate
from typing import TYPE_CHECKING

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine

from mail_pipelines.campaigns.campaign import CampaignError
from mail_pipelines.campaigns.states import CampaignState, StateError
from mail_pipelines.database import bulk
from mail_pipelines.database.engine import reading, transact
from mail_pipelines.database.models import Campaign, CampaignCounter, Delivery, State
from mail_pipelines.delivery import counters

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet

_LEDGER = Delivery.metadata.tables[Delivery.__tablename__]


def load(engine: Engine, campaign_id: int, manifest: pyarrow.parquet.ParquetFile, now: dt.datetime, advance: Callable[[int], None]) -> int:
    """Load what is not loaded yet, as pending rows; returns the number of rows in the ledger, counted.

    The place to go on is the sum of the campaign's counters, for these change in the transaction of each chunk; the campaign's
    row is locked meanwhile, so two freezes of one campaign take turns. Raises `StateError` if the campaign is no longer building.
    """
    groups = [manifest.metadata.row_group(number).num_rows for number in range(manifest.num_row_groups)]
    begins = {begin: number for number, begin in enumerate(accumulate(groups, initial=0))}
    loaded = _loaded_rows(engine, campaign_id)
    advance(loaded)
    while loaded < manifest.metadata.num_rows:
        if loaded not in begins:
            raise CampaignError(f"the ledger holds {loaded} rows of campaign {campaign_id}, which is no chunk boundary of its manifest: it was changed by hand")
        rows = manifest.read_row_group(begins[loaded])
        columns, moves = _ledger_rows(rows, campaign_id), _arrivals(rows)

        def work(connection: Connection, expected: int = loaded, columns: pa.Table = columns, moves: dict[counters.Place, int] = moves) -> int:
            state = connection.execute(sa.select(Campaign.state).where(Campaign.id == campaign_id).with_for_update()).scalar_one()
            if state != CampaignState.BUILDING:
                raise StateError(f"campaign {campaign_id} became {state} while its audience was loaded; the rest is left out")
            present = connection.execute(_row_count(campaign_id)).scalar_one()
            if present == expected:
                bulk.load(connection, _LEDGER, columns, ignore_duplicates=True)
                counters.add(connection, campaign_id, counters.CENTRE, moves, now)
                present += columns.num_rows
            return present

        before, loaded = loaded, transact(engine, work)
        advance(loaded - before)
    with reading(engine) as connection:
        return connection.execute(sa.select(sa.func.count()).select_from(Delivery).where(Delivery.campaign_id == campaign_id)).scalar_one()


def _row_count(campaign_id: int) -> sa.Select[int]:
    return sa.select(sa.cast(sa.func.coalesce(sa.func.sum(CampaignCounter.count), 0), sa.Integer)).where(CampaignCounter.campaign_id == campaign_id)


def _loaded_rows(engine: Engine, campaign_id: int) -> int:
    with reading(engine) as connection:
        return connection.execute(_row_count(campaign_id)).scalar_one()


def _ledger_rows(rows: pa.Table, campaign_id: int) -> pa.Table:
    import pyarrow as pa

    def constant(value: int) -> pa.Array:
        return pa.repeat(pa.scalar(value, pa.int32()), rows.num_rows)

    return pa.table(
        {
            "campaign_id": constant(campaign_id),
            "contact_id": rows["contact_id"],
            "address_hash": rows["address_hash"],
            "shard": rows["shard"],
            "provider": rows["provider"],
            "state": constant(int(State.PENDING)),
            "sort_key": rows["engagement_rank"],
            "attempt": constant(0),
            "variant": constant(0),
        }
    )


def _arrivals(rows: pa.Table) -> dict[counters.Place, int]:
    counted = rows.group_by(["shard", "provider"]).aggregate([([], "count_all")])
    return {(row["shard"], row["provider"], State.PENDING, ""): row["count_all"] for row in counted.to_pylist()}
