"""The simple rule that fills allotments from limits until planning does it: every sending campaign with open rows gets its share.

A slot is 15 minutes. A server's room for a provider in a slot is the least its limits allow; it is shared among the
campaigns by the weight of their priority. Grants only ever rise within a slot here, so no session is cut short; only a breaker that opens
takes them away, and gets no new ones.
"""

from __future__ import annotations

import datetime as dt
from collections import defaultdict

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine

from mail_pipelines.capacity import breakers
from mail_pipelines.database.engine import database_now, is_mysql, transact
from mail_pipelines.database.models import Allotment, Campaign, CampaignCounter, ProviderLimit, Server, State
from mail_pipelines.delivery.breakers import provider_rules
from mail_pipelines.delivery.recording import SLOT_SECONDS, slot_at
from mail_pipelines.dispatch import holds

# Weight of priority low, normal, high, urgent.
PRIORITY_WEIGHTS = (1, 4, 16, 64)
_WAITING = (State.PENDING, State.DEFERRED)


def fill(engine: Engine, now: dt.datetime | None = None) -> int:
    """Grant the current and the next slot to all sending campaigns; returns how many grants were made or raised."""

    def work(connection: Connection) -> int:
        moment = now or database_now(connection)
        grants = _grants(connection)
        rows = [
            {"campaign_id": campaign, "server_id": server, "provider": provider, "slot_start": start, "granted": granted, "used": 0}
            for start in (slot_at(moment), slot_at(moment) + SLOT_SECONDS)
            for (campaign, server, provider), granted in sorted(grants.items())
        ]
        return _raise(connection, rows)

    return transact(engine, work)


def _grants(connection: Connection) -> dict[tuple[int, int, str], int]:
    """Messages a slot: (campaign, server, provider) → grant."""
    waiting = connection.execute(
        sa.select(CampaignCounter.campaign_id, CampaignCounter.provider, Campaign.priority)
        .join(Campaign, Campaign.id == CampaignCounter.campaign_id)
        .where(Campaign.state == "sending", ~holds.over_campaigns(), CampaignCounter.state.in_([int(state) for state in _WAITING]))
        .group_by(CampaignCounter.campaign_id, CampaignCounter.provider, Campaign.priority)
        .having(sa.func.sum(CampaignCounter.count) > 0)
    ).all()
    demand: defaultdict[str, dict[int, int]] = defaultdict(dict)
    for campaign, provider, priority in waiting:
        demand[provider][campaign] = PRIORITY_WEIGHTS[priority]
    stopped = breakers.not_closed(connection)
    held = holds.in_force(connection)
    active = connection.execute(sa.select(Server.id, Server.pool_id).where(Server.state == "active"))
    servers = [server.id for server in active if held.over_server(server.id, server.pool_id) is None]
    limits = {
        (row.server_id, row.provider): _per_slot(row.per_second, row.per_hour, row.per_day)
        for row in connection.execute(
            sa.select(ProviderLimit.server_id, ProviderLimit.provider, ProviderLimit.per_second, ProviderLimit.per_hour, ProviderLimit.per_day)
        )
    }
    grants = {}
    for server in servers:
        for provider, weights in demand.items():
            if held.over_provider(provider):
                continue
            room = next((limits[place] for place in ((server, provider), (server, "*"), (0, provider), (0, "*")) if place in limits), 0)
            total = sum(weights.values())
            state = stopped.get((server, provider), breakers.CLOSED)
            for campaign, weight in weights.items():
                share = max(1, room * weight // total) if room else 0
                if state != breakers.OPEN:
                    grants[campaign, server, provider] = share if state == breakers.CLOSED else min(share, provider_rules().trial_messages)
    return grants


def _per_slot(per_second: float, per_hour: int | None, per_day: int | None) -> int:
    caps = [int(per_second * SLOT_SECONDS)]
    # A day's or an hour's limit may be spent in one slot if nothing else was: the usage windows keep the sum.
    caps += [cap for cap in (per_hour, per_day) if cap is not None]
    return max(0, min(caps))


def _raise(connection: Connection, rows: list[dict[str, object]]) -> int:
    """Insert grants, or raise those that are lower; `used` is the claims' column and stays."""
    if not rows:
        return 0
    table = Allotment.__table__
    assert isinstance(table, sa.Table)
    if is_mysql(connection):
        from sqlalchemy.dialects import mysql

        insert = mysql.insert(table)
        statement: sa.Insert = insert.on_duplicate_key_update(granted=sa.func.greatest(table.c.granted, sa.func.values(sa.column("granted"))))
    else:
        from sqlalchemy.dialects import sqlite

        upsert = sqlite.insert(table)
        statement = upsert.on_conflict_do_update(
            index_elements=list(table.primary_key), set_={"granted": sa.func.max(table.c.granted, upsert.excluded.granted)}
        )
    connection.execute(statement, rows)
    return len(rows)
