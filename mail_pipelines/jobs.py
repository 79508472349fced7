"""Asset jobs: what operators start, sensors request and `dagster job backfill` fills."""

from __future__ import annotations

import dagster as dg

from mail_pipelines import partitions
from mail_pipelines.resources import run_tags

build_audience = dg.define_asset_job(
    "build_audience",
    selection=dg.AssetSelection.assets("contact_snapshot", "engagement_snapshot", "campaign_audiences"),
    partitions_def=partitions.campaigns,
    config=run_tags.from_partition(partitions.campaigns, run_tags.campaign),
    description="Refresh the snapshots and freeze the audience of one campaign that is due.",
)

send_campaign = dg.define_asset_job(
    "send_campaign",
    selection=dg.AssetSelection.assets("send_batches"),
    partitions_def=partitions.campaign_shards,
    config=run_tags.from_partition(partitions.campaign_shards, run_tags.campaign),
    # Only the ledger decides what is open: a failed run is never repeated by Dagster, the sensor asks for a new one, without a run key: that would be for ever.
    tags={"dagster/max_retries": "0"},
    description="Send shards of a campaign; the target of `dagster job backfill`.",
)

report_campaign = dg.define_asset_job(
    "report_campaign",
    selection=dg.AssetSelection.assets("delivery_results", "campaign_statistics"),
    partitions_def=partitions.campaigns,
    config=run_tags.from_partition(partitions.campaigns, run_tags.campaign),
    description="Totals, checks and statistics of one campaign.",
)

audit_delivery_logs = dg.define_asset_job(
    "audit_delivery_logs",
    selection=dg.AssetSelection.assets("delivery_logs"),
    partitions_def=partitions.servers,
    config=run_tags.from_partition(partitions.servers, run_tags.server),
    description="Hold the new lines of one dispatch server's log against the ledger, on that server.",
)

refresh_snapshots_job = dg.define_asset_job(
    "refresh_snapshots",
    selection=dg.AssetSelection.assets("contact_snapshot", "engagement_snapshot"),
    description="Bring the snapshots of contacts and engagement up to date.",
)

plan_capacity = dg.define_asset_job(
    "plan_capacity",
    selection=dg.AssetSelection.assets("capacity_plan"),
    description="Plan what each server sends in the next 48 hours, and put it into force.",
)

SYNC_EXTERNAL = "sync_external"


def sync_external() -> dg.UnresolvedAssetJobDefinition:
    """The job of all declared sources and of what providers tell of us, which exists only if there is one."""
    return dg.define_asset_job(
        SYNC_EXTERNAL,
        selection=dg.AssetSelection.groups("synced"),
        description="Bring the declared external sources and what providers tell of us up to date; one that fails keeps none of the others.",
    )


ALL = [build_audience, send_campaign, report_campaign, audit_delivery_logs, refresh_snapshots_job, plan_capacity]
