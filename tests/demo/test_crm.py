"""The demo's CRM: the same on every machine, read in pages while it changes, told everything once, and only by whoever has its token."""

from __future__ import annotations

import datetime as dt
import json
import random
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from mail_pipelines.demo.crm import Crm
from mail_pipelines.demo.crm_server import make_server
from mail_pipelines.demo.people import make_person

TOKEN = "the-crm-s-own"


def make(people: int = 40, strangers: int = 60) -> Crm:
    draws = random.Random(1), random.Random(2)
    return Crm([make_person(draws[0], 1_000 + number) for number in range(people)], (make_person(draws[1], number) for number in range(strangers)))


Ask = Callable[..., Any]


@pytest.fixture
def crm() -> Crm:
    return make()


@pytest.fixture
def ask(crm: Crm) -> Iterator[Ask]:
    """`ask("/v1/counts")`, `ask("/v1/events/batch", {…}, key=…)`: the status and what was answered."""
    server = make_server(crm, TOKEN)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()

    def run(path: str, told: Any = None, *, key: str = "", token: str = TOKEN, method: str | None = None) -> tuple[int, Any]:
        headers = {"Authorization": f"Bearer {token}", **({"Idempotency-Key": key} if key else {})}
        body = None if told is None else told if isinstance(told, bytes) else json.dumps(told).encode()
        request = urllib.request.Request(f"http://127.0.0.1:{server.server_port}{path}", body, headers, method=method)
        try:
            with urllib.request.urlopen(request, timeout=60) as reply:
                content = reply.read().decode()
                return reply.status, json.loads(content) if reply.headers["Content-Type"] == "application/json" else content
        except urllib.error.HTTPError as error:
            return error.code, json.loads(error.read())

    try:
        yield run
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def known(crm: Crm) -> list[dict[str, Any]]:
    times = {"newsletter_at", "updated_at"}
    return [{name: value for name, value in row.items() if name not in times} for row in crm.contacts({})["results"]]


def event(number: int, contact: int, kind: str = "open", **more: Any) -> dict[str, Any]:
    return {"id": f"{kind}-{number}", "type": kind, "contact": str(contact), **more}


def test_the_same_happens_in_each_whatever_it_was_told(crm: Crm) -> None:
    other = make()
    other.take([event(number, number, "unsubscribe") for number in range(1, 11)], None)
    for _ in range(200):
        crm.change()
        other.change()
    assert all(count > 5 for count in crm.counts()["changes"].values())
    fixed = ("id", "email", "city", "orders", "deleted")
    assert sorted(tuple(row[name] for name in fixed) for row in known(crm)) == sorted(tuple(row[name] for name in fixed) for row in known(other))


def test_whoever_changes_between_two_pages_is_in_a_later_one(crm: Crm, ask: Ask) -> None:
    rows: dict[int, dict[str, Any]] = {}
    after, pages = 0, 0
    while after is not None:
        status, page = ask(f"/v1/contacts?limit=7&after={after}")
        assert status == 200
        assert 0 < len(page["results"]) <= 7
        rows |= {row["id"]: row for row in page["results"]}
        after, pages = page["paging"]["next"], pages + 1
        if pages < 10:
            crm.change()
    # A stamp with an offset, as the source's cursor sends it.
    since = max(row["updated_at"] for row in rows.values()).replace("+", "%2B")
    rows |= {row["id"]: row for row in ask(f"/v1/contacts?updated_after={since}")[1]["results"]}
    assert sorted(map(str, rows.values())) == sorted(map(str, crm.contacts({})["results"]))
    assert len(ask(f"/v1/contacts?updated_after={since}")[1]["results"]) < 5


def test_an_event_counts_once_and_lets_go_who_wants_no_more_mail_of_its_list(crm: Crm, ask: Ask) -> None:
    first = [row["id"] for row in known(crm) if row["newsletter"]]
    before = crm.counts()
    told = {
        "events": [
            event(1, first[0]),
            event(2, first[1], "unsubscribe", list="crm"),
            event(3, first[2], "suppression", reason="bounce"),
            event(4, first[3], "unsubscribe", list="news"),
        ]
    }
    assert ask("/v1/events/batch", told, key="a") == (200, {"taken": 4, "known": 0})
    assert ask("/v1/events/batch", told, key="a") == (200, {"taken": 4, "known": 0})
    assert ask("/v1/events/batch", told, key="b") == (200, {"taken": 0, "known": 4})
    counts = ask("/v1/counts")[1]
    assert counts["events"] == {"open": 1, "suppression": 1, "unsubscribe": 2}
    assert (counts["repeated"], counts["subscribed"]) == (8, before["subscribed"] - 2)
    left = ask("/v1/unsubscribed")[1]["results"]
    assert [(row["id"], row["reason"]) for row in left] == [(first[1], "unsubscribe"), (first[2], "bounce")]
    assert dt.datetime.fromisoformat(left[0]["updated_at"]).tzinfo is not None
    for wrong in (b"{", {"events": [{"id": "open-9", "type": "open"}]}, [1]):
        assert ask("/v1/events/batch", wrong)[0] == 422
    assert ask("/v1/counts")[1] == counts


def test_nothing_changes_while_it_holds_still_and_nobody_is_named_on_its_page(crm: Crm, ask: Ask) -> None:
    assert ask("/v1/changing", {"changing": False}, method="PUT")[0] == 200
    before = known(crm)
    for _ in range(20):
        crm.change()
    assert known(crm) == before
    status, page = ask("/", token="none")
    assert status == 200
    assert "holds still" in page
    assert "<td>people</td><td>40</td>" in page
    assert not [row for row in before if row["email"] in page or row["last_name"] in page]
    ask("/v1/changing", {"changing": True}, method="PUT")
    for _ in range(20):
        crm.change()
    assert known(crm) != before


@pytest.mark.parametrize(("path", "told", "method"), [("/v1/contacts", None, None), ("/v1/events/batch", {"events": []}, None), ("/v1/changing", {}, "PUT")])
def test_without_the_token_it_says_and_takes_nothing(ask: Ask, path: str, told: Any, method: str | None) -> None:
    assert ask(path, told, token="guessed", method=method) == (401, {"error": "the token is wrong"})
    assert ask("/v1/nothing")[0] == 404
