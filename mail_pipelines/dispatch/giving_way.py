"""When a session gives its slot to another campaign, which would otherwise wait for as long as sessions last.

One that sends gives way to a campaign of higher priority, one that only waits to any that has work.
"""

from __future__ import annotations

from collections.abc import Collection

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from mail_pipelines.database.engine import database_now
from mail_pipelines.database.models import Allotment, Campaign, Claim, State
from mail_pipelines.database.views import shard_counts
from mail_pipelines.delivery.recording import slot_at
from mail_pipelines.dispatch import holds
from mail_pipelines.dispatch.servers import ServerInfo


def waits_for_a_slot(connection: Connection, server: ServerInfo, run_id: str, *, slots: int) -> str | None:
    """The key of the campaign for which the session `run_id` should end: its server has no slot free, none of its sessions sends that campaign, and
    this one has the lowest priority there. None: there is no such campaign, or another session gives way.
    """
    query = sa.select(Claim.run_id, Campaign.id, Campaign.priority).join(Campaign, Campaign.id == Claim.campaign_id)
    sessions = {
        run: (priority, campaign_id)
        for run, campaign_id, priority in connection.execute(query.where(Claim.server_id == server.id, Claim.state == "open").distinct()).tuples()
    }
    if len(sessions) < slots or run_id not in sessions or run_id != min(sessions, key=lambda run: (sessions[run][0], run)):
        return None
    priority = sessions[run_id][0]
    return campaign_with_work(connection, server, besides=[campaign_id for _, campaign_id in sessions.values()], above=priority)


def campaign_with_work(connection: Connection, server: ServerInfo, *, besides: Collection[int], above: int | None = None) -> str | None:
    """The key of the most urgent campaign, not one of these, with a priority `above` that, which a session on this server could send now."""
    waiting = (
        sa.select(Campaign.key)
        .join(Allotment, sa.and_(Allotment.campaign_id == Campaign.id, Allotment.server_id == server.id))
        .join(shard_counts, sa.and_(shard_counts.c.campaign_id == Campaign.id, shard_counts.c.provider == Allotment.provider))
        .where(
            Campaign.state == "sending",
            Campaign.priority > above if above is not None else sa.true(),
            Campaign.id.not_in(besides),
            sa.or_(Campaign.pool_id == server.pool_id, Campaign.overflow_pool_id == server.pool_id),
            ~holds.over_campaigns(),
            Allotment.slot_start == slot_at(database_now(connection)),
            Allotment.granted > Allotment.used,
            # Rows that come back after a deferral are few, and no reason to end a session.
            shard_counts.c.state == int(State.PENDING),
        )
        .group_by(Campaign.key, Campaign.priority, Allotment.provider)
        .having(sa.func.sum(shard_counts.c.count) > 0)
        .order_by(Campaign.priority.desc(), Campaign.key)
        .limit(1)
    )
    return connection.execute(waiting).scalars().first()
