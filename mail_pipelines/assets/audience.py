"""Audience: snapshots of contacts and engagement, members of saved segments, the frozen audience of a campaign."""

import datetime as dt
import functools
from collections.abc import Callable

import dagster as dg

from mail_pipelines import partitions
from mail_pipelines.campaigns import audience
from mail_pipelines.delivery import retention
from mail_pipelines.delivery.ledger_archive import LedgerArchive
from mail_pipelines.resources.database import CentralDatabase
from mail_pipelines.segments import criteria, evaluation, saved, snapshots
from mail_pipelines.segments.manifest import SnapshotInfo

GROUP = "audience"
OWNERS = ["team:audience"]


def _refreshed(refresh: Callable[..., SnapshotInfo], database: CentralDatabase) -> dg.MaterializeResult:
    settings, engine = database.settings, database.engine
    given = {"min_free_mb": settings.snapshots.min_free_mb}
    info = snapshots.in_turn(lambda: refresh(engine, settings.snapshot_folder, now=dt.datetime.now(dt.UTC), **given))
    return dg.MaterializeResult(
        data_version=dg.DataVersion(str(info.version)),
        metadata={
            "dagster/row_count": info.rows,
            "version": info.version,
            "changed": info.changed,
            "deleted": info.deleted,
            "unusable_values": info.unusable,
            "rewritten": info.rewritten,
            "files": info.files,
            "size_mb": round(info.size / 1e6, 2),
        },
    )


@dg.asset(group_name=GROUP, owners=OWNERS, kinds={"parquet", "table"}, pool="snapshots")
def contact_snapshot(database: CentralDatabase) -> dg.MaterializeResult:
    """Columnar copy of all contacts for segmenting, brought up to date from the change feed. Consent is never decided by it."""
    return _refreshed(snapshots.refresh_contacts, database)


@dg.asset(group_name=GROUP, owners=OWNERS, kinds={"parquet", "table"}, pool="snapshots")
def engagement_snapshot(database: CentralDatabase) -> dg.MaterializeResult:
    """Columnar copy of opens, clicks and who received what, with a roll-up for each contact."""
    settings = database.settings
    kept_from = retention.first_kept(dt.datetime.now(dt.UTC).date(), settings.retention.engagement_months)
    refresh = functools.partial(snapshots.refresh_engagement, archive=LedgerArchive(settings.campaigns.archive), singles_from=kept_from)
    return _refreshed(refresh, database)


@dg.asset(
    partitions_def=partitions.segments,
    deps=[contact_snapshot, engagement_snapshot],
    group_name=GROUP,
    owners=OWNERS,
    kinds={"duckdb"},
)
def recipient_segments(context: dg.AssetExecutionContext, database: CentralDatabase) -> dg.MaterializeResult:
    """How many contacts a saved segment matches now, and at which mailbox providers."""
    tree = saved.load(database.engine, context.partition_key).criteria
    with snapshots.open_snapshots(database.engine, database.settings.snapshot_folder) as pinned:
        found = evaluation.count(criteria.parse(tree, pinned.catalogue), pinned, now=dt.datetime.now(dt.UTC))
    return dg.MaterializeResult(
        metadata={
            "dagster/partition_row_count": found.members,
            "contact_snapshot_version": found.contact_version,
            "engagement_snapshot_version": found.engagement_version,
            "providers": dg.MetadataValue.md(_table(("provider", "contacts"), found.by_provider.items())),
        }
    )


@dg.asset(
    partitions_def=partitions.campaigns,
    deps=[contact_snapshot, engagement_snapshot],
    group_name=GROUP,
    owners=OWNERS,
    kinds={"parquet", "sql"},
)
def campaign_audiences(context: dg.AssetExecutionContext, database: CentralDatabase) -> dg.MaterializeResult:
    """The audience of a campaign, frozen once: a manifest file and one ledger row for each address. Building again changes nothing."""
    last = {"step": ""}

    def progress(step: str, _done: int, _total: int) -> None:
        if step != last["step"]:
            context.log.info("%s", step)
            last["step"] = step

    built = audience.build(database.engine, database.settings, context.partition_key, dt.datetime.now(dt.UTC), progress)
    if built.reason:
        context.log.info("nothing written: %s", built.reason)
    manifest = built.campaign.audience_manifest or {}
    return dg.MaterializeResult(
        metadata={
            "dagster/partition_row_count": built.audience,
            "matched": built.matched,
            "audience": built.audience,
            "excluded": sum(built.excluded.values()),
            "excluded_by_reason": dg.MetadataValue.md(_table(("reason", "contacts"), built.excluded.items())),
            "shards": built.campaign.shards or 0,
            "manifest_sha256": manifest.get("sha256", ""),
            "snapshot_versions": manifest.get("snapshots", {}),
            "written": built.built,
            "state": built.campaign.state.value,
            **({"reason": built.reason} if built.reason else {}),
        }
    )


def _table(head: tuple[str, str], rows: object) -> str:
    """A small Markdown table of two columns."""
    lines = [f"| {head[0]} | {head[1]} |", "|---|---:|"]
    lines += [f"| {name} | {number:,} |" for name, number in rows]  # type: ignore[attr-defined]
    return "\n".join(lines)
