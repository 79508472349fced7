"""A source is told what happened here: all of it, under one key each, whatever the service, the network or a kill does in between."""

from __future__ import annotations

import dataclasses
import datetime as dt
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from mail_pipelines.contacts import consent
from mail_pipelines.database import pruning
from mail_pipelines.database.engine import is_mysql, reading, transact
from mail_pipelines.database.models import (
    CampaignCounter,
    Contact,
    ContactList,
    DeliveryEvent,
    State,
    SyncDeadLetter,
    SyncOutbox,
)
from mail_pipelines.sources import feeds, forgetting, outbox, status, telling
from mail_pipelines.sources.declaration import Source
from mail_pipelines.sources.errors import SourceError
from mail_pipelines.sources.running import Report
from tests.parts.kills import killed_throughout
from tests.sources.conftest import PEOPLE, Declare, engaged, ids, subscribed
from tests.sources.crm import TOKEN, Crm, body, person, serving

pytestmark = pytest.mark.slow
Sync = Callable[..., Report]
SEND = {
    "path": "events/batch",
    "batch": 5,
    "items": "events",
    "body": {"id": "key", "contact.id": "external_id", "contact.email": "email", "type": "kind", "at": "occurred_at", "why": "reason", "list": "list"},
    "constants": {"contact.source": "mail"},
    "key_header": "Idempotency-Key",
}
READ = {"path": "contacts", "records": "data", "paging": {"type": "cursor", "cursor_path": "paging.next", "cursor_param": "after"}}
ALL = ["opens", "clicks", "bounces", "unsubscribes", "suppressions"]


@pytest.fixture
def crm(monkeypatch: pytest.MonkeyPatch) -> Iterator[Crm]:
    monkeypatch.setenv("CRM_TOKEN", TOKEN)
    with serving(Crm([person(number) for number in range(PEOPLE)])) as running:
        yield running


Declared = Callable[..., Source]


@pytest.fixture
def declared(declare: Declare, crm: Crm) -> Declared:
    """`declared(what=…, unknown=…, send={…}, suppressions={…})`: the CRM, which is read and told."""

    def write(*, send: dict[str, Any] | None = None, suppressions: dict[str, Any] | None = None, **write_back: Any) -> Source:
        more = {"suppressions": suppressions} if suppressions else {}
        return declare(
            kind="rest",
            connection={"url": crm.url, "auth": {"type": "bearer", "token_env": "CRM_TOKEN"}, "first_wait_seconds": 0.01},
            contacts={"read": READ, "map": {"id": "external_id", "properties.mail": "email"}},
            write_back={"what": ALL, "send": {**SEND, **(send or {})}, **write_back},
            **more,
        )

    return write


def bounced(engine: sa.Engine, address: str, number: int, campaign_id: int = 7) -> None:
    now = dt.datetime.now(dt.UTC)
    event = {"month": int(f"{now:%Y%m}"), "id": number, "occurred_at": now, "campaign_id": campaign_id, "contact_id": ids(engine)[address], "attempt": 1}
    counter = {"campaign_id": campaign_id, "shard": 0, "provider": "other", "server_id": number, "state": State.BOUNCED, "count": 1}

    def work(connection: sa.Connection) -> None:
        connection.execute(sa.insert(DeliveryEvent), [event | {"kind": "bounced", "code": 550, "enhanced": "5.1.1", "reason": "no_mailbox"}])
        connection.execute(sa.insert(CampaignCounter), [counter])

    transact(engine, work)


def unsubscribe(engine: sa.Engine, address: str) -> None:
    def work(connection: sa.Connection) -> None:
        list_id = connection.execute(sa.select(ContactList.id).where(ContactList.key == "news")).scalar_one()
        consent.unsubscribe(connection, [ids(engine)[address]], scope="list", scope_id=list_id, now=dt.datetime.now(dt.UTC))

    transact(engine, work)


def make_due(engine: sa.Engine) -> None:
    """As if the wait of what was put off were over."""
    transact(engine, lambda connection: connection.execute(sa.update(SyncOutbox).values(due_at=dt.datetime(2026, 1, 1, tzinfo=dt.UTC))))


def states(engine: sa.Engine) -> dict[int, int]:
    with reading(engine) as connection:
        return dict(connection.execute(sa.select(SyncOutbox.state, sa.func.count()).group_by(SyncOutbox.state)).tuples().all())


