"""Who is in a segment: members with their provider and engagement, or only their number, on pinned snapshots.

What does not belong here: whether they may be mailed; the freeze asks the database for that.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mail_pipelines.segments.criteria import AllOf, AnyOf, Criteria, Not
from mail_pipelines.segments.snapshots import Snapshots

if TYPE_CHECKING:
    import pyarrow as pa

    from mail_pipelines.segments.matching import EngagementMarker


@dataclass(frozen=True)
class SegmentCount:
    """How many contacts match, by provider (largest first), and the snapshot versions that say so."""

    members: int
    by_provider: dict[str, int]
    contact_version: int
    engagement_version: int


def members(criteria: Criteria, snapshots: Snapshots, *, now: dt.datetime) -> pa.Table:
    """Everyone who matches, once, in no order: `contact_id` int64, `provider` string, `engagement_rank` int32.

    The rank (`ranks`) goes by the whole days since the last open or click (not by a machine); 9999 if there was none. Lowest is most engaged.
    """
    import pyarrow as pa

    engagement = _engagement(snapshots, now)
    # Beside the scan, which leaves the processors idle while it is begun and its answer is put together.
    with ThreadPoolExecutor(1) as beside:
        engaged = beside.submit(engagement.engaged)
        matched = _match(criteria, snapshots, now, engagement)
        ranks = engagement.ranks(matched["contact_id"].to_numpy(), engaged.result())
    return matched.append_column("engagement_rank", pa.array(ranks))


def in_any(include: Sequence[Criteria], exclude: Sequence[Criteria]) -> Criteria:
    """Whoever matches any of `include` and none of `exclude`."""
    return AllOf((AnyOf(tuple(include)), Not(AnyOf(tuple(exclude)))))


def count(criteria: Criteria, snapshots: Snapshots, *, now: dt.datetime) -> SegmentCount:
    import pyarrow.compute as pc

    matched = _match(criteria, snapshots, now, _engagement(snapshots, now))
    found = {entry["values"]: entry["counts"] for entry in pc.value_counts(matched["provider"]).to_pylist()}
    by_provider = dict(sorted(found.items(), key=lambda entry: (-entry[1], entry[0])))
    return SegmentCount(matched.num_rows, by_provider, snapshots.contact_version, snapshots.engagement_version)


def is_member(criteria: Criteria, snapshots: Snapshots, contact_id: int, *, now: dt.datetime) -> bool:
    """Whether one contact matches; false for one that these snapshots do not have."""
    found: int = _match(criteria, snapshots, now, _engagement(snapshots, now, only=contact_id)).num_rows
    return found > 0


def _engagement(snapshots: Snapshots, now: dt.datetime, only: int | None = None) -> EngagementMarker:
    from mail_pipelines.segments.matching import EngagementMarker

    return EngagementMarker(snapshots.connection, snapshots.engagement_folder, snapshots.engagement, now, only)


def _match(criteria: Criteria, snapshots: Snapshots, now: dt.datetime, engagement: EngagementMarker) -> pa.Table:
    import pyarrow as pa

    from mail_pipelines.segments.matching import ContactMatcher

    matcher = ContactMatcher(engagement.connection, snapshots.contact_folder, snapshots.contacts, criteria, now, engagement)
    schema = pa.schema([("contact_id", pa.int64()), ("provider", pa.string())])
    return pa.concat_tables([schema.empty_table(), *(table.cast(schema) for table in matcher.tables())])
