"""Campaigns in the database: create, update, load, and their numbered content versions. The row is the truth.

What belongs here: what may be written in which state. What does not: the moves between states (`states`), whether the campaign
can work (`check`), its form as a file (`yaml_form`).
"""

from __future__ import annotations

import datetime as dt
from dataclasses import replace
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from mail_pipelines.campaigns.campaign import Campaign, CampaignError, Definition, OnUnknown, Priority, Unsubscribe
from mail_pipelines.campaigns.send_window import SendWindow
from mail_pipelines.campaigns.states import CampaignState, StateError
from mail_pipelines.database import models
from mail_pipelines.dispatch import holds
from mail_pipelines.errors import nearest
from mail_pipelines.keys import check_key

_OVERFLOW = sa.orm.aliased(models.Pool)


def create(connection: Connection, definition: Definition, now: dt.datetime) -> Campaign:
    """A new draft. Raises `CampaignError` if the key is taken or names a brand, pool or list that does not exist."""
    check_key(definition.key, "campaign key")
    taken = sa.select(models.Campaign.id).where(models.Campaign.key == definition.key)
    if connection.execute(taken).one_or_none() is not None:
        raise CampaignError(f"there is a campaign {definition.key} already; give this one another name or key")
    connection.execute(
        sa.insert(models.Campaign).values(key=definition.key, state=CampaignState.DRAFT.value, created_at=now, **_columns(connection, definition, now))
    )
    return load(connection, definition.key)


def update(connection: Connection, definition: Definition, now: dt.datetime) -> Campaign:
    """Write the definition over the draft with its key. Raises `StateError` if it differs and the campaign is no draft any more.

    Times that the definition leaves open are no difference once the campaign has them from being scheduled and started.
    """
    campaign = load(connection, definition.key, for_update=True)
    if campaign.state is not CampaignState.DRAFT:
        present = campaign.definition
        definition = replace(definition, start_at=definition.start_at or present.start_at, expire_at=definition.expire_at or present.expire_at)
    if definition == campaign.definition:
        return campaign
    if campaign.state is not CampaignState.DRAFT:
        changed = [name for name in Definition.__dataclass_fields__ if getattr(definition, name) != getattr(campaign.definition, name)]
        raise StateError(f"campaign {campaign.key} is {campaign.state}: {', '.join(changed)} can be changed in a draft only{_back_to_draft(campaign)}")
    connection.execute(sa.update(models.Campaign).where(models.Campaign.id == campaign.id).values(**_columns(connection, definition, now)))
    return load(connection, definition.key)


def move_deadline(connection: Connection, key: str, finish_by: dt.datetime | None, now: dt.datetime) -> Campaign:
    """Set the time that planning aims at (None: none), in any state in which something may still be sent: the next plan follows it, no message does.

    Raises `StateError` if the campaign is over, `CampaignError` if the time is.
    """
    campaign = load(connection, key, for_update=True)
    if campaign.state.is_terminal:
        raise StateError(f"campaign {key} is {campaign.state}: nothing is sent any more, so no time to finish by can be set")
    if finish_by is not None and finish_by <= now:
        raise CampaignError(f"{finish_by.isoformat()} is over already; name a time to come")
    connection.execute(sa.update(models.Campaign).where(models.Campaign.id == campaign.id).values(finish_by=finish_by, updated_at=now))
    return load(connection, key)


def _back_to_draft(campaign: Campaign) -> str:
    return f"; `mail-pipelines campaign unschedule {campaign.key}` makes it one again" if campaign.state is CampaignState.SCHEDULED else ""


def _columns(connection: Connection, definition: Definition, now: dt.datetime) -> dict[str, Any]:
    return {
        "name": definition.name,
        "brand_id": _id_of(connection, models.Brand, definition.brand, "brand"),
        "pool_id": _id_of(connection, models.Pool, definition.pool, "pool"),
        "overflow_pool_id": None if definition.overflow_pool is None else _id_of(connection, models.Pool, definition.overflow_pool, "pool"),
        "segments": {"include": list(definition.include), "exclude": list(definition.exclude)},
        "unsubscribe": definition.unsubscribe.value,
        "unsubscribe_list_id": None if definition.list is None else _id_of(connection, models.ContactList, definition.list, "list"),
        "on_unknown": definition.on_unknown.value,
        "priority": int(definition.priority),
        "start_at": definition.start_at,
        "finish_by": definition.finish_by,
        "expire_at": definition.expire_at,
        "send_window": None if definition.window is None else definition.window.to_document(),
        "updated_at": now,
    }


