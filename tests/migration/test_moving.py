"""Moving an installation of each system here: what came, of whom nobody may be lost or mailed again, killed half-way, and again."""

from __future__ import annotations

import datetime as dt
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import sqlalchemy as sa

from mail_pipelines.contacts import consent, lists, lookup
from mail_pipelines.contacts.addresses import parse
from mail_pipelines.contacts.importing import import_file
from mail_pipelines.database.engine import reading, transact
from mail_pipelines.database.models import Contact, ContactChange, ContactList, DeliveryEvent, Field, Subscription, Suppression
from mail_pipelines.migration import running, source
from mail_pipelines.migration.interspire import Interspire
from mail_pipelines.migration.listmonk import Listmonk
from mail_pipelines.migration.mailwizz import MailWizz
from mail_pipelines.migration.source import DatabaseSource, MigrationError, open_database
from tests.migration.installations import MANY
from tests.parts.kills import COMMITS, killed_at

pytestmark = pytest.mark.server

NOW = dt.datetime(2026, 11, 2, 9, 30, tzinfo=dt.UTC)
LATER = NOW + dt.timedelta(hours=1)
SYSTEMS: dict[str, tuple[type[DatabaseSource], Any]] = {
    "interspire": (Interspire, "mysql"),
    "mailwizz": (MailWizz, "mysql"),
    "listmonk": (Listmonk, "postgresql"),
}
Open = Callable[[str], DatabaseSource]


@pytest.fixture
def opened(request: pytest.FixtureRequest) -> Open:
    def of(system: str) -> DatabaseSource:
        kind, family = SYSTEMS[system]
        return kind(open_database(request.getfixturevalue(f"{system}_url"), family=family))

    return of


def state_of(engine: sa.Engine, email: str) -> dict[str, tuple[bool, str, dt.datetime]]:
    with reading(engine) as connection:
        return {row.list_key: (row.subscribed, row.source, row.changed_at) for row in lookup.profile(connection, email).lists}


def suppressed(engine: sa.Engine, email: str) -> set[tuple[str, str]]:
    with reading(engine) as connection:
        return {(row.where, row.reason) for row in lookup.profile(connection, email).suppressions}


def attributes(engine: sa.Engine, email: str) -> dict[str, Any]:
    with reading(engine) as connection:
        return lookup.profile(connection, email).attributes


def consent_of(engine: sa.Engine, email: str) -> dict[str, Any]:
    with reading(engine) as connection:
        found: dict[str, Any] = connection.execute(sa.select(Contact.consent).where(Contact.address_hash == parse(email).hash)).scalar_one()
    return found


def everything(engine: sa.Engine) -> dict[str, Counter[tuple[Any, ...]]]:
    """All that a move writes, but numbers and times of rows that say nothing of the other system."""
    queries = {
        "contacts": sa.select(Contact.address, Contact.email, sa.type_coerce(Contact.attributes, sa.Text), sa.type_coerce(Contact.consent, sa.Text)),
        "subscriptions": sa.select(Contact.address, ContactList.key, Subscription.subscribed, Subscription.source)
        .join(Contact, Contact.id == Subscription.contact_id)
        .join(ContactList, ContactList.id == Subscription.list_id),
        "suppressions": sa.select(Suppression.address_hash, Suppression.domain, Suppression.scope_kind, ContactList.key, Suppression.reason).outerjoin(
            ContactList, sa.and_(Suppression.scope_kind == "list", ContactList.id == Suppression.scope_id)
        ),
        "events": sa.select(DeliveryEvent.month, DeliveryEvent.kind, DeliveryEvent.reason, DeliveryEvent.text),
        "fields": sa.select(Field.key, Field.type),
    }
    with reading(engine) as connection:
        return {name: Counter(tuple(row) for row in connection.execute(query)) for name, query in queries.items()}


def written(engine: sa.Engine) -> tuple[Any, ...]:
    """What any write leaves behind."""
    tables = (Contact, Subscription, Suppression, ContactChange, DeliveryEvent, ContactList, Field)
    times = (sa.func.max(Contact.updated_at), sa.func.max(Suppression.created_at), sa.func.max(Subscription.changed_at))
    with reading(engine) as connection:
        counts = [connection.execute(sa.select(sa.func.count()).select_from(table)).scalar_one() for table in tables]
        return (*counts, *(connection.execute(sa.select(time)).scalar_one() for time in times))


