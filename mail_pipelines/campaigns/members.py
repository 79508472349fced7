"""Whom a campaign's segments match, on pinned snapshots. Whether they may be mailed is for the database to say (`exclusion`)."""

from __future__ import annotations

import datetime as dt
from typing import TYPE_CHECKING

from sqlalchemy.engine import Engine

from mail_pipelines.campaigns.campaign import CampaignError, Definition
from mail_pipelines.config import Settings
from mail_pipelines.segments import saved
from mail_pipelines.segments.criteria import Criteria, CriteriaError, parse
from mail_pipelines.segments.snapshots import open_snapshots

if TYPE_CHECKING:
    import pyarrow as pa


def matched(engine: Engine, settings: Settings, definition: Definition, now: dt.datetime) -> tuple[pa.Table, dict[str, int]]:
    """Everyone in one of the included segments and in none of the excluded, once, in the order of contact_id (int64), with
    engagement_rank (int32); and the snapshot versions that say so.

    Raises `SegmentError`, `SnapshotError`, or `CampaignError` for criteria that these snapshots cannot answer.
    """
    from mail_pipelines.segments.evaluation import members_of

    trees = {key: saved.load(engine, key).criteria for key in (*definition.include, *definition.exclude)}
    with open_snapshots(engine, settings.snapshot_folder) as snapshots:

        def criteria(key: str) -> Criteria:
            try:
                return parse(trees[key], snapshots.catalogue)
            except CriteriaError as error:
                made = snapshots.contacts.made_at.isoformat(timespec="seconds")
                raise CampaignError(f"segment {key} on the snapshot of {made}: {error}; `mail-pipelines segment refresh` may help") from error

        found = members_of([criteria(key) for key in definition.include], [criteria(key) for key in definition.exclude], snapshots, now=now)
        versions = {"contacts": snapshots.contact_version, "engagement": snapshots.engagement_version}
    return found.select(["contact_id", "engagement_rank"]).sort_by("contact_id").combine_chunks(), versions
