"""The engagement snapshot: opens and clicks by month, roll-ups of them by contact, receivers by campaign.

* events (`Month`): contact_id, campaign_id, kind (open, click), link_id, occurred_at, machine; sorted by campaign, kind, contact, so that
  criteria about campaigns read only the row groups of these campaigns. Of months past retention only the last of each contact, campaign, kind and link is
  kept: criteria look back from now, so of those that happened the last decides.
* roll-ups: contact_id, opens, clicks, last_open_at, last_click_at, engaged (epoch second of the last of both); machines do not count.
  Layers add up: counts by sum, times by maximum.
* receivers (`Received`): contact_id, received_at, by the ledger or its archive.

Times are naive UTC. What does not belong here: delivery results, which the counters have. Imports pyarrow: import this inside functions.
"""

from __future__ import annotations

import datetime as dt
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine

from mail_pipelines.database.engine import reading
from mail_pipelines.database.models import Campaign, CampaignCounter, Delivery, EngagementEvent, EngagementSum, State
from mail_pipelines.delivery.ledger_archive import LedgerArchive, LedgerArchiveError
from mail_pipelines.segments import parts
from mail_pipelines.segments.catalogue import read_campaigns
from mail_pipelines.segments.feed import CHUNK_ROWS, Feed, Reading
from mail_pipelines.segments.manifest import EngagementManifest, FeedPosition, Layer, Month, Part, Received, SnapshotInfo
from mail_pipelines.segments.snapshots import Progress
from mail_pipelines.segments.store import Writer, engagement_store

# Events held in memory before they are written, and most that one part of a month may have.
FLUSH_ROWS = 1_000_000
MONTH_PART_ROWS = 4_000_000
EVENT_ORDER = [("campaign_id", "ascending"), ("kind", "ascending"), ("contact_id", "ascending")]

EVENTS = Feed(
    number=EngagementEvent.id,
    time=EngagementEvent.recorded_at,
    columns=(
        EngagementEvent.contact_id,
        EngagementEvent.campaign_id,
        EngagementEvent.kind,
        EngagementEvent.link_id,
        EngagementEvent.occurred_at,
        EngagementEvent.machine,
    ),
    where=(EngagementEvent.kind.in_(["open", "click"]),),
)
EVENT_SCHEMA = pa.schema(
    [
        ("contact_id", pa.int64()),
        ("campaign_id", pa.int32()),
        ("kind", pa.string()),
        ("link_id", pa.int64()),
        ("occurred_at", pa.timestamp("us")),
        ("machine", pa.bool_()),
    ]
)
# As they are read: a sum stands for several.
COUNTED_SCHEMA = EVENT_SCHEMA.append(pa.field("count", pa.int32()))
# Of these only the last counts, where single events are past retention.
THINNED_BY = ["campaign_id", "kind", "contact_id", "link_id", "machine"]
ROLLUP_SCHEMA = pa.schema(
    [
        ("contact_id", pa.int64()),
        ("opens", pa.int32()),
        ("clicks", pa.int32()),
        ("last_open_at", pa.timestamp("us")),
        ("last_click_at", pa.timestamp("us")),
        ("engaged", pa.uint32()),
    ]
)
RECEIVED_SCHEMA = pa.schema([("contact_id", pa.int64()), ("received_at", pa.timestamp("us"))])


def refresh(
    engine: Engine, folder: Any, *, now: dt.datetime, min_free_mb: int, progress: Progress, archive: LedgerArchive, singles_from: int = 0
) -> SnapshotInfo:
    """See `snapshots.refresh_engagement`."""
    with engagement_store(engine, folder).writing(now, min_free_mb) as writer:
        with reading(engine) as connection:
            campaigns = read_campaigns(connection)
        old = writer.current or EngagementManifest(0, now, FeedPosition(now, 0, None), campaigns, 0)
        events = EventWriter(writer, old.months, old.rollups)
        position = _read_events(engine, writer, events, progress)
        events.thin(singles_from)
        manifest = EngagementManifest(
            writer.version,
            now,
            position,
            campaigns,
            old.rows + events.rows,
            events.months(),
            _receivers(engine, writer, old.received, progress, archive),
            events.rollups,
        )
        writer.publish(manifest)
        files = list(manifest.parts())
        return SnapshotInfo(
            "engagement", manifest.version, now, manifest.rows, events.rows, 0, 0, writer.current is None, len(files), sum(part.size for part in files)
        )


# --- events -----------------------------------------------------------------------------------------------------


