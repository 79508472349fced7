"""Tags by which an operator finds runs on Dagster's page of them.

| tag | on runs |
|---|---|
| `mail_pipelines/campaign` | of one campaign: its audience, its sending, its report |
| `mail_pipelines/server` | of one dispatch server: sending, audits, making and removing it |
| `mail_pipelines/attempt` | that send: how many-th of this campaign on this server it is |
| `mail_pipelines/making` | that make or remove a server: the run queue limits how many at once |

But for the last they decide nothing: where a run goes is said by its queue (`queues`), and what is open by the ledger. What follows from a partition the
job itself says (`jobs`), however its run is started; the rest is said by whoever asks for the run or launches it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import dagster as dg

from mail_pipelines.partitions import split_batch_key
from mail_pipelines.resources import queues

CAMPAIGN = "mail_pipelines/campaign"
SERVER = "mail_pipelines/server"
ATTEMPT = "mail_pipelines/attempt"
MAKING = "mail_pipelines/making"
# Assets of which each partition is a campaign. A materialisation from the UI is a run of no job of ours that could say so.
CAMPAIGN_ASSETS = frozenset(dg.AssetKey(name) for name in ("campaign_audiences", "delivery_results", "campaign_statistics"))


def campaign(key: str) -> dict[str, str]:
    """The tag of a partition key, of a campaign (`spring`) or of one of its shards (`spring|07`)."""
    return {CAMPAIGN: split_batch_key(key)[0]} if "|" in key else {CAMPAIGN: key}


def server(key: str) -> dict[str, str]:
    return {SERVER: key}


def from_partition(definition: dg.PartitionsDefinition, tags: Callable[[str], Mapping[str, str]]) -> dg.PartitionedConfig[Any]:
    """For a job: the tags of each of its partitions, and no configuration."""
    return dg.PartitionedConfig(definition, run_config_for_partition_key_fn=lambda _key: {}, tags_for_partition_key_fn=tags)


def of_sending(instance: dg.DagsterInstance, campaign_key: str, server_key: str, before: int | None = None) -> dict[str, str]:
    """The tags of the next send run of a campaign on a server; `before` is the attempt that was asked for last, if the caller knows it.

    The newest run that Dagster keeps of the two tells it (one look by the index of tags). When all of them are deleted it begins with 1 again.
    """
    if before is None:
        newest = instance.get_runs(dg.RunsFilter(tags={CAMPAIGN: campaign_key, SERVER: server_key}), limit=1)
        given = newest[0].tags.get(ATTEMPT, "") if newest else ""
        before = int(given) if given.isdecimal() else 0
    return {**campaign(campaign_key), **server(server_key), ATTEMPT: str(before + 1)}


def missing(instance: dg.DagsterInstance, run: dg.DagsterRun, queue: str) -> dict[str, str]:
    """What a run lacks that is about to go into a queue, as those do that somebody starts by hand."""
    key = run.tags.get(queues.PARTITION_TAG)
    if not key:
        return {}
    if queues.executes(run, queues.AUDIT):
        return server(key)
    if queues.executes(run, queues.SENDING):
        if queue in (queues.CENTRE, queues.DISPATCH):
            # Nobody knows yet who takes it.
            return campaign(key)
        # One that is executed again has the tags of the run that it repeats.
        return {} if ATTEMPT in run.tags and run.parent_run_id is None else of_sending(instance, split_batch_key(key)[0], queue)
    return campaign(key) if run.asset_selection and run.asset_selection <= CAMPAIGN_ASSETS else {}
