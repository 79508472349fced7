"""Shards: which send runs to start, and which partitions have become final."""

from __future__ import annotations

import contextlib
import datetime as dt
import json

import dagster as dg

from mail_pipelines import partitions
from mail_pipelines.assets.sending import send_batches
from mail_pipelines.campaigns import stopping
from mail_pipelines.capacity import allotments, breakers
from mail_pipelines.database.engine import DatabaseUnreachable, database_now, reading
from mail_pipelines.dispatch import final, openings
from mail_pipelines.jobs import send_campaign
from mail_pipelines.resources import run_tags
from mail_pipelines.resources.database import CentralDatabase
from mail_pipelines.resources.queues import QUEUE_TAG
from mail_pipelines.sensors.runs import send_runs
from mail_pipelines.sensors.ticks import instance_of


def open_shards(context: dg.SensorEvaluationContext, database: CentralDatabase) -> dg.SensorResult | dg.SkipReason:
    """Start send runs: at most the free slots of each server, only for shards with due rows and an unspent grant."""
    engine, settings = database.engine, database.settings
    with contextlib.suppress(DatabaseUnreachable):
        for breaker in breakers.judge(engine):
            context.log.warning("server %d to %s is %s: %s", breaker.server_id, breaker.provider, breaker.state, breaker.reason)
        for key, reason in stopping.stop_bad(engine, dt.datetime.now(dt.UTC)).items():
            context.log.warning("campaign %s %s", key, reason)
        # Whoever holds SQLite's write lock for ever is ended by the run that settles its claims, so that run must be asked for.
        allotments.fill(engine, settings.server.heartbeat_seconds)
    instance = instance_of(context)
    known = set(instance.get_dynamic_partitions(partitions.campaigns.name or ""))
    with reading(engine) as connection:
        found = openings.find(
            connection,
            database_now(connection),
            slots=settings.server.slots,
            heartbeat_seconds=settings.server.heartbeat_seconds,
            in_flight=send_runs(instance),
        )
    found = [opening for opening in found if opening.campaign in known]
    attempts = run_tags.attempts(instance, {(opening.campaign, opening.server) for opening in found})
    runs: list[dg.RunRequest] = []
    for opening in found:
        pair = (opening.campaign, opening.server)
        attempts[pair] += 1
        tags = {QUEUE_TAG: opening.server, **run_tags.of_sending(pair, attempts[pair])}
        runs.append(dg.RunRequest(job_name=send_campaign.name, partition_key=partitions.batch_key(opening.campaign, opening.shard), tags=tags))
    return dg.SensorResult(run_requests=runs) if runs else dg.SkipReason("no shard has due rows, an unspent grant and a free slot")


def finished_shards(context: dg.SensorEvaluationContext, database: CentralDatabase) -> dg.SensorResult | dg.SkipReason:
    """Materialise partitions whose shard the ledger calls final, also where no run ended them: unused, settled, expired."""
    cursor = json.loads(context.cursor or '{"complete": [], "partial": {}}')
    reported: dict[str, set[int]] = {key: set(numbers) for key, numbers in cursor["partial"].items()}
    known = set(instance_of(context).get_dynamic_partitions(partitions.campaigns.name or ""))
    with reading(database.engine) as connection:
        recent = final.recent_campaigns(connection, dt.datetime.now(dt.UTC))
        complete = {number for number in recent.values() if number in cursor["complete"]}
        watched = {key: number for key, number in recent.items() if number not in complete and key in known}
        shards = final.final_shards(connection, watched, partitions.SHARDS, reported)
    events = [
        dg.AssetMaterialization(
            asset_key=send_batches.key,
            partition=partitions.batch_key(shard.campaign, shard.shard),
            metadata={"rows": shard.rows, "open": 0, "reason": "final in the ledger", **shard.states},
        )
        for shard in shards
    ]
    for shard in shards:
        reported.setdefault(shard.campaign, set()).add(shard.shard)
    # The cursor is stored as text of at most 64 KB: a campaign that is wholly reported takes the digits of its id.
    complete |= {number for key, number in watched.items() if len(reported.get(key, ())) == partitions.SHARDS}
    partial = {key: sorted(reported[key]) for key, number in watched.items() if key in reported and number not in complete}
    after = json.dumps({"complete": sorted(complete), "partial": partial})
    return dg.SensorResult(asset_events=events, cursor=after) if events else dg.SkipReason("no further shard is final")