def _read_events(engine: Engine, writer: Writer[EngagementManifest], events: EventWriter, progress: Progress) -> FeedPosition:
    waiting: list[pa.Table] = []
    rows = 0
    # What is made anew needs the sums of older events too, as they were when the events were read: some may be moved there meanwhile.
    anew = writer.current is None
    with reading(engine, of_one_moment=anew) as connection:
        feed = Reading(EVENTS, connection, writer.path, writer.current.position if writer.current else None, writer.now)
        for chunk in itertools.chain(feed, _sums(connection) if anew else ()):
            if chunk:
                waiting.append(_event_table([row[2:] for row in chunk]))
                rows += len(chunk)
                progress("events", events.rows + rows, None)
            if rows >= FLUSH_ROWS:
                events.add(pa.concat_tables(waiting))
                waiting, rows = [], 0
    if waiting:
        events.add(pa.concat_tables(waiting))
    return feed.position(writer.new_name("seen"))


def _sums(connection: Connection) -> Iterator[Sequence[Any]]:
    """Sums as chunks of events, each at its last time, with how many it stands for."""
    kept = EngagementSum
    link = sa.func.nullif(kept.link_id, 0)
    statement = sa.select(sa.null(), sa.null(), kept.contact_id, kept.campaign_id, kept.kind, link, kept.last_at, kept.machine, kept.count)
    statement = statement.where(kept.kind.in_(["open", "click"]))
    yield from connection.execution_options(stream_results=True, yield_per=CHUNK_ROWS).execute(statement).partitions()


def _event_table(rows: Sequence[Any]) -> pa.Table:
    """Rows of the columns of `EVENTS`, with how many each stands for behind them if it is not one."""
    contact_ids, campaign_ids, kinds, link_ids, times, machine, *counts = zip(*rows, strict=True)
    naive = [time.replace(tzinfo=None) for time in times]
    columns = [contact_ids, campaign_ids, kinds, link_ids, naive, machine, *(counts or [(1,) * len(rows)])]
    return pa.table([pa.array(column, field.type) for column, field in zip(columns, COUNTED_SCHEMA, strict=True)], schema=COUNTED_SCHEMA)


class EventWriter:
    """Adds events to the months they occurred in and to the roll-ups, keeping files few."""

    def __init__(self, writer: Writer[EngagementManifest], months: Sequence[Month], rollups: Sequence[Layer]) -> None:
        self._writer = writer
        self._months: dict[int, list[Part]] = {month.month: list(month.parts) for month in months}
        # Months of which nothing but last events is left.
        self._thin = {month.month for month in months if month.is_thin}
        self.rollups: tuple[Layer, ...] = tuple(rollups)
        self.rows = 0

    def months(self) -> tuple[Month, ...]:
        return tuple(Month(month, tuple(kept), month in self._thin) for month, kept in sorted(self._months.items()))

    def add(self, counted: pa.Table) -> None:
        """Add events, of `COUNTED_SCHEMA`."""
        self.rows += pc.sum(counted["count"]).as_py()
        events = counted.select(EVENT_SCHEMA.names)
        months = pc.add(pc.multiply(pc.year(events["occurred_at"]), 100), pc.month(events["occurred_at"]))
        for month in sorted(pc.unique(months).to_pylist()):
            self._add_month(month, events.filter(pc.equal(months, month)))
        rolled = roll_up(counted)
        if rolled.num_rows:
            layer = parts.LayerWriter(self._writer.path, self._writer.new_name, "rollup")
            layer.add(rolled)
            self._add_rollup(layer.layer())

    def _add_month(self, month: int, events: pa.Table) -> None:
        """Append a part; merge it with the parts before it while they are not several times larger (or the result too large to sort in memory)."""
        self._thin.discard(month)
        kept = self._months.setdefault(month, [])
        tables = [events]
        rows = events.num_rows
        while kept and kept[-1].rows < parts.LAYER_GROWTH * rows and kept[-1].rows + rows <= MONTH_PART_ROWS:
            part = kept.pop()
            tables.append(parts.conform(pq.read_table(self._writer.path / part.name), EVENT_SCHEMA))
            rows += part.rows
        merged = pa.concat_tables(tables).sort_by(EVENT_ORDER)
        kept.append(parts.write_part(self._writer.path, self._writer.new_name(f"events-{month}"), merged))

    def thin(self, singles_from: int) -> None:
        """Of the months before `singles_from` keep the last events. Part by part, so the last of each part: more would need a month in memory."""
        for month in sorted(self._months.keys() - self._thin):
            if month < singles_from:
                self._months[month] = [self._thinned(month, part) for part in self._months[month]]
                self._thin.add(month)

    def _thinned(self, month: int, part: Part) -> Part:
        events = parts.conform(pq.read_table(self._writer.path / part.name), EVENT_SCHEMA)
        last = events.group_by(THINNED_BY).aggregate([("occurred_at", "max")])
        if last.num_rows == events.num_rows:
            return part
        last = parts.conform(last.rename_columns([name.removesuffix("_max") for name in last.column_names]), EVENT_SCHEMA)
        return parts.write_part(self._writer.path, self._writer.new_name(f"events-{month}"), last.sort_by(EVENT_ORDER))

    def _add_rollup(self, layer: Layer) -> None:
        self.rollups = (*self.rollups, layer)
        count = parts.merged_tail(self.rollups)
        if count > 1:
            oldest, *rest = self.rollups[-count:]
            merged = parts.LayerWriter(self._writer.path, self._writer.new_name, "rollup")
            parts.fold(merged, self._writer.path, ROLLUP_SCHEMA, oldest, rest, add_up)
            self.rollups = (*self.rollups[:-count], merged.layer())


