"""Shopify, as far as its recipe asks: tokens of a day, customers by GraphQL within a bucket of query cost, and the consent of one, by the newest word."""

from __future__ import annotations

import datetime as dt
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from tests.parts.web import Answer, Asked, says

CLIENT, SECRET = "client-id", "shpss-that-no-log-shows"
_GRAPHQL = "/admin/api/2026-10/graphql.json"
_FIELDS = {"id", "firstName", "lastName", "updatedAt", "defaultEmailAddress", "emailAddress", "marketingState", "marketingUpdatedAt"}
_ARGUMENTS = r"customers\(first: (\d+), after: \$after, sortKey: ID, query: \$changed\)"
_CUSTOMERS = re.compile(rf"{_ARGUMENTS}\s*\{{ nodes \{{ (.+) \}} pageInfo \{{ hasNextPage endCursor \}} \}}")
_CHANGED = re.compile(r"updated_at:>='(\S+)'")
_BUCKET, _RESTORED = 2_000.0, 100.0


def customer(number: int, state: str = "SUBSCRIBED", changed: str = "2026-01-01T00:00:00Z", **more: Any) -> dict[str, Any]:
    address = {"emailAddress": f"p{number}@example.test", "marketingState": state, "marketingUpdatedAt": "2025-05-05T05:05:05Z"}
    return {"id": f"gid://shopify/Customer/{number}", "firstName": f"P{number}", "lastName": None, "updatedAt": changed, "defaultEmailAddress": address} | more


@dataclass
class Shopify:
    """A token holds for `token_requests` requests. Requests of the numbers in `throttled` find the bucket empty. `told` has ids and states, in order."""

    customers: list[dict[str, Any]]
    token_requests: int = 1_000
    throttled: set[int] = field(default_factory=set)
    fields: set[str] = field(default_factory=lambda: set(_FIELDS))
    before: Callable[[int, Asked], Answer | None] | None = None
    asked: list[Asked] = field(default_factory=list)
    told: list[tuple[str, str]] = field(default_factory=list)
    tokens: int = 0
    _left_of_token: int = 0

    def __call__(self, asked: Asked) -> Answer:
        if asked.path == "/admin/oauth/access_token":
            return self._token(asked.form)
        self.asked.append(asked)
        if self.before and (given := self.before(len(self.asked), asked)) is not None:
            return given
        if asked.headers.get("X-Shopify-Access-Token") != f"shpat_{self.tokens}" or self._left_of_token <= 0:
            return says(401, {"errors": "[API] Invalid API key or access token (unrecognized login or wrong password)"})
        self._left_of_token -= 1
        if asked.path != _GRAPHQL:
            return says(404, {"errors": "Not Found"})
        if len(self.asked) in self.throttled:
            throttled = {"message": "Throttled", "extensions": {"code": "THROTTLED", "documentation": "https://shopify.dev/api/usage/rate-limits"}}
            return says(200, {"errors": [throttled], "extensions": _cost(302, 301.0)})
        query, variables = asked.json["query"], asked.json.get("variables", {})
        return self._consent(variables["input"]) if query.startswith("mutation") else self._customers(query, variables)

    def leave(self, number: int, when: str) -> None:
        self._state(number, when, "UNSUBSCRIBED")

    def come_back(self, number: int, when: str) -> None:
        self._state(number, when, "SUBSCRIBED")

    def remove(self, number: int) -> None:
        self.customers = [person for person in self.customers if person["id"] != f"gid://shopify/Customer/{number}"]

    def lose_the_word(self) -> str:
        """The field that says who left is there no more: a version of the API was retired."""
        self.fields.remove("marketingState")
        return "defaultEmailAddress.marketingState"

    def left(self) -> set[str]:
        addresses = [person["defaultEmailAddress"] for person in self.customers]
        return {address["emailAddress"] for address in addresses if address["marketingState"] == "UNSUBSCRIBED"}

    def _state(self, number: int, when: str, state: str) -> None:
        person = next(person for person in self.customers if person["id"] == f"gid://shopify/Customer/{number}")
        person["updatedAt"] = when
        person["defaultEmailAddress"].update(marketingState=state, marketingUpdatedAt=when)

    def _token(self, form: dict[str, str]) -> Answer:
        if (form["client_id"], form["client_secret"], form["grant_type"]) != (CLIENT, SECRET, "client_credentials"):
            return says(400, {"error": "invalid_request", "error_description": "The client credentials are wrong"})
        self.tokens += 1
        self._left_of_token = self.token_requests
        return says(200, {"access_token": f"shpat_{self.tokens}", "scope": "read_customers,write_customers", "expires_in": 86399})

    def _customers(self, query: str, variables: dict[str, Any]) -> Answer:
        match, changed = _CUSTOMERS.search(query), _CHANGED.fullmatch(variables["changed"])
        assert match is not None
        assert changed is not None
        if wrong := next((name for name in re.findall(r"\w+", match[2]) if name not in self.fields), None):
            said = {"code": "undefinedField", "typeName": "Customer", "fieldName": wrong}
            return says(200, {"errors": [{"message": f"Field '{wrong}' doesn't exist on type 'Customer'", "extensions": said}]})
        since = dt.datetime.fromisoformat(changed[1])
        found = [person for person in self.customers if dt.datetime.fromisoformat(person["updatedAt"]) >= since]
        start = int(variables.get("after") or 0)
        page = found[start : start + int(match[1])]
        info = {"hasNextPage": start + len(page) < len(found), "endCursor": str(start + len(page)) if page else None}
        return says(200, {"data": {"customers": {"nodes": page, "pageInfo": info}}, "extensions": _cost(302, _BUCKET - 302)})

    def _consent(self, given: dict[str, Any]) -> Answer:
        person = next((person for person in self.customers if person["id"] == given["customerId"]), None)
        errors = [] if person else [{"field": ["input", "customerId"], "message": "Customer not found"}]
        if person:
            consent, address = given["emailMarketingConsent"], person["defaultEmailAddress"]
            self.told.append((person["id"], consent["marketingState"]))
            if dt.datetime.fromisoformat(consent["consentUpdatedAt"]) >= dt.datetime.fromisoformat(address["marketingUpdatedAt"]):
                address.update(marketingState=consent["marketingState"], marketingUpdatedAt=consent["consentUpdatedAt"])
                person["updatedAt"] = f"{dt.datetime.now(dt.UTC):%Y-%m-%dT%H:%M:%SZ}"
        return says(200, {"data": {"customerEmailMarketingConsentUpdate": {"userErrors": errors}}, "extensions": _cost(10, _BUCKET - 10)})


def _cost(requested: int, available: float) -> dict[str, Any]:
    status = {"maximumAvailable": _BUCKET, "currentlyAvailable": available, "restoreRate": _RESTORED}
    return {"cost": {"requestedQueryCost": requested, "actualQueryCost": None, "throttleStatus": status}}
