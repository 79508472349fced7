"""Who refused something here stays refused for a source that comes to know them later. On both databases."""

from __future__ import annotations

import dataclasses
import datetime as dt
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from mail_pipelines.contacts import changes, consent
from mail_pipelines.contacts.addresses import address_hash, parse
from mail_pipelines.database.engine import transact
from mail_pipelines.database.models import Contact, ContactList, Suppression
from mail_pipelines.sources import feeds, refusals, running, status, telling
from mail_pipelines.sources.declaration import Source
from mail_pipelines.sources.running import Report
from tests.parts.kills import killed_throughout
from tests.sources.conftest import Declare, ids

pytestmark = pytest.mark.slow
Sync = Callable[..., Report]
LONG_AGO = dt.datetime(2026, 1, 5, 9, tzinfo=dt.UTC)
WHAT = ["unsubscribes", "suppressions"]


@pytest.fixture
def told_later(declare: Declare, database_there: tuple[Source, sa.Engine]) -> Callable[..., Source]:
    """`told_later(**write_back)`: the database that is read, and has a table of addresses which it says must not be mailed."""
    source, there = database_there
    with there.begin() as connection:
        connection.exec_driver_sql("CREATE TABLE refused (mail TEXT)")

    def declared(**write_back: Any) -> Source:
        send = {"table": "happened", "batch": 100, "columns": {"event": "key", "person": "external_id", "what": "kind", "at": "occurred_at"}}
        return declare(
            kind="sql",
            connection=source.connection,
            contacts={"read": {"table": "people"}, "map": {"id": "external_id", "mail": "email"}, "deletions": {"at_least": 9}},
            suppressions={"read": {"table": "refused"}, "map": {"mail": "email"}, "scope": "list News"},
            write_back={"what": WHAT, "send": send, **write_back},
        )

    return declared


def brings(there: sa.Engine, **people: int) -> None:
    """The source has these people from now on."""
    with there.begin() as connection:
        connection.execute(sa.text("INSERT INTO people VALUES (:id, :mail)"), [{"id": id_, "mail": f"{name}@example.test"} for name, id_ in people.items()])


def told(there: sa.Engine) -> list[tuple[str, str]]:
    """What the source was told, of whom."""
    with there.connect() as connection:
        return sorted((row.what, str(row.person)) for row in connection.exec_driver_sql("SELECT what, person FROM happened"))


def is_known_here(engine: sa.Engine, *names: str) -> None:
    addresses = [parse(f"{name}@example.test") for name in names]
    rows = [
        {"email": given.email, "address": given.address, "address_hash": given.hash, "domain": given.domain, "provider": "other", "attributes": {}}
        for given in addresses
    ]
    times = {"created_at": LONG_AGO, "updated_at": LONG_AGO}
    transact(engine, lambda connection: connection.execute(sa.insert(Contact), [row | times for row in rows]))


def suppress(engine: sa.Engine, name: str, reason: str = "manual") -> None:
    hashes = [address_hash(f"{name}@example.test")]
    transact(engine, lambda connection: consent.suppress(connection, hashes, reason=reason, now=LONG_AGO))


def unsubscribe(engine: sa.Engine, name: str) -> None:
    def work(connection: sa.Connection) -> None:
        list_id = connection.execute(sa.select(ContactList.id).where(ContactList.key == "news")).scalar_one()
        consent.unsubscribe(connection, [ids(engine)[f"{name}@example.test"]], scope="list", scope_id=list_id, now=LONG_AGO)

    transact(engine, work)


