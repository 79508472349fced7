"""A small CRM over HTTP: pages by cursor, a token, and everything that such a server may do wrong, on demand."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from tests.parts import web
from tests.parts.web import Answer, Asked

TOKEN = "crm-token-that-no-log-shows"


@dataclass
class Crm:
    """`contacts` are served in pages of `page_size`, those changed since `updated_after` if that is asked. `before` may answer in the CRM's place.

    It is told events by POST, and keeps each under its key once. `received` has the keys of every request that it took, `at_post` may answer in its place
    (given the number of the request and the events).
    """

    contacts: list[dict[str, Any]]
    page_size: int = 50
    token: str = TOKEN
    before: Callable[[int, dict[str, str]], Answer | None] | None = None
    requests: list[dict[str, str]] = field(default_factory=list)
    url: str = ""
    at_post: Callable[[int, list[dict[str, Any]]], Answer | None] | None = None
    events: dict[str, dict[str, Any]] = field(default_factory=dict)
    received: list[list[str]] = field(default_factory=list)
    posts: int = 0
    headers: list[dict[str, str]] = field(default_factory=list)

    def take(self, content: bytes, login: str | None, headers: dict[str, str]) -> Answer:
        self.posts += 1
        self.headers.append(headers)
        events = json.loads(content)["events"]
        if login != f"Bearer {self.token}":
            return 401, {}, b'{"error": "token"}'
        if self.at_post and (given := self.at_post(self.posts, events)) is not None:
            return given
        self.keep(events)
        return 200, {}, b"{}"

    def keep(self, events: list[dict[str, Any]]) -> None:
        self.received.append([event["id"] for event in events])
        for event in events:
            self.events.setdefault(event["id"], event)

    def answer(self, query: dict[str, str], login: str | None) -> Answer:
        self.requests.append(query)
        if self.before and (given := self.before(len(self.requests), query)) is not None:
            return given
        if login != f"Bearer {self.token}":
            return 401, {}, b'{"error": "token"}'
        chosen = [row for row in self.contacts if "updated_after" not in query or row["updated_at"] >= query["updated_after"]]
        start = int(query.get("after", "0"))
        page = chosen[start : start + self.page_size]
        following = start + self.page_size
        return 200, {}, body(page, str(following) if following < len(chosen) else None)


def body(page: list[dict[str, Any]], following: str | None) -> bytes:
    return json.dumps({"data": page, "paging": {"next": following}}).encode()


@contextmanager
def serving(crm: Crm) -> Iterator[Crm]:
    def answer(asked: Asked) -> Answer:
        login = asked.headers.get("Authorization")
        return crm.answer(asked.query, login) if asked.method == "GET" else crm.take(asked.content, login, asked.headers)

    with web.serving(answer) as url:
        crm.url = f"{url}/v1"
        yield crm


def person(number: int, changed: str = "2026-01-01T00:00:00Z", **more: Any) -> dict[str, Any]:
    return {"id": number, "properties": {"mail": f"p{number}@example.test", "name": f"P {number}", "age": number}, "updated_at": changed} | more
