"""What criteria may speak of: fields with their types, lists, campaigns. Read from the database, kept in each snapshot's manifest.

What does not belong here: values of contacts, and what may be said about a field (`criteria`).
"""

from __future__ import annotations

import datetime as dt
from dataclasses import dataclass
from typing import Literal, cast

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from mail_pipelines.database.models import Campaign, ContactList, Field

FieldType = Literal["text", "number", "boolean", "date", "datetime"]


@dataclass(frozen=True)
class CustomField:
    """A row of `fields`. The column is named by id, so a field deleted and made anew with another type never meets old values."""

    id: int
    key: str
    type: FieldType

    @property
    def column(self) -> str:
        return f"f{self.id}"


@dataclass(frozen=True)
class BuiltInField:
    """A field every contact has; it wins over a custom field of the same key."""

    key: str
    type: FieldType

    @property
    def column(self) -> str:
        return self.key


BUILT_IN_FIELDS = (BuiltInField("domain", "text"), BuiltInField("provider", "text"), BuiltInField("time_zone", "text"), BuiltInField("created_at", "datetime"))


@dataclass(frozen=True)
class KnownList:
    id: int
    key: str

    @property
    def column(self) -> str:
        return f"l{self.id}"


@dataclass(frozen=True)
class KnownCampaign:
    id: int
    key: str
    started_at: dt.datetime | None


@dataclass(frozen=True)
class Catalogue:
    fields: tuple[CustomField, ...] = ()
    lists: tuple[KnownList, ...] = ()
    campaigns: tuple[KnownCampaign, ...] = ()

    def field_by_key(self) -> dict[str, CustomField | BuiltInField]:
        known: list[CustomField | BuiltInField] = [*self.fields, *BUILT_IN_FIELDS]
        return {field.key: field for field in known}

    def last_campaigns(self, count: int) -> tuple[int, ...]:
        """Ids of the `count` campaigns that started last, newest first; those not started do not count."""
        started = sorted(((campaign.started_at, campaign.id) for campaign in self.campaigns if campaign.started_at is not None), reverse=True)
        return tuple(campaign_id for _, campaign_id in started[:count])


def read_fields(connection: Connection) -> tuple[CustomField, ...]:
    # The models keep types as text; only these are ever written.
    return tuple(
        CustomField(row.id, row.key, cast(FieldType, row.type)) for row in connection.execute(sa.select(Field.id, Field.key, Field.type).order_by(Field.id))
    )


def read_lists(connection: Connection) -> tuple[KnownList, ...]:
    return tuple(KnownList(*row) for row in connection.execute(sa.select(ContactList.id, ContactList.key).order_by(ContactList.id)))


def read_campaigns(connection: Connection) -> tuple[KnownCampaign, ...]:
    return tuple(KnownCampaign(*row) for row in connection.execute(sa.select(Campaign.id, Campaign.key, Campaign.started_at).order_by(Campaign.id)))


def read_catalogue(connection: Connection) -> Catalogue:
    """The catalogue as the database has it now: what new criteria are checked against."""
    return Catalogue(read_fields(connection), read_lists(connection), read_campaigns(connection))
