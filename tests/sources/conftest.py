"""A home with declared sources, and what of them is in the database."""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
import yaml

from mail_pipelines.database.engine import reading, transact
from mail_pipelines.database.models import Contact, ContactList, EngagementEvent, Subscription
from mail_pipelines.sources import declaration, running
from mail_pipelines.sources.declaration import Source

Declare = Callable[..., Source]
# Of the CRM that is told something.
PEOPLE = 12
MAP = {"id": "external_id", "mail": "email", "name": "first_name", "city": "city", "orders": "orders"}


@pytest.fixture
def home(tmp_path: Path) -> Path:
    folder = tmp_path / "home"
    (folder / "sources").mkdir(parents=True, exist_ok=True)
    return folder


@pytest.fixture
def declare(home: Path) -> Declare:
    """`declare("crm", kind=…, connection=…, contacts={…})` writes a declaration and reads it; `contacts` is completed."""

    def write(name: str = "crm", *, contacts: Mapping[str, Any] | None = None, **document: Any) -> Source:
        tree: dict[str, Any] = {"name": name, **document}
        if contacts is not None:
            tree["contacts"] = {"map": MAP, "list": "News", "consent": {"subscribe": "always"}, **contacts}
        (home / "sources" / f"{name}.yaml").write_text(yaml.safe_dump(tree))
        return declaration.load(home, name)

    return write


@pytest.fixture
def sync(engine: sa.Engine, home: Path) -> Callable[..., running.Report]:
    def run(source: Source, **options: Any) -> running.Report:
        return running.run(engine, home, source, options.pop("section", "contacts"), **options)

    return run


@pytest.fixture
def database_there(declare: Declare, tmp_path: Path) -> Iterator[tuple[Source, sa.Engine]]:
    """A database whose people are read, and that is told of opens and clicks; it refuses clicks."""
    there = sa.create_engine(f"sqlite:///{tmp_path / 'crm.sqlite3'}")
    with there.begin() as connection:
        connection.exec_driver_sql("CREATE TABLE people (id INTEGER, mail TEXT)")
        connection.exec_driver_sql("CREATE TABLE happened (event TEXT, person TEXT, what TEXT CHECK (what <> 'click'), at DATETIME)")
        people = [{"id": number, "mail": f"p{number}@example.test"} for number in range(PEOPLE)]
        connection.execute(sa.text("INSERT INTO people VALUES (:id, :mail)"), people)
    send = {"table": "happened", "batch": 4, "columns": {"event": "key", "person": "external_id", "what": "kind", "at": "occurred_at"}}
    source = declare(
        kind="sql",
        connection={"url": f"sqlite:///{tmp_path / 'crm.sqlite3'}"},
        contacts={"read": {"table": "people"}, "map": {"id": "external_id", "mail": "email"}},
        write_back={"what": ["opens", "clicks"], "send": send},
        schedule="*/5 * * * *",
    )
    yield source, there
    there.dispose()


def ids(engine: sa.Engine) -> dict[str, int]:
    with reading(engine) as connection:
        return dict(connection.execute(sa.select(Contact.address, Contact.id)).tuples().all())


def engaged(engine: sa.Engine, numbers: range, kind: str = "open", *, recorded_at: dt.datetime | None = None, machine: bool = False, who: str = "") -> None:
    """Event number n is of contact n, modulo how many there are."""
    now, known = dt.datetime.now(dt.UTC), ids(engine)
    rows = [
        {
            "month": int(f"{now:%Y%m}"),
            "id": number,
            "occurred_at": now,
            "recorded_at": recorded_at or now,
            "campaign_id": 7,
            "contact_id": known[who or f"p{number % PEOPLE}@example.test"],
            "kind": kind,
            "link_id": None,
            "machine": machine,
        }
        for number in numbers
    ]
    transact(engine, lambda connection: connection.execute(sa.insert(EngagementEvent), rows))


def contacts(engine: sa.Engine) -> dict[str, dict[str, Any]]:
    with reading(engine) as connection:
        return {row.address: row.attributes for row in connection.execute(sa.select(Contact.address, Contact.attributes))}


def subscribed(engine: sa.Engine, list_key: str = "news") -> set[str]:
    """Addresses that are subscribed to the list."""
    query = sa.select(Contact.address).join(Subscription, Subscription.contact_id == Contact.id).join(ContactList, ContactList.id == Subscription.list_id)
    with reading(engine) as connection:
        return set(connection.execute(query.where(ContactList.key == list_key, Subscription.subscribed)).scalars())