def dead(engine: sa.Engine) -> dict[int, tuple[str, int]]:
    with reading(engine) as connection:
        query = sa.select(SyncDeadLetter.event_id, SyncDeadLetter.reason, SyncDeadLetter.attempts)
        return {number: (reason, attempts) for number, reason, attempts in connection.execute(query).tuples()}


def test_everything_is_told_once_and_then_only_what_is_new(engine: sa.Engine, home: Path, crm: Crm, declared: Declared, sync: Sync) -> None:
    source = declared()
    sync(source)
    engaged(engine, range(1, 9))
    engaged(engine, range(20, 23), "click")
    engaged(engine, range(30, 40), machine=True)
    bounced(engine, "p2@example.test", 1)
    unsubscribe(engine, "p3@example.test")
    transact(engine, lambda connection: consent.suppress_domain(connection, "nowhere.test", reason="manual", now=dt.datetime.now(dt.UTC)))
    report = telling.run(engine, home, source)
    kinds = sorted(event["type"] for event in crm.events.values())
    assert kinds == sorted(["open"] * 8 + ["click"] * 3 + ["bounce", "unsubscribe", "suppression"])
    assert (report.counts["pushed"], report.standing, report.lag_seconds) == (14, outbox.Standing(0, 0, None), 0.0)
    assert [len(keys) for keys in crm.received] == [5, 5, 4]
    bounce = crm.events["bounce-1"]
    assert bounce["contact"] == {"id": "2", "email": "p2@example.test", "source": "mail"}
    assert bounce["why"] == "no_mailbox"
    assert dt.datetime.fromisoformat(bounce["at"]).tzinfo is not None
    assert {(event["contact"]["id"], event["list"]) for event in crm.events.values() if event["type"] == "unsubscribe"} == {("3", "news")}
    assert telling.run(engine, home, source).counts.get("pushed", 0) == 0
    assert crm.posts == 3
    engaged(engine, range(50, 51))
    bounced(engine, "p4@example.test", 2)
    telling.run(engine, home, source)
    assert crm.received[3:] == [["open-50", "bounce-2"]] or crm.received[3:] == [["bounce-2", "open-50"]]
    assert status.read(engine, "crm", "engagement").counts["pushed"] == 2


def test_what_is_committed_late_is_told_and_what_was_told_is_forgotten_in_time(engine: sa.Engine, home: Path, crm: Crm, declared: Declared, sync: Sync) -> None:
    source = declared(what=["opens"])
    sync(source)
    long_ago = dt.datetime.now(dt.UTC) - dt.timedelta(hours=2)
    engaged(engine, range(1, 4), recorded_at=long_ago)
    telling.run(engine, home, source)
    engaged(engine, range(10, 11), recorded_at=dt.datetime.now(dt.UTC) - dt.timedelta(minutes=10))
    telling.run(engine, home, source)
    telling.run(engine, home, source)
    assert crm.received == [["open-1", "open-2", "open-3"], ["open-10"]]
    assert forgetting.prune(engine, dt.datetime.now(dt.UTC)) == {"sync_outbox": 3, "sync_dead_letters": 0}
    telling.run(engine, home, source)
    assert (states(engine), crm.posts) == ({outbox.TOLD: 1}, 2)


def test_people_it_does_not_know_are_left_out_or_made(engine: sa.Engine, home: Path, crm: Crm, declared: Declared, sync: Sync) -> None:
    source = declared(what=["opens", "suppressions"])
    sync(source)
    now = dt.datetime.now(dt.UTC)
    stranger = {"email": "new@other.test", "address": "new@other.test", "address_hash": b"x" * 16, "domain": "other.test", "provider": "other"}
    row = stranger | {"attributes": {}, "created_at": now, "updated_at": now}
    transact(engine, lambda connection: connection.execute(sa.insert(Contact), [row]))
    engaged(engine, range(1, 2), who="new@other.test")
    engaged(engine, range(2, 3))
    report = telling.run(engine, home, source)
    assert (report.counts["pushed"], report.counts["unknown"]) == (1, 1)
    telling.run(engine, home, declared(what=["opens"], unknown="create"))
    assert crm.events["open-1"]["contact"] == {"id": None, "email": "new@other.test", "source": "mail"}