def at(year: int, month: int, day: int) -> dt.datetime:
    return dt.datetime(year, month, day, tzinfo=dt.UTC)


def test_interspire_comes_as_it_is(engine: sa.Engine, opened: Open) -> None:
    checked = running.check(engine, opened("interspire"))
    with reading(engine) as connection:
        assert connection.execute(sa.select(sa.func.count()).select_from(Field)).scalar_one() == 0

    report = running.move(engine, opened("interspire"), NOW)

    assert report.agrees
    assert checked.agrees
    fields = {field.key: field.type for field in report.fields}
    assert fields == {"first_name": "text", "colours": "text", "age": "number", "birthday": "date", "field_address": "text", "field_6": "text"}
    assert [of_list.name for of_list in report.lists] == ["interspire list 4", "news offers 3", "Angebote Ü", "News & Offers"]
    first = report.lists[-1].rows
    assert {key: number for key, number in first.items() if number} == {
        ("left", "left"): 2,
        ("active", "subscribed"): MANY + 5,
        ("active", "rejected"): 3,
        ("active", "duplicate"): 1,
        ("bounced", "subscribed"): 1,
        ("unconfirmed", "unconfirmed"): 1,
    }
    # What a check says is what comes.
    comes = {(name, key): n for name, rows in ((x.name, x.rows) for x in checked.lists) for key, n in rows.items() if n and key[1] in ("rejected", "duplicate")}
    came = {(name, key): n for name, rows in ((x.name, x.rows) for x in report.lists) for key, n in rows.items() if n and key[1] in ("rejected", "duplicate")}
    assert comes == came
    assert sum(n for x in checked.lists for (_, outcome), n in x.rows.items() if outcome == "comes") == MANY + 12

    assert attributes(engine, "ann.upper@example.test") == {
        "first_name": "Müller & Co",
        "colours": "Red, Blue",
        "birthday": "1999-12-31",
        "field_address": "Main St",
    }
    assert attributes(engine, "post@bücher.example") == {"first_name": "Twice"}
    # The newest list says it, and a value that is no number stays behind alone.
    assert attributes(engine, "user1@example.test") == {"first_name": "Newer name", "age": 1}
    assert report.values == {("age", "not a number (like 12 or -3.5)"): 1}
    assert state_of(engine, "gone@example.test") == {"news-offers": (False, "unsubscribe", at(2020, 1, 2)), "angebote-u": (True, "import", at(2020, 1, 1))}
    assert suppressed(engine, "gone@example.test") == {("list News & Offers", "unsubscribe")}
    assert state_of(engine, "asked@example.test")["news-offers"] == (False, "unsubscribe", at(2020, 1, 4))
    assert state_of(engine, "back@example.test")["news-offers"][:2] == (True, "import")
    assert state_of(engine, "waiting@example.test")["news-offers"][:2] == (False, "unconfirmed")
    assert suppressed(engine, "dead@example.test") == {("all", "bounce")}
    assert suppressed(engine, "banned@example.test") == {("all", "manual")}
    assert suppressed(engine, "someone@banned.example") == {("all", "manual")}
    assert suppressed(engine, "anybody@other.example") == {("all", "manual")}
    assert suppressed(engine, "user9@example.test") == {("list Angebote Ü", "manual")}
    assert consent_of(engine, "user0@example.test")["news-offers"] == {
        "system": "interspire",
        "requested_at": "2019-12-31T23:59:51Z",
        "requested_ip": "192.0.2.1",
        "form": "7",
    }
    assert consent_of(engine, "asked@example.test")["news-offers"]["left_ip"] == "198.51.100.7"
    with reading(engine) as connection:
        columns = (DeliveryEvent.month, DeliveryEvent.reason, DeliveryEvent.code, DeliveryEvent.enhanced, DeliveryEvent.text)
        events = {tuple(row) for row in connection.execute(sa.select(*columns))}
    assert events == {
        (202001, "hard", 550, "5.1.1", "emaildoesntexist 550 5.1.1 <***@example.test>: user unknown"),
        (197001, "soft", 452, "4.2.2", "emaildoesntexist 452 4.2.2 full"),
    }
    with reading(engine) as connection:
        bounces = lookup.profile(connection, "dead@example.test").bounces
    assert [(bounce.kind, bounce.occurred_at) for bounce in bounces] == [("hard", at(2020, 1, 3))]
    assert (report.bans, report.bounces) == ((5, 4), (3, 2))