def roll_up(counted: pa.Table) -> pa.Table:
    """One row for each contact with an open or click that no machine made, in ascending order."""
    human = counted.filter(pc.invert(counted["machine"]))
    opened = pc.equal(human["kind"], "open")
    never = pa.scalar(None, pa.timestamp("us"))
    none = pa.scalar(0, pa.int32())
    time = human["occurred_at"]
    columns = [
        human["contact_id"],
        pc.if_else(opened, human["count"], none),
        pc.if_else(opened, none, human["count"]),
        pc.if_else(opened, time, never),
        pc.if_else(opened, never, time),
        pc.cast(pc.divide(pc.cast(time, pa.int64()), 1_000_000), pa.uint32()),
    ]
    return add_up([pa.table(columns, schema=ROLLUP_SCHEMA)])


def add_up(tables: Sequence[pa.Table]) -> pa.Table:
    """A `parts.Combine`: counts are added, of times the last one counts."""
    grouped = pa.concat_tables(tables).group_by("contact_id")
    sums = [(name, "sum") for name in ("opens", "clicks")]
    latest = [(name, "max") for name in ("last_open_at", "last_click_at", "engaged")]
    added = grouped.aggregate([*sums, *latest])
    renamed = added.rename_columns([name.removesuffix("_sum").removesuffix("_max") for name in added.column_names])
    return parts.conform(renamed, ROLLUP_SCHEMA).sort_by("contact_id")


# --- receivers --------------------------------------------------------------------------------------------------


def _receivers(
    engine: Engine, writer: Writer[EngagementManifest], known: Sequence[Received], progress: Progress, archive: LedgerArchive
) -> tuple[Received, ...]:
    """The counters first: receivers read after them are at least as many, and a counter that moved meanwhile is met by the next refresh."""
    with reading(engine) as connection:
        delivered: dict[int, int] = dict(
            connection.execute(
                sa.select(CampaignCounter.campaign_id, sa.func.sum(CampaignCounter.count).cast(sa.BigInteger))
                .where(CampaignCounter.state == State.DELIVERED)
                .group_by(CampaignCounter.campaign_id)
            )
            .tuples()
            .all()
        )
    before = {received.campaign_id: received for received in known}
    stale = [campaign_id for campaign_id, count in delivered.items() if campaign_id not in before or before[campaign_id].delivered != count]
    for number, campaign_id in enumerate(stale, 1):
        try:
            before[campaign_id] = Received(campaign_id, delivered[campaign_id], _read_receivers(engine, writer, campaign_id, archive))
        except LedgerArchiveError:
            # Who received an archived campaign hardly changes: what is known will do until the archive is back.
            if campaign_id not in before:
                raise
        progress("receivers of campaigns", number, len(stale))
    return tuple(before[campaign_id] for campaign_id in sorted(before))


def _read_receivers(engine: Engine, writer: Writer[EngagementManifest], campaign_id: int, archive: LedgerArchive) -> Layer:
    """From the ledger, unless rows may have been deleted from it before it was read to its end: then all are in the archive."""
    layer = _from_ledger(engine, writer, campaign_id)
    with reading(engine) as connection:
        manifest = connection.execute(sa.select(Campaign.archive).where(Campaign.id == campaign_id)).scalar_one_or_none()
    if manifest is None:
        return layer
    archived = parts.LayerWriter(writer.path, writer.new_name, "received")
    for rows in archive.delivered(campaign_id, manifest):
        archived.add(_received(rows["contact_id"].combine_chunks(), rows["sort_key"].to_numpy()))
    return archived.layer()


def _from_ledger(engine: Engine, writer: Writer[EngagementManifest], campaign_id: int) -> Layer:
    layer = parts.LayerWriter(writer.path, writer.new_name, "received")
    statement = (
        sa.select(Delivery.contact_id, Delivery.sort_key)
        .where(Delivery.campaign_id == campaign_id, Delivery.state == State.DELIVERED)
        .order_by(Delivery.contact_id)
    )
    with reading(engine) as connection:
        for chunk in connection.execution_options(stream_results=True, yield_per=CHUNK_ROWS).execute(statement).partitions():
            values = np.array([tuple(row) for row in chunk], np.int64)
            layer.add(_received(pa.array(values[:, 0]), values[:, 1]))
    return layer.layer()


def _received(contact_ids: pa.Array, seconds: np.ndarray[Any, Any]) -> pa.Table:
    return pa.table([contact_ids, pa.array(seconds * 1_000_000).cast(pa.timestamp("us"))], schema=RECEIVED_SCHEMA)