def test_it_is_told_what_those_refused_whom_it_brings_later(
    engine: sa.Engine, home: Path, told_later: Callable[..., Source], database_there: tuple[Source, sa.Engine], sync: Sync, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What is read again for safety is nothing, so that it is found by the source's bringing them alone.
    monkeypatch.setattr(feeds, "OVERLAP", dt.timedelta(0))
    source, there = told_later(), database_there[1]
    sync(source)
    telling.run(engine, home, source)
    is_known_here(engine, "ann", "cid")
    unsubscribe(engine, "ann")
    suppress(engine, "bob")
    # By her own word, on any list, and was on none.
    suppress(engine, "dora", "unsubscribe")
    # Known there until now, and then gone for a while.
    with there.begin() as connection:
        connection.exec_driver_sql("DELETE FROM people WHERE id = 1")
    sync(source)
    unsubscribe(engine, "p1")
    for _ in range(2):
        assert "pushed" not in telling.run(engine, home, source).counts
    brings(there, ann=20, bob=21, cid=22, dora=23, p1=1)
    url = engine.url.render_as_string(hide_password=False)
    assert killed_throughout(url, lambda own: running.run(own, home, source, "contacts"), 30) > 2
    telling.run(engine, home, source)
    left = [(what, person) for what in ("suppression", "unsubscribe") for person in ("1", "20", "23")]
    assert told(there) == sorted([*left, ("suppression", "21")])
    sync(source)
    assert "pushed" not in telling.run(engine, home, source).counts


def test_what_it_said_before_it_brought_the_person_is_not_told_to_it(
    engine: sa.Engine, home: Path, told_later: Callable[..., Source], database_there: tuple[Source, sa.Engine], sync: Sync
) -> None:
    source, there = told_later(), database_there[1]
    with there.begin() as connection:
        connection.exec_driver_sql("INSERT INTO refused VALUES ('p3@example.test'), ('dan@example.test')")
    for _ in range(2):
        # In this order: who left is not subscribed for a moment.
        sync(source, section="suppressions")
        sync(source)
        telling.run(engine, home, source)
        assert told(there) == []
        brings(there, dan=20)


def test_it_is_told_what_was_written_slowly_and_in_a_day_whatever_was_missed(
    engine: sa.Engine, home: Path, told_later: Callable[..., Source], database_there: tuple[Source, sa.Engine], sync: Sync, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, there = told_later(unknown="create"), database_there[1]
    sync(source)
    telling.run(engine, home, source)
    suppress(engine, "eve")

    def is_suppressed(number: int, name: str) -> None:
        row = {"id": number, "address_hash": address_hash(f"{name}@example.test"), "scope_kind": "all", "scope_id": 0, "reason": "manual"}
        transact(engine, lambda connection: connection.execute(sa.insert(Suppression), [row | {"created_at": LONG_AGO}]))

    is_suppressed(1000, "p5")
    telling.run(engine, home, source)
    # Its number was given before, in a transaction that was open then. And what takes long ends subscriptions with the time of its begin.
    is_suppressed(500, "p6")
    unsubscribe(engine, "p7")
    telling.run(engine, home, source)
    expected = [("suppression", "5"), ("suppression", "6"), ("suppression", "7"), ("unsubscribe", "7")]
    assert told(there) == expected
    # The address of nobody becomes somebody's whom the source does not bring.
    monkeypatch.setattr(feeds, "OVERLAP", dt.timedelta(0))
    for _ in range(2):
        telling.run(engine, home, source)
    is_known_here(engine, "eve")
    telling.run(engine, home, source)
    assert told(there) == expected
    position = status.position(engine, "crm", "suppressions")
    assert position.whole_at is not None
    status.move(engine, "crm", "suppressions", dataclasses.replace(position, whole_at=position.whole_at - feeds.WHOLE_EACH))
    telling.run(engine, home, source)
    assert told(there) == sorted([("suppression", "None"), *expected])


def test_a_source_that_was_off_for_longer_than_changes_are_kept_is_told_all(
    engine: sa.Engine, home: Path, told_later: Callable[..., Source], database_there: tuple[Source, sa.Engine], sync: Sync
) -> None:
    source, there = told_later(), database_there[1]
    sync(source)
    for _ in range(2):
        telling.run(engine, home, source)
    away = changes.KEPT + dt.timedelta(days=2)
    for told_of in refusals.KINDS:
        # As if that had been so long ago.
        at = status.position(engine, "crm", told_of)
        moved = {name: getattr(at, name) - away for name in ("read_at", "whole_at")}
        moved |= {name: dataclasses.replace(numbers, at=numbers.at - away) for name in ("settled", "young") if (numbers := getattr(at, name))}
        status.move(engine, "crm", told_of, dataclasses.replace(at, **moved))
    for name in ("p3", "p4"):
        unsubscribe(engine, name)
    assert changes.prune(engine, dt.datetime.now(dt.UTC) + changes.KEPT) > 0
    for _ in range(2):
        telling.run(engine, home, source)
    assert told(there) == [(what, person) for what in ("suppression", "unsubscribe") for person in ("3", "4")]
