"""Partition definitions and the rules of their keys.

A campaign adds one dynamic key; its shards are 64 static ones, so lineage from batches to a campaign is exact and a
campaign's batches are a range for the command line (`spring|00` to `spring|63`). Keys are made by `keys.check_key`:
`[a-z0-9-]`, at most 64 characters, since Dagster's MySQL storage compares no more of them, without letter case.
"""

from __future__ import annotations

import warnings

import dagster as dg

SHARDS = 64

campaigns = dg.DynamicPartitionsDefinition(name="campaigns")
segments = dg.DynamicPartitionsDefinition(name="segments")
servers = dg.DynamicPartitionsDefinition(name="servers")
shards = dg.StaticPartitionsDefinition([f"{number:02d}" for number in range(SHARDS)])
campaign_shards = dg.MultiPartitionsDefinition({"campaign": campaigns, "shard": shards})

# From (campaign, shard) to campaign: every shard of a campaign belongs to that campaign, and to no other. Always a named mapping of Dagster's own: one of ours
# would be dropped on the way to daemon and web server, and a backfill of one campaign could take the shards of all.
with warnings.catch_warnings():
    # The mapping is the inferred default for these definitions, and used for years; only naming it warns.
    warnings.simplefilter("ignore", dg.BetaWarning)
    by_campaign = dg.MultiToSingleDimensionPartitionMapping(partition_dimension_name="campaign")


def batch_key(campaign: str, shard: int) -> dg.MultiPartitionKey:
    """The partition key of one shard of a campaign."""
    return dg.MultiPartitionKey({"campaign": campaign, "shard": f"{shard:02d}"})


def split_batch_key(key: str) -> tuple[str, int]:
    """Campaign and shard of a partition key `campaign|shard`."""
    campaign, _, shard = key.partition("|")
    return campaign, int(shard)
