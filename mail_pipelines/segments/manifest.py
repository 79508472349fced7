"""What a snapshot consists of: frozen descriptions of its files, as kept in `manifest-<version>-….json`.

What does not belong here: writing files (`parts`), switching versions (`store`). Imports nothing heavy, so that any part may name a version.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterator
from dataclasses import dataclass

from mail_pipelines.segments.catalogue import CustomField, KnownCampaign, KnownList


@dataclass(frozen=True)
class Part:
    """One immutable Parquet file, sorted by contact id within what it covers. `first_id` and `last_id` bound its contact ids."""

    name: str
    rows: int
    columns: tuple[str, ...]
    first_id: int
    last_id: int
    size: int


# One generation of a sorted table: parts whose ranges of contact ids do not overlap, in ascending order.
Layer = tuple[Part, ...]


def rows_of(layer: Layer) -> int:
    return sum(part.rows for part in layer)


@dataclass(frozen=True)
class FeedPosition:
    """How far a feed was read: everything visible at `read_at`, of which `last` is the highest number.

    `seen` names a file with the numbers read inside the overlap, so that the next reading takes only what was committed late; None: none were.
    """

    read_at: dt.datetime
    last: int
    seen: str | None


@dataclass(frozen=True)
class ContactManifest:
    """`base` and then `deltas`, oldest first: the newest row of a contact counts, and hides it if `deleted`."""

    version: int
    made_at: dt.datetime
    position: FeedPosition
    fields: tuple[CustomField, ...]
    lists: tuple[KnownList, ...]
    rows: int
    base: Layer
    deltas: tuple[Layer, ...] = ()
    # When the oldest tombstone still in `deltas` was written: its contact is hidden at once, but older files still hold its row.
    oldest_tombstone_at: dt.datetime | None = None

    def layers(self) -> tuple[Layer, ...]:
        """Newest last."""
        return (self.base, *self.deltas)

    def parts(self) -> Iterator[Part]:
        for layer in self.layers():
            yield from layer

    def files(self) -> Iterator[str]:
        if self.position.seen is not None:
            yield self.position.seen
        yield from (part.name for part in self.parts())


@dataclass(frozen=True)
class Received:
    """Who received a campaign: `delivered` is the campaign's counter when the ledger was read."""

    campaign_id: int
    delivered: int
    layer: Layer


@dataclass(frozen=True)
class Month:
    """Events of one month (YYYYMM in UTC) by the time they occurred; each part is sorted by campaign, kind, contact.

    `is_thin`: each part has of events that differ by their time alone only the last.
    """

    month: int
    parts: tuple[Part, ...]
    is_thin: bool = False


@dataclass(frozen=True)
class EngagementManifest:
    """Events by month, receivers by campaign, and roll-ups of the events by contact: layers whose rows add up."""

    version: int
    made_at: dt.datetime
    position: FeedPosition
    campaigns: tuple[KnownCampaign, ...]
    rows: int
    months: tuple[Month, ...] = ()
    received: tuple[Received, ...] = ()
    rollups: tuple[Layer, ...] = ()

    def parts(self) -> Iterator[Part]:
        for month in self.months:
            yield from month.parts
        for received in self.received:
            yield from received.layer
        for layer in self.rollups:
            yield from layer

    def files(self) -> Iterator[str]:
        if self.position.seen is not None:
            yield self.position.seen
        yield from (part.name for part in self.parts())


@dataclass(frozen=True)
class SnapshotInfo:
    """What a refresh did. `rows` are live contacts or events; `unusable` values did not fit the type of their field and read as absent."""

    kind: str
    version: int
    made_at: dt.datetime
    rows: int
    changed: int
    deleted: int
    unusable: int
    rewritten: bool
    files: int
    size: int
