"""Sending: the asset whose runs execute on dispatch servers. It stays light: no pandas, no duckdb, nothing that the send path does not need."""

import datetime as dt
from collections.abc import Iterator
from typing import Any

import dagster as dg

from mail_pipelines import partitions
from mail_pipelines.assets.audience import campaign_audiences
from mail_pipelines.dispatch import sending
from mail_pipelines.dispatch.session import Report
from mail_pipelines.resources import run_tags
from mail_pipelines.resources.database import CentralDatabase
from mail_pipelines.resources.queues import QUEUE_TAG, this_server
from mail_pipelines.resources.server import DispatchServer


@dg.asset(
    partitions_def=partitions.campaign_shards,
    deps=[dg.AssetDep(campaign_audiences, partition_mapping=partitions.by_campaign)],
    group_name="sending",
    owners=["team:sending"],
    kinds={"email"},
    output_required=False,
    pool="dispatch",
)
def send_batches(context: dg.AssetExecutionContext, database: CentralDatabase, server: DispatchServer) -> Iterator[dg.MaterializeResult | dg.AssetObservation]:
    """One shard of a campaign, sent through the run's dispatch server. Green only when no recipient of the shard is open.

    When the shard has nothing due, the run goes on with others of the campaign. A run that stops before its shard is final succeeds with an
    observation: open rows, reason, when the next ones are due. Nothing is sent unless the campaign's state is sending, however often the partition is
    materialised.
    """
    campaign, shard = partitions.split_batch_key(context.partition_key)
    engine, settings = database.engine, database.settings
    plan = sending.plan(engine, campaign, shard)
    if plan.campaign_id is None or not plan.may_send:
        yield from _result(context, plan.is_final, {"sent": 0, "claimed": 0, "open": plan.open_rows, "reason": plan.reason})
        return
    speaks_for = server.of_run(engine, settings, plan.campaign_id, context.run)
    if this_server() is None and context.run.tags.get(QUEUE_TAG) != speaks_for.key:
        # Who has taken it, where it named none. On a dispatch server the launcher has said so; there nobody may write tags, or see those it wrote.
        tags = {QUEUE_TAG: speaks_for.key, **run_tags.of_next_sending(context.instance, (campaign, speaks_for.key))}
        context.instance.add_run_tags(context.run.run_id, tags)
    context.log.info("sending shard %02d of %s through %s", shard, campaign, speaks_for.key)

    def progress(report: Report) -> None:
        context.log.info("%d of %d claimed rows delivered, %d claims", report.sent, report.claimed, report.claims)

    report = sending.run(engine, settings, speaks_for, plan, shard, context.run.run_id, progress)
    cancelled = report.interrupted and _is_cancelled(context)
    if cancelled:
        report.reason = "cancelled by the operator"
    yield from _result(context, report.open_rows == 0, _metadata(report))
    if cancelled:
        # Dagster calls a run cancelled only if it ends by this.
        raise dg.DagsterExecutionInterruptedError


def _is_cancelled(context: dg.AssetExecutionContext) -> bool:
    """Whether a signal was an operator's wish. A worker that is stopped sends the same one, and its runs end as well as any that leave open rows."""
    run = context.instance.get_run_by_id(context.run.run_id)
    return run is not None and run.status in (dg.DagsterRunStatus.CANCELING, dg.DagsterRunStatus.CANCELED)


def _metadata(report: Report) -> dict[str, Any]:
    due = dt.datetime.fromtimestamp(report.next_due, dt.UTC).isoformat() if report.next_due else "not known"
    return {
        "server": report.server,
        "claimed": report.claimed,
        "sent": report.sent,
        **{state.name.lower(): count for state, count in sorted(report.results.items())},
        **{f"settled_{state.name.lower()}": count for state, count in sorted(report.settled.items())},
        "claims": report.claims,
        "shards": len(report.shards),
        **({"errands": report.errands} if report.errands else {}),
        "seconds": round(report.seconds, 2),
        "messages_per_second": round(report.sent / report.seconds, 1) if report.seconds else 0.0,
        "open": report.open_rows,
        "reason": report.reason,
        **({"next_due": due} if report.open_rows else {}),
    }


def _result(context: dg.AssetExecutionContext, final: bool, metadata: dict[str, Any]) -> Iterator[dg.MaterializeResult | dg.AssetObservation]:
    context.log.info("ended: %s", metadata["reason"])
    if final:
        yield dg.MaterializeResult(metadata=metadata)
    else:
        yield dg.AssetObservation(asset_key=context.asset_key, partition=context.partition_key, metadata=metadata)
