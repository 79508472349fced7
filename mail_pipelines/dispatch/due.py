"""What is due: cheap questions to counters and indexes, asked by sessions, sensors and pages. The ledger is never scanned."""

from __future__ import annotations

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from mail_pipelines.database.models import OPEN_STATES, CampaignCounter, Delivery, State


def due_times(connection: Connection, campaign_id: int, shard: int) -> dict[str, float]:
    """When each provider of a shard next has a row to send (epoch seconds; 0: now). Two index probes a provider."""
    providers = connection.execute(
        sa.select(CampaignCounter.provider).where(CampaignCounter.campaign_id == campaign_id, CampaignCounter.shard == shard).distinct()
    ).scalars()
    found: dict[str, float] = {}
    for provider in providers:
        for state in (State.PENDING, State.DEFERRED):
            first = connection.execute(
                sa.select(Delivery.sort_key)
                .where(Delivery.campaign_id == campaign_id, Delivery.shard == shard, Delivery.provider == provider, Delivery.state == int(state))
                .order_by(Delivery.sort_key)
                .limit(1)
            ).scalar_one_or_none()
            if first is not None:
                due = 0.0 if state is State.PENDING else float(first)
                found[provider] = min(due, found.get(provider, due))
    return found


def next_due(connection: Connection, campaign_id: int, shard: int) -> float | None:
    """When a shard next has a row to send; None if never by time alone."""
    return min(due_times(connection, campaign_id, shard).values(), default=None)


def open_rows(connection: Connection, campaign_id: int, shard: int) -> int:
    """Rows of a shard that are not final, from the counters."""
    return int(
        connection.execute(
            sa.select(sa.func.coalesce(sa.func.sum(CampaignCounter.count), 0)).where(
                CampaignCounter.campaign_id == campaign_id,
                CampaignCounter.shard == shard,
                CampaignCounter.state.in_([int(state) for state in OPEN_STATES]),
            )
        ).scalar_one()
    )


def pending_elsewhere(connection: Connection, campaign_id: int, shard: int) -> bool:
    """Whether another shard of the campaign has rows that were never offered, by the counters."""
    pending = (
        sa.select(CampaignCounter.shard)
        .where(CampaignCounter.campaign_id == campaign_id, CampaignCounter.shard != shard, CampaignCounter.state == int(State.PENDING))
        .group_by(CampaignCounter.shard)
        .having(sa.func.sum(CampaignCounter.count) > 0)
        .limit(1)
    )
    return connection.execute(pending).first() is not None
