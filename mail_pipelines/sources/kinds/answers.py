"""What a service's answer says besides its status: its own word for what is wrong, and whether that passes.

Some services say by a word what HTTP says by a status: GraphQL fails with status 200, Salesforce calls a used-up limit 403. Such an answer gets the status
that means the same (`as_http`), so that whoever waits, gives up or asks for another token need not know the service.
"""

from __future__ import annotations

import re
from typing import Any

import requests

# Word of a service → the status that means the same.
STATUSES = {
    "REQUEST_LIMIT_EXCEEDED": 429,  # Salesforce: requests of a day, or at once
    "UNABLE_TO_LOCK_ROW": 503,  # Salesforce: somebody else writes the record
    "THROTTLED": 429,  # GraphQL: Shopify and others
    "MAX_COST_EXCEEDED": 400,
    "ACCESS_DENIED": 403,
    "SHOP_INACTIVE": 403,
    "UNAUTHENTICATED": 401,
    "INTERNAL_SERVER_ERROR": 500,
}
# A word of a program, never a name, an address or a secret.
_WORD = re.compile(r"[A-Za-z]+(?:[_-][A-Za-z]+)*")
_MOST_WORD = 50
# Where services put it, by RFC 6749 §5.2, Salesforce, HubSpot, GraphQL.
_PLACES = ("errorCode", "policyName", "category", "code", "error")


def as_http(response: requests.Response, *, graphql: bool) -> None:
    """Give an answer that failed the status that means what it says, the service's word as its reason, and the time to wait as `Retry-After`."""
    document = _document(response) if response.status_code >= 400 or graphql else None
    failed = graphql and isinstance(document, dict) and bool(document.get("errors"))
    if response.status_code < 400 and not failed:
        return
    word = _word(document)
    if failed and response.status_code < 400:
        response.status_code = 400
    response.status_code = STATUSES.get(word, response.status_code)
    response.reason = word or ("errors" if failed else response.reason)
    if response.status_code == 429 and "retry-after" not in response.headers and (seconds := _seconds_to_wait(document)) is not None:
        response.headers["retry-after"] = str(seconds)


def _document(response: requests.Response) -> Any:
    try:
        return response.json()
    except ValueError:
        return None


def _word(document: Any) -> str:
    """The service's word, wherever it stands; empty if there is none."""
    if isinstance(document, list):
        return next((word for entry in document[:5] if (word := _word(entry))), "")
    if not isinstance(document, dict):
        return ""
    for place in _PLACES:
        found = document.get(place)
        if isinstance(found, str) and len(found) <= _MOST_WORD and _WORD.fullmatch(found):
            return found
    return _word(document.get("extensions")) or _word(document.get("errors"))


def _seconds_to_wait(document: Any) -> float | None:
    """Until there is enough in a bucket of query cost, as Shopify's GraphQL says."""
    try:
        cost = document["extensions"]["cost"]
        bucket = cost["throttleStatus"]
        missing = float(cost["requestedQueryCost"]) - float(bucket["currentlyAvailable"])
        return round(max(0.0, missing) / float(bucket["restoreRate"]), 3)
    except (KeyError, TypeError, ValueError, ZeroDivisionError):
        return None