def test_mailwizz_comes_as_it_is(engine: sa.Engine, opened: Open) -> None:
    report = running.move(engine, opened("mailwizz"), NOW)

    assert report.agrees
    assert {field.key: field.type for field in report.fields} == {"fname": "text", "colours": "text", "born": "date", "stars": "number"}
    assert {key: number for key, number in report.lists[-1].rows.items() if number} == {
        ("left", "left"): 2,
        ("active", "subscribed"): MANY + 2,
        ("active", "rejected"): 1,
        ("blocked", "subscribed"): 2,
        ("unconfirmed", "unconfirmed"): 2,
        ("disabled", "disabled"): 1,
    }
    assert attributes(engine, "emoji@example.test") == {"fname": "😀 <b>", "colours": "red, blue"}
    assert state_of(engine, "left@example.test") == {"kunden-freunde": (False, "unsubscribe", at(2020, 4, 4)), "shop": (True, "import", at(2020, 1, 1))}
    assert state_of(engine, "left2@example.test")["kunden-freunde"] == (False, "unsubscribe", NOW)
    assert suppressed(engine, "black@example.test") == {("all", "bounce")}
    assert suppressed(engine, "hard@example.test") == {("all", "bounce")}
    assert suppressed(engine, "spam@example.test") == {("all", "complaint")}
    assert suppressed(engine, "angry@example.test") == {("all", "complaint")}
    assert suppressed(engine, "user8@example.test") == {("all", "manual")}
    assert consent_of(engine, "user0@example.test")["kunden-freunde"] == {
        "system": "mailwizz",
        "requested_at": "2020-01-01T00:00:00Z",
        "requested_ip": "192.0.2.1",
        "confirmed_at": "2020-01-02T00:00:00Z",
        "confirmed_ip": "192.0.2.2",
        "form": "web",
    }
    assert state_of(engine, "user0@example.test")["kunden-freunde"] == (True, "import", at(2020, 1, 2))
    # One entry of the blacklist is the hash of an address, and one of the suppression list.
    assert (report.bans, report.bounces) == ((5, 3), (3, 3))


def test_listmonk_comes_as_it_is(engine: sa.Engine, opened: Open) -> None:
    report = running.move(engine, opened("listmonk"), NOW)

    assert report.agrees
    types = {"name": "text", "age": "number", "born": "date", "city": "text", "vip": "boolean", "zip": "text", "tags": "text", "field_id": "text"}
    assert {field.key: field.type for field in report.fields} == types
    assert attributes(engine, "user2@example.test") == {"city": "Köln", "age": 2, "vip": True, "zip": "01234", "born": "1912-01-02"}
    assert attributes(engine, "upper@example.test") == {"name": "Ann & Bob <b>", "tags": "a, b", "city": '{"x": 1}', "field_id": "own"}
    # Unconfirmed people of a list with single opt-in are mailed there, and here.
    assert state_of(engine, "upper@example.test") == {"open": (True, "import", at(2020, 1, 1)), "double": (False, "unconfirmed", at(2020, 1, 1))}
    assert state_of(engine, "left@example.test") == {"open": (False, "unsubscribe", at(2020, 1, 4)), "double": (True, "import", at(2020, 1, 1))}
    assert not any(subscribed for subscribed, _, _ in state_of(engine, "blocked@example.test").values())
    assert ("all", "unsubscribe") in suppressed(engine, "blocked@example.test")
    assert suppressed(engine, "dead@example.test") == {("all", "bounce")}
    assert suppressed(engine, "user6@example.test") == {("all", "complaint")}
    assert state_of(engine, "off@example.test")["open"][:2] == (False, "disabled")
    assert state_of(engine, "nowhere@example.test") == {"listmonk-without-list": (False, "disabled", at(2020, 1, 1))}
    assert consent_of(engine, "user0@example.test")["open"]["confirmed_ip"] == "192.0.2.1"
    assert report.reasons == {("Open", "address: it has no '@'"): 1}
    assert report.bounces == (3, 3)


