"""The most engaged recipients go out through servers that are warmed up: while one has a grant for them, established servers begin behind them.

As many rows of the queue are left as the warming servers may still send in this slot, but not more than half of those that wait: nobody waits for
whom nothing else is left to send. The stored procedure `claim_rows` states the same rule.
"""

from __future__ import annotations

import datetime as dt

import sqlalchemy as sa
from sqlalchemy.engine import Connection
from sqlalchemy.orm import aliased

from mail_pipelines.database.models import Allotment, CampaignCounter, Delivery, ProviderUsage, Server, State, WarmUp
from mail_pipelines.delivery.recording import slot_at
from mail_pipelines.dispatch.claiming.terms import Request

# Nothing is left to a server that has been silent for so long.
SPEAKS_SECONDS = 120
# To pass over more takes too long.
MOST_LEFT = 2000
_DAY = 86400

_CAP = (
    sa.select(WarmUp.per_day)
    .where(WarmUp.server_id == sa.bindparam("server_id"), WarmUp.provider.in_((sa.bindparam("provider"), "*")))
    # The provider's own row before that of any.
    .order_by(WarmUp.provider.desc())
    .limit(1)
)
_own, _any = aliased(WarmUp), aliased(WarmUp)
_cap = sa.case((_own.server_id.is_not(None), _own.per_day), else_=_any.per_day)
_used = sa.func.coalesce(ProviderUsage.used, 0)
_UNSPENT = (
    sa.select(sa.func.sum(sa.func.min(Allotment.granted - Allotment.used, _cap - _used)))
    .select_from(Server)
    .join(
        Allotment,
        sa.and_(
            Allotment.campaign_id == sa.bindparam("campaign_id"),
            Allotment.server_id == Server.id,
            Allotment.provider == sa.bindparam("provider"),
            Allotment.slot_start == sa.bindparam("slot"),
        ),
    )
    .outerjoin(_own, sa.and_(_own.server_id == Server.id, _own.provider == sa.bindparam("provider")))
    .outerjoin(_any, sa.and_(_any.server_id == Server.id, _any.provider == "*"))
    .outerjoin(
        ProviderUsage,
        sa.and_(
            ProviderUsage.server_id == Server.id,
            ProviderUsage.provider == sa.bindparam("provider"),
            ProviderUsage.window_seconds == _DAY,
            ProviderUsage.window_start == sa.bindparam("day"),
        ),
    )
    .where(Server.state == "warming", Server.heartbeat_at > sa.bindparam("spoke"), Allotment.granted > Allotment.used, _cap > _used)
)
_PENDING = sa.select(sa.func.sum(CampaignCounter.count)).where(
    CampaignCounter.campaign_id == sa.bindparam("campaign_id"),
    CampaignCounter.shard == sa.bindparam("shard"),
    CampaignCounter.provider == sa.bindparam("provider"),
    CampaignCounter.state == int(State.PENDING),
)
_LAST_LEFT = (
    sa.select(Delivery.sort_key)
    .where(
        Delivery.campaign_id == sa.bindparam("campaign_id"),
        Delivery.shard == sa.bindparam("shard"),
        Delivery.provider == sa.bindparam("provider"),
        Delivery.state == int(State.PENDING),
    )
    .order_by(Delivery.sort_key)
    .limit(1)
    .offset(sa.bindparam("passed_over"))
)


def cap(connection: Connection, server_id: int, provider: str) -> int | None:
    """Messages a day that the warm-up of a server allows; None: it is warm, or has none."""
    return connection.execute(_CAP, {"server_id": server_id, "provider": provider}).scalar_one_or_none()


def first_place(connection: Connection, request: Request, now: dt.datetime) -> int | None:
    """Where in the order of sending a claim of an established server begins; None: at its beginning. What lies before is for it when nothing else is left."""
    second = int(now.timestamp())
    queue = {"campaign_id": request.campaign_id, "shard": request.shard, "provider": request.provider}
    times = {"slot": slot_at(now), "day": second - second % _DAY, "spoke": now - dt.timedelta(seconds=SPEAKS_SECONDS)}
    unspent = connection.execute(_UNSPENT, queue | times).scalar_one()
    if not unspent:
        return None
    left = min(int(unspent), int(connection.execute(_PENDING, queue).scalar_one() or 0) // 2, MOST_LEFT)
    last: int | None = connection.execute(_LAST_LEFT, queue | {"passed_over": left - 1}).scalar_one_or_none() if left > 0 else None
    return None if last is None else last + 1
