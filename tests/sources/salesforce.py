"""Salesforce, as far as its recipe asks: tokens, SOQL by queryAll in batches, and changing a contact, with the limits and the errors of the REST API."""

from __future__ import annotations

import datetime as dt
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from tests.parts.web import Answer, Asked, says

CLIENT, SECRET = "3MVG9.client", "secret-that-no-log-shows"
_BASE = "/services/data/v67.0"
_QUERY = re.compile(r"SELECT ([\w, ]+) FROM Contact WHERE SystemModstamp >= (\S+) AND Email != null")


def _failed(status: int, code: str, message: str, **headers: str) -> Answer:
    return says(status, [{"message": message, "errorCode": code}], **headers)


def contact(number: int, changed: str = "2026-01-01T00:00:00.000+0000", **more: Any) -> dict[str, Any]:
    person = {"Id": f"003{number:012d}AAA", "Email": f"p{number}@example.test", "FirstName": f"P{number}", "LastName": "Test", "Newsletter__c": True}
    return person | {"HasOptedOutOfEmail": False, "IsDeleted": False, "SystemModstamp": changed} | more


@dataclass
class Salesforce:
    """A token holds for `token_requests` requests, a day for `daily`. `changed` has ids and what they were changed to, in order."""

    contacts: list[dict[str, Any]]
    page_size: int = 50
    token_requests: int = 1_000
    daily: int = 15_000
    before: Callable[[int, Asked], Answer | None] | None = None
    asked: list[Asked] = field(default_factory=list)
    queries: list[str] = field(default_factory=list)
    changed: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    tokens: int = 0
    used: int = 0
    _left_of_token: int = 0
    _cursors: dict[str, list[dict[str, Any]]] = field(default_factory=dict)

    def __call__(self, asked: Asked) -> Answer:
        if asked.path == "/services/oauth2/token":
            return self._token(asked.form)
        self.asked.append(asked)
        if self.before and (given := self.before(len(self.asked), asked)) is not None:
            return given
        if asked.headers.get("Authorization") != f"Bearer 00D!token{self.tokens}" or self._left_of_token <= 0:
            return _failed(401, "INVALID_SESSION_ID", "Session expired or invalid")
        self._left_of_token -= 1
        self.used += 1
        usage = f"api-usage={min(self.used, self.daily)}/{self.daily}"
        if self.used > self.daily:
            return _failed(403, "REQUEST_LIMIT_EXCEEDED", "TotalRequests Limit exceeded.", Sforce_Limit_Info=usage)
        status, headers, content = self._answer(asked)
        return status, headers | {"Sforce-Limit-Info": usage}, content

    def leave(self, number: int, when: str) -> None:
        self._person(number).update(HasOptedOutOfEmail=True, SystemModstamp=when)

    def come_back(self, number: int, when: str) -> None:
        self._person(number).update(HasOptedOutOfEmail=False, SystemModstamp=when)

    def remove(self, number: int) -> None:
        self._person(number).update(IsDeleted=True)

    def lose_the_word(self) -> str:
        """The field that says who left is there no more, or hidden from the app's user."""
        for person in self.contacts:
            del person["HasOptedOutOfEmail"]
        return "HasOptedOutOfEmail"

    def left(self) -> set[str]:
        return {person["Email"] for person in self.contacts if person["HasOptedOutOfEmail"]}

    def _person(self, number: int) -> dict[str, Any]:
        return next(person for person in self.contacts if person["Email"] == f"p{number}@example.test")

    def _token(self, form: dict[str, str]) -> Answer:
        if (form["client_id"], form["client_secret"]) != (CLIENT, SECRET):
            return says(400, {"error": "invalid_client", "error_description": "invalid client credentials"})
        if form["grant_type"] != "client_credentials" and form.get("refresh_token") != "5Aep.refresh":
            return says(400, {"error": "invalid_grant", "error_description": "expired access/refresh token"})
        self.tokens += 1
        self._left_of_token = self.token_requests
        # Without expires_in: how long a session lasts is the organization's setting.
        return says(200, {"access_token": f"00D!token{self.tokens}", "instance_url": "https://acme.my.salesforce.com", "token_type": "Bearer"})

    def _answer(self, asked: Asked) -> Answer:
        if asked.method == "GET" and asked.path == f"{_BASE}/queryAll":
            return self._query(asked.query["q"])
        if asked.method == "GET" and asked.path in self._cursors:
            return self._batch(self._cursors.pop(asked.path))
        if asked.method == "PATCH" and (who := re.fullmatch(rf"{_BASE}/sobjects/Contact/(\w+)", asked.path)):
            return self._change(who[1], asked.json)
        return _failed(404, "NOT_FOUND", "The requested resource does not exist")

    def _query(self, soql: str) -> Answer:
        match = _QUERY.fullmatch(soql)
        if match is None:
            return _failed(400, "MALFORMED_QUERY", "unexpected token")
        self.queries.append(soql)
        names, since = match[1].split(", "), dt.datetime.fromisoformat(match[2])
        if self.contacts and (wrong := next((name for name in names if name not in self.contacts[0]), None)):
            return _failed(400, "INVALID_FIELD", f"\n{soql[:60]}\n^\nERROR at Row:1:Column:12\nNo such column '{wrong}' on entity 'Contact'.")
        found = [person for person in self.contacts if person["Email"] and dt.datetime.fromisoformat(person["SystemModstamp"]) >= since]
        return self._batch([{"attributes": {"type": "Contact"}, **{name: person[name] for name in names}} for person in found])

    def _batch(self, rows: list[dict[str, Any]]) -> Answer:
        page, rest = rows[: self.page_size], rows[self.page_size :]
        if not rest:
            return says(200, {"totalSize": len(rows), "done": True, "records": page})
        following = f"{_BASE}/query/01gD0000002HU6KIAW-{len(self.asked)}"
        self._cursors[following] = rest
        return says(200, {"totalSize": len(rows), "done": False, "nextRecordsUrl": following, "records": page})

    def _change(self, id_: str, values: dict[str, Any]) -> Answer:
        person = next((person for person in self.contacts if person["Id"] == id_), None)
        if person is None or person["IsDeleted"]:
            return _failed(404, "ENTITY_IS_DELETED", "entity is deleted")
        person.update(values, SystemModstamp=f"{dt.datetime.now(dt.UTC):%Y-%m-%dT%H:%M:%S.000+0000}")
        self.changed.append((id_, values))
        return says(204, None)
