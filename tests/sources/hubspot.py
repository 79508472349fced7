"""HubSpot, as far as its recipe asks: the search of contacts and the unsubscribing of one, with the limits and the errors of the API of 2026-03."""

from __future__ import annotations

import datetime as dt
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote

from tests.parts.web import Answer, Asked, says

KEY = "pat-eu1-that-no-log-shows"
SEARCH = "/crm/objects/2026-03/contacts/search"
_UNSUBSCRIBE = re.compile(r"/communication-preferences/2026-03/statuses/([^/]+)/unsubscribe-all")
_PROPERTIES = ("email", "firstname", "lastname", "city", "newsletter", "hs_email_optout")
# As if the next second had come after so many requests and one too many. The search has no headers of limits, and neither has Retry-After.
PER_SECOND = 5


def _failed(status: int, category: str, message: str, **more: str) -> Answer:
    return says(status, {"status": "error", "message": message, "correlationId": "a43683b0-5717-4ceb-80b4-104d02915d8c", "category": category, **more})


def contact(number: int, changed: str = "2026-01-01T00:00:00.123Z", **properties: str | None) -> dict[str, Any]:
    given = {"email": f"p{number}@example.test", "firstname": f"P{number}", "hs_email_optout": None, **properties}
    return {"id": str(number), "properties": given, "createdAt": "2025-01-01T00:00:00Z", "updatedAt": changed, "archived": False}


@dataclass
class HubSpot:
    """`unsubscribed` are the addresses it was told, in order. `before` may answer in its place, given the number of the request."""

    contacts: list[dict[str, Any]]
    key: str = KEY
    properties: tuple[str, ...] = _PROPERTIES
    before: Callable[[int, Asked], Answer | None] | None = None
    asked: list[Asked] = field(default_factory=list)
    searches: list[dict[str, Any]] = field(default_factory=list)
    unsubscribed: list[str] = field(default_factory=list)
    refused: int = 0
    _in_second: int = 0

    def __call__(self, asked: Asked) -> Answer:
        self.asked.append(asked)
        if asked.headers.get("Authorization") != f"Bearer {self.key}":
            return _failed(401, "EXPIRED_AUTHENTICATION", "The OAuth token used to make this call expired 5 second(s) ago.")
        if self.before and (given := self.before(len(self.asked), asked)) is not None:
            return given
        self._in_second += 1
        if self._in_second > PER_SECOND:
            self._in_second = 0
            self.refused += 1
            return self._too_many(asked)
        if asked.method == "POST" and asked.path == SEARCH:
            return self._search(asked.json)
        if asked.method == "POST" and (who := _UNSUBSCRIBE.fullmatch(asked.path)):
            return self._unsubscribe(unquote(who[1]), asked.query.get("channel"))
        return _failed(404, "OBJECT_NOT_FOUND", "resource not found")

    def _too_many(self, asked: Asked) -> Answer:
        if asked.path == SEARCH:
            return _failed(429, "RATE_LIMITS", "You have reached your secondly limit.", errorType="RATE_LIMIT", policyName="SECONDLY")
        status, _, content = _failed(
            429, "RATE_LIMITS", "You have reached your ten_secondly_rolling limit.", errorType="RATE_LIMIT", policyName="TEN_SECONDLY_ROLLING"
        )
        limits = {"Max": "190", "Remaining": "0", "Interval-Milliseconds": "10000", "Daily": "650000", "Daily-Remaining": "649000"}
        return status, {f"X-HubSpot-RateLimit-{name}": value for name, value in limits.items()}, content

    def leave(self, number: int, when: str) -> None:
        self._change(number, when, "true")

    def come_back(self, number: int, when: str) -> None:
        self._change(number, when, "false")

    def remove(self, number: int) -> None:
        self.contacts = [person for person in self.contacts if person["id"] != str(number)]

    def lose_the_word(self) -> str:
        """The property that says who left is there no more."""
        self.properties = tuple(name for name in self.properties if name != "hs_email_optout")
        return "properties.hs_email_optout"

    def left(self) -> set[str]:
        return {person["properties"]["email"] for person in self.contacts if person["properties"]["hs_email_optout"] == "true"}

    def _change(self, number: int, when: str, opted_out: str) -> None:
        person = next(person for person in self.contacts if person["id"] == str(number))
        person["updatedAt"], person["properties"]["hs_email_optout"] = when, opted_out

    def _search(self, body: dict[str, Any]) -> Answer:
        if body["limit"] > 200:
            return _failed(400, "VALIDATION_ERROR", "The maximum page size is 200")
        self.searches.append(body)
        (group,), (sort,) = body["filterGroups"], body["sorts"]
        assert sort == {"propertyName": "hs_object_id", "direction": "ASCENDING"}
        found = [person for person in self.contacts if all(_passes(person, one) for one in group["filters"])]
        found.sort(key=lambda person: int(person["id"]))
        page = [self._shown(person, body["properties"]) for person in found[: body["limit"]]]
        paging = {"paging": {"next": {"after": str(len(page))}}} if len(found) > len(page) else {}
        return says(200, {"total": len(found), "results": page, **paging})

    def _shown(self, person: dict[str, Any], wanted: list[str]) -> dict[str, Any]:
        """A property that nobody has is not there; one without value is null."""
        return {**person, "properties": {name: person["properties"].get(name) for name in wanted if name in self.properties}}

    def _unsubscribe(self, address: str, channel: str | None) -> Answer:
        if channel != "EMAIL":
            return _failed(400, "VALIDATION_ERROR", "Channel is required")
        self.unsubscribed.append(address)
        for person in self.contacts:
            if person["properties"]["email"] == address:
                person["properties"]["hs_email_optout"] = "true"
                person["updatedAt"] = f"{dt.datetime.now(dt.UTC):%Y-%m-%dT%H:%M:%S.000Z}"
        return says(200, {"status": "COMPLETE", "results": [{"subscriberIdString": address, "channel": "EMAIL", "status": "UNSUBSCRIBED"}]})


def _passes(person: dict[str, Any], one: dict[str, str]) -> bool:
    name = one["propertyName"]
    if one["operator"] == "HAS_PROPERTY":
        return bool(person["properties"].get(name))
    if name == "hs_object_id" and one["operator"] == "GT":
        return int(person["id"]) > int(one["value"])
    assert (name, one["operator"]) == ("lastmodifieddate", "GTE")
    return dt.datetime.fromisoformat(person["updatedAt"]).timestamp() * 1000 >= int(one["value"])
