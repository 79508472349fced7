"""Holds: what is stopped until somebody releases it. A hold beats everything that asks for mail to be sent.

What belongs here: scopes, placing and releasing, and which hold is over what. Whoever moves rows asks: claims (the procedure `claim_rows` in its
own words), late messages and bursts, openings, grants. What does not: when a campaign is held (`campaigns.states`, `campaigns.stopping`).

Nobody waits for a claim that is under way: nothing of it is offered later than `lane.OFFER_SECONDS` after the database was asked for it, and bursts ask again.
"""

from __future__ import annotations

import datetime as dt
import enum
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from mail_pipelines.contacts.providers import providers
from mail_pipelines.database import models
from mail_pipelines.database.models import Brand, Campaign, Pool, Server
from mail_pipelines.errors import MailPipelinesError, nearest

# What the centre stops or releases by itself.
CENTRE = "mail-pipelines"


class HoldError(MailPipelinesError):
    """There is nothing of that name to hold, or it is not held."""


class Kind(enum.StrEnum):
    """What a hold may be over."""

    EVERYTHING = "everything"
    BRAND = "brand"
    CAMPAIGN = "campaign"
    POOL = "pool"
    SERVER = "server"
    PROVIDER = "provider"


_TABLES: dict[Kind, type[Brand] | type[Campaign] | type[Pool] | type[Server]] = {
    Kind.BRAND: Brand,
    Kind.CAMPAIGN: Campaign,
    Kind.POOL: Pool,
    Kind.SERVER: Server,
}


@dataclass(frozen=True)
class Scope:
    """What is held: `id` is the row of a brand, campaign, pool or server, `provider` a provider group."""

    kind: Kind = Kind.EVERYTHING
    id: int = 0
    provider: str = ""


@dataclass(frozen=True)
class Hold:
    """One hold. `name` is the key of what is held."""

    scope: Scope
    name: str
    reason: str
    by_whom: str
    created_at: dt.datetime
    released_at: dt.datetime | None = None
    released_by: str | None = None

    @property
    def what(self) -> str:
        return f"{self.scope.kind} {self.name}".strip()

    def __str__(self) -> str:
        """As claims put it."""
        subject = {Kind.EVERYTHING: "everything", Kind.PROVIDER: self.name}.get(self.scope.kind, f"the {self.scope.kind}")
        return f"{subject} is held: {self.reason}"

    @property
    def by(self) -> str:
        return f"{self.by_whom}, {self.created_at:%Y-%m-%d %H:%M} UTC"


# --- deciding -----------------------------------------------------------------------------------------------------


def scope_of(connection: Connection, kind: Kind, key: str = "") -> Scope:
    """The scope with this key. Raises `HoldError`, which names the nearest: a hold on a misspelt name would stop nothing."""
    if kind is Kind.EVERYTHING:
        return Scope()
    if kind is Kind.PROVIDER:
        if key not in providers():
            raise HoldError(f"there is no provider {key!r}; {nearest(key, providers())}")
        return Scope(kind, provider=key)
    table = _TABLES[kind]
    found = connection.execute(sa.select(table.id).where(table.key == key)).scalar_one_or_none()
    if found is None:
        raise HoldError(f"there is no {kind} {key!r}; {nearest(key, connection.execute(sa.select(table.key)).scalars())}")
    return Scope(kind, found)


def place(connection: Connection, scope: Scope, reason: str, by_whom: str, now: dt.datetime) -> bool:
    """Hold a scope; false if it is held already: the first reason stays."""
    table = models.Hold
    if connection.execute(sa.select(table.id).where(*_of(scope))).first() is not None:
        return False
    values = {"scope_kind": scope.kind.value, "scope_id": scope.id, "provider": scope.provider}
    connection.execute(sa.insert(table).values(**values, reason=reason[:500], by_whom=by_whom[:100], created_at=now))
    return True


def release(connection: Connection, scope: Scope, by_whom: str, now: dt.datetime) -> bool:
    """End the hold over exactly this scope; false if there is none. Those over other scopes stay."""
    freed = sa.update(models.Hold).where(*_of(scope)).values(released_at=now, released_by=by_whom[:100])
    return connection.execute(freed).rowcount > 0