@pytest.mark.parametrize("system", SYSTEMS)
def test_second_move_changes_nothing(engine: sa.Engine, opened: Open, system: str) -> None:
    first = running.move(engine, opened(system), NOW)
    before, rows = written(engine), everything(engine)

    second = running.move(engine, opened(system), LATER)

    assert written(engine) == before
    assert everything(engine) == rows
    assert [of_list.rows for of_list in second.lists] == [of_list.rows for of_list in first.lists]
    assert second.agrees


@pytest.mark.parametrize("system", SYSTEMS)
def test_killed_at_any_commit_and_run_again_is_the_same(
    both_engines: tuple[sa.Engine, sa.Engine], opened: Open, system: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source, "PAGE_ROWS", 500)
    whole, killed = both_engines
    running.move(whole, opened(system), NOW)
    url = killed.url.render_as_string(hide_password=False)
    killed.dispose()
    # Each time a little further than the last: pages that are in are gone through again, so every commit of the move is one of these.
    kills = [step for step in (1, 2, 3, 5, 8, 11) if killed_at(step, url, lambda own, _: running.move(own, opened(system), NOW), COMMITS)]

    report = running.move(killed, opened(system), LATER)

    assert len(kills) == 6
    assert report.agrees
    ours, theirs = everything(whole), everything(killed)
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert _comparable(ours[name]) == _comparable(theirs[name]), name


def _comparable(rows: Counter[tuple[Any, ...]]) -> Counter[tuple[Any, ...]]:
    """Two databases keep the same JSON in other words."""
    import json

    def same(value: Any) -> Any:
        return json.dumps(json.loads(value), sort_keys=True) if isinstance(value, str) and value.startswith("{") else value

    return Counter({tuple(map(same, row)): number for row, number in rows.items()})


def test_who_left_here_is_not_subscribed_by_what_is_there(engine: sa.Engine, opened: Open, tmp_path: Any) -> None:
    path = tmp_path / "people.csv"
    path.write_text("email,first_name\nuser1@example.test,Ours\nuser2@example.test,\nuser3@example.test,\nuser4@example.test,\n")
    import_file(engine, path, list_name="News & Offers", now=NOW)

    def leave(connection: sa.Connection) -> None:
        ids = {row.address: row.id for row in connection.execute(sa.select(Contact.address, Contact.id))}
        consent.unsubscribe(connection, [ids["user1@example.test"]], scope="list", scope_id=lists.get(connection, "News & Offers").id, now=NOW)
        consent.unsubscribe(connection, [ids["user2@example.test"]], scope="all", now=NOW)
        consent.erase(connection, ids["user3@example.test"], now=NOW)

    transact(engine, leave)
    report = running.move(engine, opened("interspire"), LATER)

    assert report.agrees
    assert state_of(engine, "user1@example.test")["news-offers"][:2] == (False, "unsubscribe")
    assert attributes(engine, "user1@example.test")["first_name"] == "Ours"
    assert not any(subscribed for subscribed, _, _ in state_of(engine, "user2@example.test").values())
    with reading(engine) as connection:
        assert lookup.profile(connection, "user3@example.test").contact_id is None
    assert report.lists[-1].rows["active", "erased"] == 1
    assert report.lists[-1].rows["active", "left"] == 2


@pytest.mark.parametrize("system", SYSTEMS)
def test_the_other_database_is_only_read(opened: Open, system: str) -> None:
    read = opened(system)
    with read.engine.connect() as connection, pytest.raises(sa.exc.DBAPIError, match=r"(?i)read.only"):
        connection.exec_driver_sql("CREATE TABLE ours (id INT)")


def test_wrong_database_is_named_without_its_password(mailwizz_url: str) -> None:
    with pytest.raises(MigrationError, match="expected the tables of one interspire"):
        Interspire(open_database(mailwizz_url, family="mysql"))
    with pytest.raises(MigrationError) as caught:
        open_database("mysql://someone:s3cr3t@127.0.0.1:1/nothing", family="mysql")
    assert "s3cr3t" not in str(caught.value)
    with pytest.raises(MigrationError, match="expected the URL of a postgresql database"):
        open_database(mailwizz_url, family="postgresql")
