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

from collections import Counter
from collections.abc import Callable, Collection, Mapping
from typing import Any

import dagster as dg
import sqlalchemy as sa
from dagster._core.storage.runs import SqlRunStorage
from dagster._core.storage.runs.schema import RunTagsTable

from mail_pipelines.partitions import split_batch_key
from mail_pipelines.resources import queues

CAMPAIGN = "mail_pipelines/campaign"
SERVER = "mail_pipelines/server"
ATTEMPT = "mail_pipelines/attempt"
MAKING = "mail_pipelines/making"
# Keys of a campaign and of a server on which it is sent.
Pair = tuple[str, str]
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


def attempts(instance: dg.DagsterInstance, pairs: Collection[Pair]) -> Counter[Pair]:
    """The last attempt of each of these pairs, by the runs that Dagster keeps: when all of them are deleted it begins with 1 again.

    One look by the index of tags, however many pairs. Dagster itself can only be asked for the runs of one pair after the other, a connection each.
    """
    found: Counter[Pair] = Counter()
    if pairs:
        of_campaign, of_server, attempt = (sa.alias(RunTagsTable) for _ in range(3))
        query = (
            sa.select(of_campaign.c.value, of_server.c.value, sa.func.max(sa.cast(attempt.c.value, sa.Integer)))
            .join_from(of_campaign, of_server, of_server.c.run_id == of_campaign.c.run_id)
            .join(attempt, attempt.c.run_id == of_campaign.c.run_id)
            .where(of_campaign.c.key == CAMPAIGN, of_campaign.c.value.in_({campaign for campaign, _ in pairs}))
            .where(of_server.c.key == SERVER, of_server.c.value.in_({server for _, server in pairs}), attempt.c.key == ATTEMPT)
            .group_by(of_campaign.c.value, of_server.c.value)
        )
        storage = instance.run_storage
        assert isinstance(storage, SqlRunStorage)
        with storage.connect() as connection:
            found.update({(campaign, server): last for campaign, server, last in connection.execute(query)})
    return found


def of_sending(pair: Pair, attempt: int) -> dict[str, str]:
    """The tags of a send run of a campaign on a server."""
    return {**campaign(pair[0]), **server(pair[1]), ATTEMPT: str(attempt)}


def of_next_sending(instance: dg.DagsterInstance, pair: Pair) -> dict[str, str]:
    """The tags of a send run that is the next of its pair."""
    return of_sending(pair, attempts(instance, [pair])[pair] + 1)


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
        return {} if ATTEMPT in run.tags and run.parent_run_id is None else of_next_sending(instance, (split_batch_key(key)[0], queue))
    return campaign(key) if run.asset_selection and run.asset_selection <= CAMPAIGN_ASSETS else {}