def test_what_the_source_said_itself_is_not_told_to_it(engine: sa.Engine, home: Path, crm: Crm, declared: Declared, sync: Sync) -> None:
    left = [{"who": "p5@example.test"}, {"who": "p6@example.test"}]
    crm.before = lambda number, query: (200, {}, body(left, None)) if query.get("what") == "left" else None
    reads = {"read": {"path": "left", "records": "data", "params": {"what": "left"}, "paging": {"type": "single_page"}}, "map": {"who": "email"}}
    source = declared(suppressions={**reads, "scope": "list News"})
    sync(source)
    sync(source, section="suppressions")
    assert len(subscribed(engine)) == PEOPLE - 2
    unsubscribe(engine, "p7@example.test")
    telling.run(engine, home, source)
    assert {(event["type"], event["contact"]["id"]) for event in crm.events.values()} == {("unsubscribe", "7"), ("suppression", "7")}


def test_a_busy_service_is_asked_again_and_one_that_stays_away_later(engine: sa.Engine, home: Path, crm: Crm, declared: Declared, sync: Sync) -> None:
    source = declared(what=["opens"])
    sync(source)
    engaged(engine, range(1, 13))
    troubles: dict[int, Any] = {1: (429, {"Retry-After": "0"}, b"slow down"), 3: (500, {}, b"oops")}
    crm.at_post = lambda number, events: troubles.get(number)
    assert telling.run(engine, home, source).counts["pushed"] == 12
    assert [len(keys) for keys in crm.received] == [5, 5, 2]
    # What was asked again had the key of the first time.
    keys = [headers["Idempotency-Key"] for headers in crm.headers]
    assert keys[0] == keys[1]
    assert keys[2] == keys[3]
    assert len(set(keys)) == 3
    engaged(engine, range(20, 22))
    crm.at_post = lambda number, events: (500, {}, b"oops")
    with pytest.raises(SourceError, match="status 500"):
        telling.run(engine, home, source)
    standing = status.read(engine, "crm", "engagement")
    assert "status 500" in (standing.error or "")
    crm.at_post = None
    # Not before its time.
    assert telling.run(engine, home, source).standing.waiting == 2
    make_due(engine)
    assert telling.run(engine, home, source).counts["pushed"] == 2
    assert status.read(engine, "crm", "engagement").error is None
    assert dead(engine) == {}


def test_what_is_never_taken_ends_in_the_dead_letters_and_holds_up_nothing(
    engine: sa.Engine, home: Path, crm: Crm, declared: Declared, sync: Sync, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outbox, "MOST_ATTEMPTS", 4)
    source = declared(what=["opens"])
    sync(source)
    engaged(engine, range(1, 4))
    crm.at_post = lambda number, events: (500, {}, b"oops") if any(event["id"] == "open-2" for event in events) else None
    for _ in range(2):
        with pytest.raises(SourceError):
            telling.run(engine, home, source)
        make_due(engine)
    assert crm.received == []
    for _ in range(2):
        # Alone from now on, so the others are told.
        with pytest.raises(SourceError):
            telling.run(engine, home, source)
        make_due(engine)
    assert telling.run(engine, home, source).standing == outbox.Standing(0, 1, None)
    assert sorted(crm.events) == ["open-1", "open-3"]
    assert dead(engine)[2][1] == 4


def test_one_that_is_refused_costs_none_of_its_batch(engine: sa.Engine, home: Path, crm: Crm, declared: Declared, sync: Sync) -> None:
    source = declared(what=["opens"])
    sync(source)
    engaged(engine, range(1, 11))
    said = b'{"error": "p3@example.test is no contact"}'
    crm.at_post = lambda number, events: (422, {}, said) if any(event["id"] == "open-3" for event in events) else None
    report = telling.run(engine, home, source)
    assert (report.counts["pushed"], report.counts["dead"], report.standing.dead) == (9, 1, 1)
    assert sorted(crm.events) == sorted(f"open-{number}" for number in range(1, 11) if number != 3)
    reason, attempts = dead(engine)[3]
    assert reason.startswith("status 422")
    assert "p3@" not in reason
    assert attempts == 1
    telling.run(engine, home, source)
    assert "open-3" not in crm.events
    crm.at_post = None
    assert transact(engine, lambda connection: outbox.retry(connection, "crm")) == 1
    telling.run(engine, home, source)
    assert "open-3" in crm.events
    assert dead(engine) == {}
    assert states(engine) == {outbox.TOLD: 10}