def _of(scope: Scope) -> tuple[sa.ColumnElement[bool], ...]:
    table = models.Hold
    return (table.released_at.is_(None), table.scope_kind == scope.kind.value, table.scope_id == scope.id, table.provider == scope.provider)


# --- asking -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class InForce:
    """All holds that are not released, the oldest first."""

    holds: tuple[Hold, ...]

    def over_campaign(self, campaign_id: int, brand_id: int, pool_id: int) -> Hold | None:
        """A hold that keeps a campaign from being sent by any server."""
        return self._first(Scope(Kind.CAMPAIGN, campaign_id), Scope(Kind.BRAND, brand_id), Scope(Kind.POOL, pool_id), Scope())

    def over_server(self, server_id: int, pool_id: int) -> Hold | None:
        """A hold that keeps a server from sending anything."""
        return self._first(Scope(Kind.SERVER, server_id), Scope(Kind.POOL, pool_id), Scope())

    def over_provider(self, provider: str) -> Hold | None:
        return self._first(Scope(Kind.PROVIDER, provider=provider), Scope())

    def _first(self, *scopes: Scope) -> Hold | None:
        return next((hold for scope in scopes for hold in self.holds if hold.scope == scope), None)


def in_force(connection: Connection) -> InForce:
    return InForce(tuple(_select(connection, models.Hold.released_at.is_(None))))


def recorded(connection: Connection, most: int) -> list[Hold]:
    """The newest holds, released ones with them, the newest first."""
    return _select(connection, sa.true(), newest=most)


def _select(connection: Connection, where: sa.ColumnElement[bool], newest: int | None = None) -> list[Hold]:
    table = models.Hold
    key: sa.ColumnElement[Any] = sa.case(
        *(
            (table.scope_kind == kind.value, sa.select(target.key).where(target.id == table.scope_id).correlate(table).scalar_subquery())
            for kind, target in _TABLES.items()
        ),
        else_=table.provider,
    )
    query = sa.select(*table.__table__.c, key.label("name")).where(where).order_by(table.id if newest is None else table.id.desc()).limit(newest)
    return [_hold(row, row.name or "") for row in connection.execute(query)]


def _hold(row: Any, name: str) -> Hold:
    scope = Scope(Kind(row.scope_kind), row.scope_id, row.provider)
    return Hold(scope, name, row.reason, row.by_whom, row.created_at, row.released_at, row.released_by)


def _over(*scopes: tuple[Kind, Any]) -> sa.ColumnElement[bool]:
    """The condition on `models.Hold` that it is in force over one of these, or over everything."""
    table = models.Hold
    named = (sa.and_(table.scope_kind == kind.value, (table.provider if kind is Kind.PROVIDER else table.scope_id) == of) for kind, of in scopes)
    return sa.and_(table.released_at.is_(None), sa.or_(table.scope_kind == Kind.EVERYTHING.value, *named))


def over_campaigns() -> sa.ColumnElement[bool]:
    """The condition on `models.Campaign` that a hold keeps it from being sent by any server."""
    scopes = ((Kind.CAMPAIGN, Campaign.id), (Kind.BRAND, Campaign.brand_id), (Kind.POOL, Campaign.pool_id))
    return sa.exists().where(_over(*scopes)).correlate(Campaign)


# The provider last, since it alone leaves the session something to do.
_OVER_CLAIM = (
    sa.select(*models.Hold.__table__.c)
    .join_from(Campaign, Server, Server.id == sa.bindparam("server"))
    .join(
        models.Hold,
        _over(
            (Kind.CAMPAIGN, Campaign.id),
            (Kind.BRAND, Campaign.brand_id),
            (Kind.POOL, Campaign.pool_id),
            (Kind.POOL, Server.pool_id),
            (Kind.SERVER, Server.id),
            (Kind.PROVIDER, sa.bindparam("provider_held")),
        ),
    )
    .where(Campaign.id == sa.bindparam("campaign"))
    .order_by(models.Hold.scope_kind == Kind.PROVIDER.value, models.Hold.id)
    .limit(1)
)


def over_claim(connection: Connection, campaign_id: int, server_id: int, provider: str) -> Hold | None:
    """A hold over what a claim of this campaign on this server asks for."""
    row = connection.execute(_OVER_CLAIM, {"campaign": campaign_id, "server": server_id, "provider_held": provider}).one_or_none()
    return None if row is None else _hold(row, row.provider)
