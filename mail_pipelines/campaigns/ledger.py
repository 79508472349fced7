"""Loading the ledger of a campaign from its manifest: in chunks, each with its counters in one transaction, resumable after any kill.

Rows of recipients whose send window is closed are deferred until it opens; all others are pending.
"""

from __future__ import annotations

import datetime as dt
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine

from mail_pipelines.campaigns.overlap import overlapped
from mail_pipelines.campaigns.states import CampaignState, StateError
from mail_pipelines.contacts.sets import insert_if_absent
from mail_pipelines.database import bulk
from mail_pipelines.database.engine import reading, transact
from mail_pipelines.database.models import Campaign, Delivery, State
from mail_pipelines.delivery import counters
from mail_pipelines.dispatch import windows

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet

_LEDGER = Delivery.metadata.tables[Delivery.__tablename__]


def load(
    engine: Engine,
    campaign_id: int,
    manifest: pyarrow.parquet.ParquetFile,
    now: dt.datetime,
    advance: Callable[[int], None],
    spans: windows.Windows | None = None,
) -> int:
    """Load what is not loaded yet, as rows that wait for their turn, or for their window to open; returns the number of rows in the ledger, counted.

    A row group of the manifest is one transaction, so it is loaded if its first row is there. Raises `StateError` if the campaign is
    no longer building.
    """
    # The file of an empty audience has one empty row group.
    chunks = (manifest.read_row_group(number) for number in range(manifest.num_row_groups) if manifest.metadata.row_group(number).num_rows)
    for rows in overlapped(engine, lambda chunk: _load_chunk(engine, campaign_id, chunk, now, spans), chunks):
        advance(rows)
    with reading(engine) as connection:
        query = sa.select(sa.func.count()).select_from(Delivery).where(Delivery.campaign_id == campaign_id)
        count: int = connection.execute(query).scalar_one()
    return count


def _load_chunk(engine: Engine, campaign_id: int, chunk: pa.Table, now: dt.datetime, spans: windows.Windows | None) -> int:
    columns, waiting = _ledger_rows(chunk, campaign_id), Counter[windows.Place]()
    if spans is not None:
        columns, waiting = _put_off(columns, chunk["time_zone"].to_pylist(), spans, int(now.timestamp()))
    moves = _arrivals(columns)

    def work(connection: Connection) -> None:
        # Cancel and a second freeze's last step change this row, and so wait for the chunks that have begun.
        state = connection.execute(sa.select(Campaign.state).where(Campaign.id == campaign_id).with_for_update(read=True)).scalar_one()
        if state != CampaignState.BUILDING:
            raise StateError(f"campaign {campaign_id} became {state} while its audience was loaded; the rest is left out")
        # The first row goes alone: it is the mark of the chunk, and the lock at which a second freeze waits.
        if connection.execute(insert_if_absent(Delivery), columns.slice(0, 1).to_pylist()).rowcount == 1:
            bulk.load(connection, _LEDGER, columns.slice(1), ignore_duplicates=True)
            counters.add(connection, campaign_id, counters.CENTRE, moves, now)
            windows.count(connection, campaign_id, waiting)

    transact(engine, work)
    rows: int = chunk.num_rows
    return rows


def _ledger_rows(rows: pa.Table, campaign_id: int) -> pa.Table:
    import pyarrow as pa

    from mail_pipelines.segments.ranks import places

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
            "sort_key": places(rows["engagement_rank"].to_numpy(), rows["contact_id"].to_numpy()),
            "attempt": constant(0),
            "variant": constant(0),
        }
    )


def _put_off(rows: pa.Table, names: Sequence[str | None], spans: windows.Windows, second: int) -> tuple[pa.Table, Counter[windows.Place]]:
    """The rows with those deferred whose window is closed, and how many there are for which opening: of open windows the present one."""
    import pyarrow as pa

    zones = {name: spans.zone(name) for name in set(names)}
    openings = {zone: spans.next_opening(zone, second, second) for zone in zones.values()}
    waiting: Counter[windows.Place] = Counter()
    states, keys, reasons = [], [], []
    for name, provider, key in zip(names, rows["provider"].to_pylist(), rows["sort_key"].to_pylist(), strict=True):
        zone = zones[name]
        opening = openings[zone]
        waiting[provider, zone, spans.opened(zone, second) if opening is None else opening] += 1
        states.append(int(State.PENDING if opening is None else State.DEFERRED))
        keys.append(key if opening is None else spans.due(zone, opening, State.PENDING, key, None))
        reasons.append(None if opening is None else spans.reason(zone, opening))
    for name, values in (("state", pa.array(states, pa.int32())), ("sort_key", pa.array(keys, pa.int32()))):
        rows = rows.set_column(rows.column_names.index(name), name, values)
    return rows.append_column("reason", pa.array(reasons, pa.string())), waiting


def _arrivals(rows: pa.Table) -> dict[counters.Place, int]:
    counted = rows.group_by(["shard", "provider", "state"]).aggregate([([], "count_all")])
    return {(row["shard"], row["provider"], State(row["state"]), ""): row["count_all"] for row in counted.to_pylist()}
