"""Lists contacts subscribe to: making and finding them. Who is subscribed is changed by import and by `consent`."""

from __future__ import annotations

import datetime as dt
from dataclasses import dataclass

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from mail_pipelines.contacts.sets import insert_if_absent
from mail_pipelines.database.models import Brand, ContactList
from mail_pipelines.errors import MailPipelinesError, nearest
from mail_pipelines.keys import slug

DEFAULT_BRAND = "default"


class ListError(MailPipelinesError):
    """A list or brand that does not exist."""


@dataclass(frozen=True)
class MailingList:
    """A list of a brand; `key` is the slug of its name."""

    id: int
    key: str
    name: str
    brand_id: int


def ensure(connection: Connection, name: str, *, brand: str = DEFAULT_BRAND, now: dt.datetime) -> MailingList:
    """The list of this name (or key), made if there is none. Raises `InvalidKey` for a name without letters, `ListError` for an unknown brand."""
    key = slug(name, "list key")
    found = _find(connection, key)
    if found is not None:
        return found
    brand_id = connection.execute(sa.select(Brand.id).where(Brand.key == brand)).scalar_one_or_none()
    if brand_id is None:
        raise ListError(f"there is no brand {brand!r}; {nearest(brand, connection.execute(sa.select(Brand.key)).scalars().all())}")
    connection.execute(insert_if_absent(ContactList), {"key": key, "name": name.strip()[:200], "brand_id": brand_id, "created_at": now})
    return get(connection, key)


def get(connection: Connection, name: str) -> MailingList:
    """The list of this name or key. Raises `ListError`, which names the nearest."""
    key = slug(name, "list key")
    found = _find(connection, key)
    if found is None:
        raise ListError(f"there is no list {key!r}; {nearest(key, connection.execute(sa.select(ContactList.key)).scalars().all())}")
    return found


def _find(connection: Connection, key: str) -> MailingList | None:
    row = connection.execute(sa.select(ContactList.id, ContactList.key, ContactList.name, ContactList.brand_id).where(ContactList.key == key)).one_or_none()
    return None if row is None else MailingList(*row)