def _id_of(connection: Connection, model: type[models.Brand] | type[models.Pool] | type[models.ContactList], key: str, what: str) -> int:
    found = connection.execute(sa.select(model.id).where(model.key == key)).scalar_one_or_none()
    if found is None:
        raise CampaignError(f"there is no {what} {key!r}; {nearest(key, connection.execute(sa.select(model.key)).scalars())}")
    return found


def load(connection: Connection, key: str, *, for_update: bool = False) -> Campaign:
    """The campaign with this key, its row locked if `for_update`. Raises `CampaignError` if there is none, naming the nearest key."""
    found = select(connection, models.Campaign.key == key, for_update=for_update)
    if not found:
        raise CampaignError(f"there is no campaign {key!r}; {nearest(key, connection.execute(sa.select(models.Campaign.key)).scalars())}")
    return found[0]


def select(
    connection: Connection,
    where: sa.ColumnElement[bool],
    *,
    order_by: tuple[sa.ColumnElement[Any] | sa.orm.InstrumentedAttribute[Any], ...] = (models.Campaign.id,),
    for_update: bool = False,
    limit: int | None = None,
) -> list[Campaign]:
    """The campaigns that meet a condition on `models.Campaign`, at most the first `limit`."""
    query = (
        sa.select(
            models.Campaign.__table__,
            models.Brand.key.label("brand_key"),
            models.Pool.key.label("pool_key"),
            _OVERFLOW.key.label("overflow_pool_key"),
            models.ContactList.key.label("list_key"),
        )
        .join(models.Brand, models.Brand.id == models.Campaign.brand_id)
        .join(models.Pool, models.Pool.id == models.Campaign.pool_id)
        .outerjoin(_OVERFLOW, _OVERFLOW.id == models.Campaign.overflow_pool_id)
        .outerjoin(models.ContactList, models.ContactList.id == models.Campaign.unsubscribe_list_id)
        .where(where)
        .order_by(*order_by)
        .limit(limit)
    )
    if for_update:
        # The campaign's row first and alone, so that nobody waits for a brand or a list.
        connection.execute(sa.select(models.Campaign.id).where(where).with_for_update()).all()
    in_force = holds.in_force(connection)
    return [_campaign(row, in_force) for row in connection.execute(query)]


def _campaign(row: sa.Row[Any], in_force: holds.InForce) -> Campaign:
    definition = Definition(
        name=row.name,
        key=row.key,
        include=tuple(row.segments["include"]),
        exclude=tuple(row.segments["exclude"]),
        brand=row.brand_key,
        pool=row.pool_key,
        overflow_pool=row.overflow_pool_key,
        unsubscribe=Unsubscribe(row.unsubscribe),
        list=row.list_key,
        on_unknown=OnUnknown(row.on_unknown),
        priority=Priority(row.priority),
        start_at=row.start_at,
        finish_by=row.finish_by,
        expire_at=row.expire_at,
        window=None if row.send_window is None else SendWindow.from_document(row.send_window),
    )
    return Campaign(
        id=row.id,
        definition=definition,
        state=CampaignState(row.state),
        hold=in_force.over_campaign(row.id, row.brand_id, row.pool_id),
        brand_id=row.brand_id,
        pool_id=row.pool_id,
        list_id=row.unsubscribe_list_id,
        version_id=row.version_id,
        shards=row.shards,
        audience_manifest=row.audience_manifest,
        audience_counts=row.audience_counts,
        created_at=row.created_at,
        updated_at=row.updated_at,
        started_at=row.started_at,
        finished_at=row.finished_at,
        archive=row.archive,
        archived_at=row.archived_at,
    )
