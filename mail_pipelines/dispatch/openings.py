"""Which send runs to start now: at most the free slots of each server, only where rows are due and a grant is unspent.

A shard with much to send has sessions of its own. Where only some deferred rows are due, any session of the campaign takes them, so that the retries of
hours do not become thousands of runs.

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
from mail_pipelines.dispatch.due import ROWS_TO_JOIN, Place, due_of_many, senders

# A tick looks at no more campaigns and asks for no more runs than this.
CAMPAIGNS_A_TICK = 50
RUNS_A_TICK = 100
# A run takes about so long to start, so it is asked for that much before its rows fall due.
START_SECONDS = 3


@dataclass(frozen=True, order=True)
class Opening:
    """A send run to start: this shard of this campaign, on this server."""

    campaign: str
    shard: int
    server: str


@dataclass(frozen=True)
class _Work:
    """Rows of a shard to be sent, how many (0: some deferred ones), and the ids of the servers that may send them."""

    campaign: str
    shard: int
    rows: int
    able: list[int]


def find(connection: Connection, now: dt.datetime, *, slots: int, heartbeat_seconds: float, in_flight: Collection[Opening]) -> list[Opening]:
    """The runs to start, urgent campaigns first, those of one priority in turn.

    `slots` is the number of sessions at once on one server; `in_flight` what runs or waits already.
    """
    active = {server.id: server for server in servers.all_servers(connection) if server.sends}
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
        at_work[campaign].add(fleet[server_id].key)
        free[server_id] -= 1

    taken = set(in_flight)
    at_work: defaultdict[str, set[str]] = defaultdict(set)
    for opening in taken:
        at_work[opening.campaign].add(opening.server)
    for claim in _left_behind(connection):
        # The run settles its server's abandoned claims before it sends. A silent server needs it too, and needs no free slot for it.
        if claim.server_id in active and (left := Opening(claim.key, claim.shard, active[claim.server_id].key)) not in taken.union(found):
            found.append(left)
            if claim.server_id in free:
                free[claim.server_id] -= 1
    turns: list[tuple[int, int, _Work]] = []
    sessions = Counter(opening.campaign for opening in taken.union(found))
    for campaign in _sending(connection) if any(count > 0 for count in free.values()) else ():
        # A grant may be of a time before the server or the campaign changed its pool.
        members = [server for server in free if fleet[server].pool_id in (campaign.pool_id, campaign.overflow_pool_id)]
        granted = _granted(connection, campaign.id, slot_at(now), members)
        worked = Counter(opening.shard for opening in taken if opening.campaign == campaign.key)
        full, few = _works(connection, campaign, granted, held, now.timestamp() + START_SECONDS)
        # Shards that nobody works on first, the fullest before the others.
        works = sorted(full, key=lambda work: (worked[work.shard], -work.rows, work.shard))
        turns += [(campaign.priority, sessions[campaign.key] + number, work) for number, work in enumerate(works)]
        # They want one session for each set of servers, and none where the campaign has one.
        turns += [(campaign.priority, sessions[campaign.key], work) for work in few]
    # Campaigns of one priority in turn, first the one with the fewest sessions: none takes all that becomes free.
    waits = [work for _, _, work in sorted(turns, key=lambda turn: (-turn[0], turn[1]))]
    # In each round one more server joins each shard: where there are fewer shards than slots, all servers work from the first tick on.
    for joining in range(max((len(work.able) for work in waits), default=0)):
        for work in waits:
            if work.rows < joining * ROWS_TO_JOIN or (not work.rows and any(fleet[server].key in at_work[work.campaign] for server in work.able)):
                continue
            able = [server for server in work.able if free[server] > 0 and Opening(work.campaign, work.shard, fleet[server].key) not in taken.union(found)]
            if able and len(found) < RUNS_A_TICK:
                start(work.campaign, work.shard, max(able, key=lambda server: (free[server], -server)))
    return found


def _works(
    connection: Connection, campaign: sa.Row[int, str, int, int, int | None], granted: Mapping[str, list[int]], held: holds.InForce, second: float
) -> tuple[list[_Work], list[_Work]]:
    """The shards of a campaign that have much to send, and some deferred rows for each set of servers of which one has to be at work."""
    rows = _rows(connection, campaign.id, second, max(map(len, granted.values()), default=0))
    full: defaultdict[int, Counter[int]] = defaultdict(Counter)
    few: dict[tuple[int, ...], int] = {}
    for (shard, provider), may_send in senders(connection, campaign.id, second).items():
        if held.over_provider(provider):
            continue
        able = [server for server in granted[provider] if may_send is None or server in may_send]
        if count := rows[shard, provider]:
            full[shard].update(dict.fromkeys(able, count))
        else:
            few.setdefault(tuple(able), shard)
    return (
        [_Work(campaign.key, shard, max(able.values(), default=0), list(able)) for shard, able in full.items()],
        [_Work(campaign.key, shard, 0, list(able)) for able, shard in few.items()],
    )


def _sending(connection: Connection) -> list[sa.Row[int, str, int, int, int | None]]:
    query = sa.select(Campaign.id, Campaign.key, Campaign.priority, Campaign.pool_id, Campaign.overflow_pool_id).where(
        Campaign.state == "sending", ~holds.over_campaigns()
    )
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


def _granted(connection: Connection, campaign_id: int, slot: int, members: Collection[int]) -> defaultdict[str, list[int]]:
    """By provider the servers of these that still have a grant for the campaign in this slot."""
    granted: defaultdict[str, list[int]] = defaultdict(list)
    rows = connection.execute(
        sa.select(Allotment.server_id, Allotment.provider)
        .where(Allotment.campaign_id == campaign_id, Allotment.slot_start == slot, Allotment.granted > Allotment.used)
        .order_by(Allotment.server_id)
    )
    for server_id, provider in rows:
        if server_id in members:
            granted[provider].append(server_id)
    return granted


def _rows(connection: Connection, campaign_id: int, second: float, most_servers: int) -> Counter[Place]:
    """Rows to send by shard and provider: the pending ones, and where many deferred ones are due, about how many: enough for so many servers, or at least
    half of them. Others wait for the hour at which their send window opens, or for a retry.
    """
    place = (CampaignCounter.shard, CampaignCounter.provider)
    waiting = connection.execute(
        sa.select(*place, sa.func.sum(CampaignCounter.count))
        .where(CampaignCounter.campaign_id == campaign_id, CampaignCounter.state == int(State.PENDING))
        .group_by(*place)
        .having(sa.func.sum(CampaignCounter.count) > 0)
    )
    due: dict[Place, int] = {}
    many = ROWS_TO_JOIN
    while many <= ROWS_TO_JOIN * most_servers:
        found = [where for where, moment in due_of_many(connection, campaign_id, many).items() if moment <= second]
        if not found:
            break
        due.update(dict.fromkeys(found, many))
        many *= 2
    rows = Counter(due)
    for shard, provider, count in waiting:
        rows[shard, provider] += int(count)
    return rows
