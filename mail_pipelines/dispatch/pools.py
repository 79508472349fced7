"""Pools: groups of servers. A campaign is sent by its own pool, and by its overflow pool where its own cannot send.

What belongs here: which pools there are and who is in them. What does not: when the overflow pool is granted anything (`capacity.allotments`).
"""

from __future__ import annotations

from dataclasses import dataclass

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from mail_pipelines.database.models import Campaign, Pool, Server
from mail_pipelines.dispatch.files import DispatchError
from mail_pipelines.errors import nearest
from mail_pipelines.keys import check_key

# Campaigns in these states will still be sent, or may be.
_LIVE = ("draft", "scheduled", "building", "sending", "paused")


class PoolError(DispatchError):
    """There is no such pool, or there is one already."""


@dataclass(frozen=True)
class PoolInfo:
    """A pool with the keys of its servers (but retired ones), and of the live campaigns that it sends, or helps to send."""

    id: int
    key: str
    servers: tuple[str, ...]
    campaigns: tuple[str, ...]
    overflow_of: tuple[str, ...]


def add(connection: Connection, key: str) -> None:
    check_key(key, "pool name")
    if connection.execute(sa.select(Pool.id).where(Pool.key == key)).first() is not None:
        raise PoolError(f"there is a pool {key!r} already")
    connection.execute(sa.insert(Pool).values(key=key))


def find(connection: Connection, key: str) -> int:
    """The id of a pool. Raises `PoolError`, which names the nearest."""
    found = connection.execute(sa.select(Pool.id).where(Pool.key == key)).scalar_one_or_none()
    if found is None:
        raise PoolError(f"there is no pool {key!r}; {nearest(key, keys(connection).values())}")
    return found


def keys(connection: Connection) -> dict[int, str]:
    return dict(connection.execute(sa.select(Pool.id, Pool.key)).tuples().all())


def all_pools(connection: Connection) -> list[PoolInfo]:
    servers = connection.execute(sa.select(Server.key, Server.pool_id).where(Server.state != "retired").order_by(Server.key)).all()
    live = sa.select(Campaign.key, Campaign.pool_id, Campaign.overflow_pool_id).where(Campaign.state.in_(_LIVE))
    campaigns = connection.execute(live.order_by(Campaign.key)).all()
    return [
        PoolInfo(
            number,
            key,
            tuple(server.key for server in servers if server.pool_id == number),
            tuple(campaign.key for campaign in campaigns if campaign.pool_id == number),
            tuple(campaign.key for campaign in campaigns if campaign.overflow_pool_id == number),
        )
        for number, key in sorted(keys(connection).items(), key=lambda pool: pool[1])
    ]


def of_campaign(connection: Connection, campaign_id: int) -> set[int]:
    """The pools whose servers may send a campaign."""
    row = connection.execute(sa.select(Campaign.pool_id, Campaign.overflow_pool_id).where(Campaign.id == campaign_id)).one()
    return {pool_id for pool_id in row if pool_id is not None}
