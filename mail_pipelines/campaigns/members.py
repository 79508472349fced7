"""Whom a campaign's segments match, on pinned snapshots. Whether they may be mailed is for the database to say (`exclusion`)."""

from __future__ import annotations

import contextlib
import datetime as dt
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from sqlalchemy.engine import Engine

from mail_pipelines.campaigns.campaign import CampaignError, Definition
from mail_pipelines.config import Settings
from mail_pipelines.segments import evaluation, saved
from mail_pipelines.segments.criteria import Criteria, CriteriaError, parse
from mail_pipelines.segments.snapshots import Snapshots, open_snapshots

if TYPE_CHECKING:
    import pyarrow as pa


def matched(engine: Engine, settings: Settings, definition: Definition, now: dt.datetime) -> tuple[pa.Table, dict[str, int]]:
    """Everyone in one of the included segments and in none of the excluded, once, in the order of contact_id (int64), with
    engagement_rank (int32); and the snapshot versions that say so.

    Raises `SegmentError`, `SnapshotError`, or `CampaignError` for criteria that these snapshots cannot answer.
    """
    with _opened(engine, settings, definition.include, definition.exclude) as (criteria, snapshots):
        found = evaluation.members(criteria, snapshots, now=now)
        versions = {"contacts": snapshots.contact_version, "engagement": snapshots.engagement_version}
    return found.select(["contact_id", "engagement_rank"]).sort_by("contact_id").combine_chunks(), versions


def count(engine: Engine, settings: Settings, include: Sequence[str], exclude: Sequence[str], now: dt.datetime) -> dict[str, int]:
    """How many are in one of the segments `include` and in none of `exclude`, by provider. Raises as `matched` does."""
    with _opened(engine, settings, include, exclude) as (criteria, snapshots):
        return evaluation.count(criteria, snapshots, now=now).by_provider


@contextlib.contextmanager
def _opened(engine: Engine, settings: Settings, include: Sequence[str], exclude: Sequence[str]) -> Iterator[tuple[Criteria, Snapshots]]:
    """The criteria by which somebody is in one of `include` and in none of `exclude`, on pinned snapshots."""
    trees = {key: saved.load(engine, key).criteria for key in (*include, *exclude)}
    with open_snapshots(engine, settings.snapshot_folder) as snapshots:
        parsed = {key: _parsed(key, tree, snapshots) for key, tree in trees.items()}
        yield evaluation.in_any([parsed[key] for key in include], [parsed[key] for key in exclude]), snapshots


def _parsed(key: str, tree: Any, snapshots: Snapshots) -> Criteria:
    try:
        return parse(tree, snapshots.catalogue)
    except CriteriaError as error:
        made = snapshots.contacts.made_at.isoformat(timespec="seconds")
        raise CampaignError(f"segment {key} on the snapshot of {made}: {error}; `mail-pipelines segment refresh` may help") from error
