"""When a session gives its slot to another campaign, which would otherwise wait for as long as sessions last; and when it does an errand for it instead.

One that sends gives way to a campaign of higher priority, one that only waits to any that has work. Rows that come back after a deferral are few, and
no reason to end a session: where nobody comes for them, a session sends them itself, and goes on with its own (docs/decisions/0048).
"""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from mail_pipelines.database.engine import database_now
from mail_pipelines.database.models import Allotment, Campaign, Claim, State
from mail_pipelines.database.views import shard_counts
from mail_pipelines.delivery.recording import slot_at
from mail_pipelines.dispatch import holds
from mail_pipelines.dispatch.due import ROWS_TO_JOIN, due_of_many, due_times
from mail_pipelines.dispatch.servers import ServerInfo

# So long after it was due a row is waited for, so that a run or another server's session may come for it.
ERRAND_AFTER_SECONDS = 30.0
# A look for an errand goes through no more campaigns than this.
_CAMPAIGNS_A_LOOK = 5


class Errand(NamedTuple):
    """Deferred rows of a campaign that nobody has come for; `shard` is one that has some."""

    campaign_id: int
    campaign: str
    shard: int


class AtWork(NamedTuple):
    """What the sessions of a server do that have claims: by run the priority of what it sends, and all campaigns."""

    priorities: dict[str, int]
    campaigns: set[int]

    def gives_way(self, run_id: str, slots: int) -> bool:
        """Whether no slot is free, and this is the session of the lowest priority (of those, the one whose run has the lowest id)."""
        return len(self.priorities) >= slots and run_id in self.priorities and run_id == min(self.priorities, key=lambda run: (self.priorities[run], run))


def waits_for_a_slot(connection: Connection, server: ServerInfo, run_id: str, *, slots: int) -> str | None:
    """The key of the campaign for which the session `run_id` should end: its server has no slot free, none of its sessions sends that campaign, and
    this one has the lowest priority there. None: there is no such campaign, or another session gives way.
    """
    sessions = at_work(connection, server)
    if not sessions.gives_way(run_id, slots):
        return None
    return campaign_with_work(connection, server, besides=sessions.campaigns, above=sessions.priorities[run_id])


def campaign_with_work(connection: Connection, server: ServerInfo, *, besides: Collection[int], above: int | None = None) -> str | None:
    """The key of the most urgent campaign, not one of these, with a priority `above` that, which a session on this server could send now."""
    waiting = connection.execute(_waiting(connection, server, State.PENDING, besides, above).limit(1)).one_or_none()
    # Where a send window has just opened those who wait are deferred ones, and many.
    deferred = _waiting(connection, server, State.DEFERRED, besides, above if waiting is None else waiting.priority).where(Campaign.send_window.is_not(None))
    second = database_now(connection).timestamp()
    opened: dict[int, set[str]] = {}
    for row in connection.execute(deferred).all():
        if row.id not in opened:
            opened[row.id] = {provider for (_, provider), due in due_of_many(connection, row.id, ROWS_TO_JOIN).items() if due <= second}
        if row.provider in opened[row.id]:
            return str(row.key)
    return None if waiting is None else str(waiting.key)


def errand_for(connection: Connection, server: ServerInfo, run_id: str, campaign_id: int, *, slots: int, waits: bool) -> Errand | None:
    """What the session `run_id` of a campaign should send for another one that none of its server's sessions sends, since nobody else can: for one of
    higher priority in place of giving way, or, if the session only `waits` while all slots are taken, for any. None: there is nothing.
    """
    sessions = at_work(connection, server)
    if not waits and not sessions.gives_way(run_id, slots):
        return None
    waiting = connection.execute(
        _waiting(connection, server, State.DEFERRED, sessions.campaigns | {campaign_id}, None if waits else sessions.priorities[run_id])
    ).all()
    if not waiting:
        return None
    held = holds.in_force(connection)
    second = database_now(connection).timestamp() - ERRAND_AFTER_SECONDS
    for other, key in list(dict.fromkeys((row.id, row.key) for row in waiting))[:_CAMPAIGNS_A_LOOK]:
        providers = {row.provider for row in waiting if row.id == other and not held.over_provider(row.provider)}
        due = due_times(connection, other, server_id=server.id)
        places = [place for place, moment in due.items() if 0 < moment <= second and place[1] in providers]
        if places:
            return Errand(other, key, min(places)[0])
    return None


def at_work(connection: Connection, server: ServerInfo) -> AtWork:
    """The sessions of a server that have claims."""
    query = sa.select(Claim.run_id, Campaign.id, Campaign.priority).join(Campaign, Campaign.id == Claim.campaign_id)
    found = AtWork({}, set())
    for run, campaign_id, priority in connection.execute(query.where(Claim.server_id == server.id, Claim.state == "open").distinct()).tuples():
        # On an errand it has claims of two campaigns.
        found.priorities[run] = min(priority, found.priorities.get(run, priority))
        found.campaigns.add(campaign_id)
    return found


def _waiting(connection: Connection, server: ServerInfo, state: State, besides: Collection[int], above: int | None) -> sa.Select[int, str, int, str]:
    """Campaigns, the most urgent first, that have rows in this state for a provider, and a grant for it on this server now."""
    return (
        sa.select(Campaign.id, Campaign.key, Campaign.priority, Allotment.provider)
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
            shard_counts.c.state == int(state),
        )
        .group_by(Campaign.id, Campaign.key, Campaign.priority, Allotment.provider)
        .having(sa.func.sum(shard_counts.c.count) > 0)
        .order_by(Campaign.priority.desc(), Campaign.key)
    )