def test_an_answer_may_say_of_each_what_became_of_it(engine: sa.Engine, home: Path, crm: Crm, declared: Declared, sync: Sync) -> None:
    source = declared(what=["opens"], send={"batch": 10, "results": {"path": "outcome.each", "key": "id", "status": "code"}})
    sync(source)
    engaged(engine, range(1, 6))
    codes = {"open-1": 200, "open-2": 400, "open-3": 429, "open-4": 201}

    def answer(number: int, events: list[dict[str, Any]]) -> Any:
        each = [{"id": event["id"], "code": codes[event["id"]]} for event in events if event["id"] in codes]
        return 207, {}, json.dumps({"outcome": {"each": each}}).encode()

    crm.at_post = answer
    report = telling.run(engine, home, source)
    assert {name: count for name, count in report.counts.items() if count} == {"taken_up": 5, "pushed": 2, "dead": 1, "retried": 2}
    assert (report.standing.waiting, dead(engine)) == (2, {2: ("status 400", 1)})


@pytest.mark.parametrize(("code", "words"), [(401, "refuses the login"), (404, "status 404"), (302, "status 302")])
def test_what_is_wrong_with_the_request_kills_no_event(engine: sa.Engine, home: Path, crm: Crm, declared: Declared, sync: Sync, code: int, words: str) -> None:
    source = declared(what=["opens"])
    sync(source)
    engaged(engine, range(1, 7))
    crm.at_post = lambda number, events: (code, {"Location": "/elsewhere"}, b"")
    with pytest.raises(SourceError, match=words):
        telling.run(engine, home, source)
    assert (crm.posts, states(engine), dead(engine)) == (1, {outbox.WAITING: 6}, {})


def test_where_all_are_refused_the_run_stops(engine: sa.Engine, home: Path, crm: Crm, declared: Declared, sync: Sync) -> None:
    source = declared(what=["opens"])
    sync(source)
    engaged(engine, range(1, 61))
    crm.at_post = lambda number, events: (400, {}, b"no such field")
    with pytest.raises(SourceError, match=r"check write_back\.send"):
        telling.run(engine, home, source)
    assert states(engine) == {outbox.WAITING: 60 - telling.REFUSED_IN_A_ROW, outbox.DEAD: telling.REFUSED_IN_A_ROW}


def test_somebody_who_was_erased_is_not_told_of(engine: sa.Engine, home: Path, crm: Crm, declared: Declared, sync: Sync) -> None:
    source = declared(what=["opens"])
    sync(source)
    engaged(engine, range(1, 4))
    crm.at_post = lambda number, events: (503, {}, b"")
    with pytest.raises(SourceError):
        telling.run(engine, home, source)
    crm.at_post = None
    assert transact(engine, lambda connection: consent.erase(connection, ids(engine)["p2@example.test"], now=dt.datetime.now(dt.UTC)))
    make_due(engine)
    telling.run(engine, home, source)
    assert sorted(crm.events) == ["open-1", "open-3"]
    assert states(engine) == {outbox.TOLD: 2}


def test_killed_at_one_commit_after_the_other_each_event_counts_once(
    engine: sa.Engine, home: Path, crm: Crm, declared: Declared, sync: Sync, monkeypatch: pytest.MonkeyPatch
) -> None:
    # So that the events of one feed are taken up in several transactions.
    monkeypatch.setattr(telling, "CHUNK_ROWS", 5)
    source = declared()
    sync(source)
    engaged(engine, range(1, 13))
    bounced(engine, "p2@example.test", 1)
    unsubscribe(engine, "p3@example.test")
    url = engine.url.render_as_string(hide_password=False)
    assert killed_throughout(url, lambda own: telling.run(own, home, source), 40) > 3
    telling.run(engine, home, source)
    sent = [key for keys in crm.received for key in keys]
    # Killed between sending and noting it: the service got some keys twice, and has each once.
    assert len(sent) > len(set(sent))
    assert len(crm.events) == len(set(sent)) == 15
    assert states(engine) == {outbox.TOLD: 15}


