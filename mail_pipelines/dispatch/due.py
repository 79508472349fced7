"""What is due: cheap questions to counters and indexes, asked by sessions, sensors and pages. The ledger is never scanned."""

from __future__ import annotations

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from mail_pipelines.database.models import OPEN_STATES, CampaignCounter, Delivery, State


def due_times(connection: Connection, campaign_id: int, shard: int | None = None) -> dict[tuple[int, str], float]:
    """When each (shard, provider) of a campaign, or of one shard, next has a row to send (epoch seconds; 0: now).

    One statement: the counters say where rows wait, the ledger's index gives the first of each deferred range.
    """
    first = (
        sa.select(Delivery.sort_key)
        .where(
            Delivery.campaign_id == campaign_id,
            Delivery.shard == CampaignCounter.shard,
            Delivery.provider == CampaignCounter.provider,
            Delivery.state == int(State.DEFERRED),
        )
        .order_by(Delivery.sort_key)
        .limit(1)
        .correlate(CampaignCounter)
        .scalar_subquery()
    )
    waiting = (
        sa.select(
            CampaignCounter.shard,
            CampaignCounter.provider,
            sa.case((CampaignCounter.state == int(State.PENDING), 0), else_=first).label("due"),
        )
        .where(CampaignCounter.campaign_id == campaign_id, CampaignCounter.state.in_([int(State.PENDING), int(State.DEFERRED)]))
        .group_by(CampaignCounter.shard, CampaignCounter.provider, CampaignCounter.state)
        .having(sa.func.sum(CampaignCounter.count) > 0)
    )
    if shard is not None:
        waiting = waiting.where(CampaignCounter.shard == shard)
    found: dict[tuple[int, str], float] = {}
    for row in connection.execute(waiting):
        # A deferred row may have been claimed since the counter was read.
        if row.due is not None:
            place = (row.shard, row.provider)
            found[place] = min(float(row.due), found.get(place, float(row.due)))
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
