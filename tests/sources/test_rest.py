"""REST sources against a CRM that does everything wrong: nothing is lost, nobody is subscribed again, and every failure is named."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import sqlalchemy as sa

from mail_pipelines.contacts import consent
from mail_pipelines.database.engine import reading, transact
from mail_pipelines.database.models import Contact
from mail_pipelines.sources import status
from mail_pipelines.sources.declaration import Source
from mail_pipelines.sources.errors import GuardStopped, SourceError
from mail_pipelines.sources.running import Report
from tests.sources.conftest import Declare, contacts, subscribed
from tests.sources.crm import TOKEN, Crm, body, person, serving

pytestmark = pytest.mark.slow
Sync = Callable[..., Report]
MAP = {"id": "external_id", "properties.mail": "email", "properties.name": "first_name", "properties.age": "age", "updated_at": "changed_at"}


@pytest.fixture
def crm(monkeypatch: pytest.MonkeyPatch) -> Iterator[Crm]:
    monkeypatch.setenv("CRM_TOKEN", TOKEN)
    with serving(Crm([person(number) for number in range(120)])) as running:
        yield running


@pytest.fixture
def source(declare: Declare, crm: Crm) -> Source:
    return declare(
        kind="rest",
        connection={"url": crm.url, "auth": {"type": "bearer", "token_env": "CRM_TOKEN"}, "first_wait_seconds": 0.01},
        contacts={
            "read": {
                "path": "contacts",
                "records": "data",
                "paging": {"type": "cursor", "cursor_path": "paging.next", "cursor_param": "after"},
                "since_param": "updated_after",
                "max_pages": 200,
            },
            "map": MAP,
            "cursor": "updated_at",
            "types": {"age": "number"},
        },
    )


def standing(engine: sa.Engine) -> status.Standing:
    return status.read(engine, "crm", "contacts")


def test_pages_are_followed_and_then_only_what_changed_is_asked_for(engine: sa.Engine, crm: Crm, source: Source, sync: Sync) -> None:
    first = sync(source)
    assert len(crm.requests) == 3
    assert first.standing.counts["inserted"] == 120
    assert first.standing.cursor == "2026-01-01T00:00:00Z"
    assert contacts(engine)["p7@example.test"] == {"first_name": "P 7", "age": 7}
    crm.contacts[5] = person(5, "2026-02-03T04:05:06Z", properties={"mail": "p5@example.test", "name": "New", "age": 6})
    crm.requests.clear()
    crm.contacts = [row for row in crm.contacts if row["id"] != 9]
    for row in crm.contacts:
        row["updated_at"] = max(row["updated_at"], "2025-12-31T00:00:00Z") if row["id"] == 5 else "2025-12-31T00:00:00Z"
    second = sync(source)
    assert crm.requests == [{"updated_after": "2025-12-31T23:55:00Z"}]
    assert second.standing.counts["read"] == second.standing.counts["updated"] == 1
    assert second.standing.cursor == "2026-02-03T04:05:06Z"
    assert contacts(engine)["p5@example.test"]["first_name"] == "New"
    # What was deleted shows when everything is read again.
    assert len(subscribed(engine)) == 120
    assert sync(source, whole=True).ended == 1
    assert "p9@example.test" not in subscribed(engine)


def test_a_server_that_is_busy_or_broken_for_a_moment_is_asked_again(engine: sa.Engine, crm: Crm, source: Source, sync: Sync) -> None:
    troubles: dict[int, Any] = {2: (429, {"Retry-After": "0"}, b"slow down"), 3: (500, {}, b"oops"), 5: (503, {}, b"")}
    crm.before = lambda number, query: troubles.get(number)
    report = sync(source)
    assert report.standing.counts["inserted"] == 120
    assert [query.get("after", "0") for query in crm.requests] == ["0", "50", "50", "50", "100", "100"]


def test_a_500_that_stays_loses_nothing_and_says_why(engine: sa.Engine, crm: Crm, source: Source, sync: Sync) -> None:
    sync(source)
    good = standing(engine)
    crm.before = lambda number, query: (500, {}, b"oops") if query.get("after") == "50" else None
    for row in crm.contacts:
        row["updated_at"] = "2026-03-01T00:00:00Z"
    with pytest.raises(SourceError, match="status 500"):
        sync(source)
    failed = standing(engine)
    assert (failed.cursor, failed.good_at, failed.counts) == (good.cursor, good.good_at, good.counts)
    assert "status 500" in (failed.error or "")
    assert len(subscribed(engine)) == 120
    crm.before = None
    assert sync(source).standing.error is None


def test_a_token_that_expires_in_the_middle_is_named_and_shown_nowhere(engine: sa.Engine, crm: Crm, source: Source, sync: Sync) -> None:
    crm.before = lambda number, query: (401, {}, b"expired") if number == 2 else None
    with pytest.raises(SourceError, match="token is wrong or has expired") as caught:
        sync(source)
    assert TOKEN not in str(caught.value)
    assert contacts(engine) == {}
    assert sync(source).standing.counts["inserted"] == 120


def test_a_token_that_is_not_set_is_named(engine: sa.Engine, crm: Crm, source: Source, sync: Sync, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CRM_TOKEN")
    with pytest.raises(SourceError, match="CRM_TOKEN is not set"):
        sync(source)


@pytest.mark.parametrize("way", ["same page", "circle", "nothing", "numbers", "one answer"])
def test_what_never_ends_is_ended(engine: sa.Engine, crm: Crm, source: Source, sync: Sync, monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    from mail_pipelines.sources.kinds import http

    sync(source)
    if way == "same page":
        crm.before = lambda number, query: (200, {}, body(crm.contacts[:3], "0"))
    elif way == "circle":
        # With the time in it, no answer is ever the same.
        crm.before = lambda number, query: (200, {}, body(crm.contacts[number % 3 :: 3], str(number)))
    elif way == "nothing":
        crm.before = lambda number, query: (200, {}, body([], "0"))
    elif way == "numbers":
        crm.before = lambda number, query: (200, {}, body([person(number)], str(number)))
    else:
        monkeypatch.setattr(http.PatientSession.__init__, "__kwdefaults__", http.PatientSession.__init__.__kwdefaults__ | {"most_bytes": 1000})
    words = {"numbers": "more than 200 pages", "one answer": "does not end"}
    with pytest.raises(SourceError, match=words.get(way, "goes round in a circle")):
        sync(source, whole=True)
    assert len(subscribed(engine)) == 120


def test_an_answer_without_anybody_deletes_nobody(engine: sa.Engine, crm: Crm, source: Source, sync: Sync) -> None:
    sync(source)
    crm.contacts = []
    with pytest.raises(GuardStopped, match="120 of 120 records are gone"):
        sync(source, whole=True)
    assert len(subscribed(engine)) == 120


def test_a_cursor_that_goes_back_is_noticed_and_nothing_is_lost(engine: sa.Engine, crm: Crm, source: Source, sync: Sync) -> None:
    sync(source)
    # Restored from a backup: what changes now is older than the cursor, and the filter is not kept.
    old = person(200, "2025-06-01T00:00:00Z")
    crm.before = lambda number, query: (200, {}, body([old], None)) if "updated_after" in query else None
    report = sync(source)
    assert report.standing.note is not None
    assert "everything is read in the next run" in report.standing.note
    assert "p200@example.test" in contacts(engine)
    assert report.standing.cursor == "2026-01-01T00:00:00Z"
    crm.contacts = [person(number, "2025-06-02T00:00:00Z") for number in range(120)] + [old]
    restored = sync(source)
    assert restored.standing.cursor == "2025-06-02T00:00:00Z"
    assert "went back" in (restored.standing.note or "")
    assert len(subscribed(engine)) == 121


def test_a_field_that_changes_its_type_is_named_row_by_row(engine: sa.Engine, crm: Crm, source: Source, sync: Sync) -> None:
    sync(source)
    for row in crm.contacts[:100]:
        row["properties"]["age"] = "forty"
        row["updated_at"] = "2026-02-01T00:00:00Z"
    report = sync(source)
    assert report.standing.rejected == {"column 'properties.age': not a number (like 12 or -3.5)": 100}
    assert report.standing.counts["unchanged"] == 20
    assert contacts(engine)["p7@example.test"]["age"] == 7
    assert len(subscribed(engine)) == 120
    # The rejected rows are there, so they are not gone.
    assert sync(source, whole=True).ended == 0


def test_a_column_that_vanishes_is_an_error_only_if_it_has_the_addresses(engine: sa.Engine, crm: Crm, source: Source, sync: Sync) -> None:
    sync(source)
    for row in crm.contacts:
        del row["properties"]["name"]
    assert sync(source, whole=True).standing.counts["unchanged"] == 120
    for row in crm.contacts:
        row["properties"] = {"e_mail": row["properties"]["mail"]}
    with pytest.raises(SourceError, match=r"no column 'properties\.mail' any more"):
        sync(source, whole=True)
    assert len(subscribed(engine)) == 120


def test_a_tenth_of_bad_addresses_and_keys_twice_in_a_page(engine: sa.Engine, crm: Crm, source: Source, sync: Sync) -> None:
    for row in crm.contacts[::10]:
        row["properties"]["mail"] = "nobody at example.test"
    crm.contacts[2:2] = [person(3, "2026-01-02T00:00:00Z", properties={"mail": "p3@example.test", "name": "Newest", "age": 3}), person(3)]
    report = sync(source)
    counts = report.standing.counts
    assert report.standing.rejected == {"address: it has no '@'": 12}
    assert (counts["read"], counts["inserted"], counts["duplicates"]) == (122, 108, 2)
    assert contacts(engine)["p3@example.test"]["first_name"] == "Newest"


def test_whoever_left_meanwhile_stays_away(engine: sa.Engine, crm: Crm, source: Source, sync: Sync) -> None:
    sync(source)
    with reading(engine) as connection:
        ids = connection.execute(sa.select(Contact.id).order_by(Contact.id).limit(40)).scalars().all()
    transact(engine, lambda connection: consent.unsubscribe(connection, ids, scope="all", now=_now()))
    for row in crm.contacts:
        row["properties"]["mail"] = row["properties"]["mail"].upper()
        row["updated_at"] = "2026-04-01T00:00:00Z"
    sync(source)
    sync(source, whole=True)
    assert len(subscribed(engine)) == 80


def _now() -> Any:
    import datetime as dt

    return dt.datetime.now(dt.UTC)
