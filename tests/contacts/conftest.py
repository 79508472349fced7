"""Contacts and lists for the tests of this folder, written straight to the tables."""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable

import pytest
import sqlalchemy as sa

from mail_pipelines.contacts.addresses import parse
from mail_pipelines.contacts.providers import provider_of
from mail_pipelines.database.engine import transact
from mail_pipelines.database.models import Brand, Contact, ContactList, Subscription

NOW = dt.datetime(2026, 11, 2, 9, 30, tzinfo=dt.UTC)
# Brand 1 is there from the first migration.
LISTS = {"news": (1, 1), "shop": (2, 1), "jobs": (3, 2)}
AddContact = Callable[..., int]


@pytest.fixture
def add_contact(engine: sa.Engine) -> AddContact:
    """`add_contact("ann@example.test", "news", …)` makes a contact subscribed to these lists and returns its id."""

    def make_lists(connection: sa.Connection) -> None:
        connection.execute(sa.insert(Brand), {"id": 2, "key": "second", "name": "Second", "postal_address": "", "created_at": NOW})
        connection.execute(
            sa.insert(ContactList), [{"id": number, "key": key, "name": key, "brand_id": brand, "created_at": NOW} for key, (number, brand) in LISTS.items()]
        )

    transact(engine, make_lists)

    def add(email: str, *lists: str) -> int:
        address = parse(email)

        def work(connection: sa.Connection) -> int:
            row = {"email": address.email, "address": address.address, "address_hash": address.hash, "domain": address.domain}
            row |= {"provider": provider_of(address.domain), "attributes": {}, "created_at": NOW, "updated_at": NOW}
            contact_id: int = connection.execute(sa.insert(Contact), row).inserted_primary_key[0]
            for name in lists:
                values = {"contact_id": contact_id, "list_id": LISTS[name][0], "subscribed": True, "source": "import", "changed_at": NOW}
                connection.execute(sa.insert(Subscription), values)
            return contact_id

        return transact(engine, work)

    return add