def test_what_is_told_is_spelled_as_it_was_and_found_without_sorting(engine: sa.Engine, home: Path, crm: Crm, declared: Declared, sync: Sync) -> None:
    """Facts are put together by the database."""
    source = declared(what=["bounces", "suppressions"])
    sync(source)
    bounced(engine, "p2@example.test", 1)
    words = "\"550\\5.1.1\" <ünbekannt>,\n\tno\u2028 such \N{GRINNING FACE} 'user'"
    transact(engine, lambda connection: connection.execute(sa.update(DeliveryEvent).values(text=words, enhanced=None)))
    unsubscribe(engine, "p3@example.test")
    crm.at_post = lambda number, events: (503, {}, b"")
    with pytest.raises(SourceError):
        telling.run(engine, home, source)
    with reading(engine) as connection:
        facts = dict(connection.execute(sa.select(SyncOutbox.kind, SyncOutbox.facts)).tuples().all())
        plans: list[str] = []

        def explain(_connection: object, cursor: Any, statement: str, parameters: Any, *_rest: object) -> None:
            cursor.execute(f"EXPLAIN {'' if is_mysql(engine) else 'QUERY PLAN '}{statement}", parameters)
            plans.extend(str(row) for row in cursor.fetchall())

        sa.event.listen(engine, "before_cursor_execute", explain)
        outbox.due(connection, "crm", dt.datetime.now(dt.UTC), 100)
        sa.event.remove(engine, "before_cursor_execute", explain)
    assert facts["bounce"] == {"campaign": None, "code": 550, "enhanced": None, "reason": "no_mailbox", "text": words}
    assert facts["suppression"] == {"reason": "unsubscribe", "scope": "list news", "list": "news"}
    assert plans
    assert not [plan for plan in plans if "filesort" in plan or "TEMP B-TREE" in plan]


def test_dead_letters_are_given_up_in_time_but_what_was_refused_is_not_told_again(
    engine: sa.Engine, home: Path, crm: Crm, declared: Declared, sync: Sync, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pruning, "CHUNK_ROWS", 3)
    source = declared(what=["opens", "unsubscribes"])
    sync(source)
    long_ago = dt.datetime.now(dt.UTC) - dt.timedelta(hours=2)
    engaged(engine, range(1, 9), recorded_at=long_ago)
    unsubscribe(engine, "p3@example.test")
    crm.at_post = lambda number, events: (422, {}, b"no")
    telling.run(engine, home, source)
    assert len(dead(engine)) == 9
    now = dt.datetime.now(dt.UTC)
    assert forgetting.prune(engine, now + forgetting.KEEP_DEAD_LETTERS - dt.timedelta(hours=1)) == {"sync_outbox": 0, "sync_dead_letters": 0}
    url, later = engine.url.render_as_string(hide_password=False), now + forgetting.KEEP_DEAD_LETTERS + dt.timedelta(hours=1)
    engine.dispose()
    assert killed_throughout(url, lambda own: forgetting.prune(own, later), 20) > 2
    assert (dead(engine), states(engine)) == ({}, {outbox.DEAD: 1})
    position = status.position(engine, "crm", "unsubscribes")
    assert position.whole_at is not None
    status.move(engine, "crm", "unsubscribes", dataclasses.replace(position, whole_at=position.whole_at - feeds.WHOLE_EACH))
    crm.at_post = None
    telling.run(engine, home, source)
    assert crm.events == {}


def test_a_database_is_told_by_rows(engine: sa.Engine, home: Path, database_there: tuple[Source, sa.Engine], sync: Sync) -> None:
    source, there = database_there
    sync(source)
    engaged(engine, range(1, 11))
    engaged(engine, range(20, 21), "click")
    report = telling.run(engine, home, source)
    assert (report.counts["pushed"], report.counts["dead"]) == (10, 1)
    # As if nothing had been noted: what is there stays as it is.
    transact(engine, lambda connection: connection.execute(sa.update(SyncOutbox).where(SyncOutbox.state == outbox.TOLD).values(state=outbox.WAITING)))
    assert telling.run(engine, home, source).counts["pushed"] == 10
    with there.connect() as connection:
        rows = connection.exec_driver_sql("SELECT event, person, what, at FROM happened ORDER BY event").all()
    assert [row[0] for row in rows] == sorted(f"open-{number}" for number in range(1, 11))
    assert rows[0][1:3] == ("1", "open")
    assert abs(dt.datetime.fromisoformat(rows[0][3]).replace(tzinfo=dt.UTC) - dt.datetime.now(dt.UTC)) < dt.timedelta(hours=1)
