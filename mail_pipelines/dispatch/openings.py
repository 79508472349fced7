"""Which send runs to start now: at most the free slots of each server, only where rows are due and a grant is unspent.

A pure reading of the database; the sensor `open_shards` turns the answer into run requests.
"""

from __future__ import annotations

import datetime as dt
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from mail_pipelines.database.engine import database_now
from mail_pipelines.database.models import Allotment, Campaign, CampaignCounter, Claim, Server, State
from mail_pipelines.delivery.recording import slot_at
from mail_pipelines.dispatch import holds, servers
from mail_pipelines.dispatch.due import senders

# A tick looks at no more campaigns and asks for no more runs than this.
CAMPAIGNS_A_TICK = 50
RUNS_A_TICK = 100
# A run takes about so long to start, so it is asked for that much before its rows fall due.
START_SECONDS = 3
# A shard must have so many rows for each server that is already asked to work there, before another is asked in the same tick.
ROWS_TO_JOIN = 200
_WAITING = (int(State.PENDING), int(State.DEFERRED))


@dataclass(frozen=True, order=True)
class Opening:
    """A send run to start: this shard of this campaign, on this server."""

    campaign: str
    shard: int
    server: str


@dataclass(frozen=True)
class _Work:
    """A shard, how many rows wait there for providers of which some are due, and the ids of the servers that may send them."""

    campaign: str
    shard: int
    rows: int
    able: list[int]


def find(connection: Connection, now: dt.datetime, *, slots: int, heartbeat_seconds: float, in_flight: Collection[Opening]) -> list[Opening]:
    """The runs to start, urgent campaigns first. `slots` is the number of sessions at once on one server; `in_flight` what runs or waits already."""
    active = {server.id: server for server in servers.all_servers(connection) if server.state == "active"}
    held = holds.in_force(connection)
    fleet = {
        number: server
        for number, server in active.items()
        if not server.is_silent(now, heartbeat_seconds) and not server.shortage and not held.over_server(number, server.pool_id)
    }
    busy = Counter(opening.server for opening in in_flight)
    free = {number: slots - busy[server.key] for number, server in fleet.items()}
    found: list[Opening] = []

    def start(campaign: str, shard: int, server_id: int) -> None:
        found.append(Opening(campaign, shard, fleet[server_id].key))
        free[server_id] -= 1

    taken = set(in_flight)
    for claim in _left_behind(connection):
        # The run settles its server's abandoned claims before it sends. A silent server needs it too, and needs no free slot for it.
        opening = Opening(claim.key, claim.shard, active[claim.server_id].key) if claim.server_id in active else None
        if opening is not None and opening not in taken and opening not in found:
            found.append(opening)
            if claim.server_id in free:
                free[claim.server_id] -= 1
    waits: list[_Work] = []
    for campaign in _sending(connection) if any(count > 0 for count in free.values()) else ():
        waiting = _waiting(connection, campaign.id)
        due: defaultdict[int, dict[str, set[int] | None]] = defaultdict(dict)
        for (shard, provider), may_send in senders(connection, campaign.id, now.timestamp() + START_SECONDS).items():
            if not held.over_provider(provider):
                due[shard][provider] = may_send
        worked = Counter(opening.shard for opening in taken if opening.campaign == campaign.key)
        # Shards that nobody works on first, the fullest before the others.
        shards = sorted(waiting, key=lambda shard: (worked[shard], -sum(waiting[shard].values())))
        unspent = _unspent(connection, campaign.id, slot_at(now))
        # A grant may be of a time before the server or the campaign changed its pool.
        members = [server for server in free if fleet[server].pool_id in (campaign.pool_id, campaign.overflow_pool_id)]
        for shard in shards:
            able = [server for server in members if _has_work(server, due[shard], unspent[server])]
            waits.append(_Work(campaign.key, shard, sum(waiting[shard].get(provider, 0) for provider in due[shard]), able))
    # In each round one more server joins each shard: where there are fewer shards than slots, all servers work from the first tick on.
    for joining in range(max((len(work.able) for work in waits), default=0)):
        for work in waits:
            able = [server for server in work.able if free[server] > 0 and Opening(work.campaign, work.shard, fleet[server].key) not in taken.union(found)]
            if able and work.rows >= joining * ROWS_TO_JOIN and len(found) < RUNS_A_TICK:
                start(work.campaign, work.shard, max(able, key=lambda server: (free[server], -server)))
    return found


def _has_work(server_id: int, due: Mapping[str, Collection[int] | None], unspent: Collection[str]) -> bool:
    """Whether a server has a grant for rows of a shard that are due and wait for no other. `due`: provider to the servers that may send (None: each)."""
    return any(provider in unspent and (may_send is None or server_id in may_send) for provider, may_send in due.items())


def _sending(connection: Connection) -> list[sa.Row[int, str, int, int | None]]:
    query = sa.select(Campaign.id, Campaign.key, Campaign.pool_id, Campaign.overflow_pool_id).where(Campaign.state == "sending", ~holds.over_campaigns())
    return list(connection.execute(query.order_by(Campaign.priority.desc(), Campaign.started_at, Campaign.id).limit(CAMPAIGNS_A_TICK)))


def _left_behind(connection: Connection) -> list[sa.Row[int, int, str]]:
    """Open claims past their lease: whoever held them is gone, and their rows wait for settlement."""
    return list(
        connection.execute(
            sa.select(Claim.server_id, Claim.shard, Campaign.key)
            .join(Campaign, Campaign.id == Claim.campaign_id)
            .join(Server, Server.id == Claim.server_id)
            .where(Claim.state.in_(("open", "settling")), Claim.lease_until <= database_now(connection))
            .distinct()
            .limit(RUNS_A_TICK)
        )
    )


def _unspent(connection: Connection, campaign_id: int, slot: int) -> defaultdict[int, set[str]]:
    """Providers to which each server still has a grant for the campaign in this slot."""
    unspent: defaultdict[int, set[str]] = defaultdict(set)
    rows = connection.execute(
        sa.select(Allotment.server_id, Allotment.provider).where(
            Allotment.campaign_id == campaign_id, Allotment.slot_start == slot, Allotment.granted > Allotment.used
        )
    )
    for server_id, provider in rows:
        unspent[server_id].add(provider)
    return unspent


def _waiting(connection: Connection, campaign_id: int) -> dict[int, dict[str, int]]:
    """Pending and deferred rows by shard and provider, from the counters."""
    waiting: defaultdict[int, dict[str, int]] = defaultdict(dict)
    rows = connection.execute(
        sa.select(CampaignCounter.shard, CampaignCounter.provider, sa.func.sum(CampaignCounter.count))
        .where(CampaignCounter.campaign_id == campaign_id, CampaignCounter.state.in_(_WAITING))
        .group_by(CampaignCounter.shard, CampaignCounter.provider)
        .having(sa.func.sum(CampaignCounter.count) > 0)
    )
    for shard, provider, count in rows:
        waiting[shard][provider] = int(count)
    return waiting
