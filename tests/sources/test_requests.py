"""What is asked and told of REST sources, without a server: nothing of a service's or a person's gets where it would mean something else."""

from __future__ import annotations

import datetime as dt
import json
from typing import Any

import pytest
import requests
from requests.auth import HTTPBasicAuth

from mail_pipelines.sources import kinds
from mail_pipelines.sources.errors import SourceError
from mail_pipelines.sources.kinds import answers, asking, rest_writing
from mail_pipelines.sources.kinds.rest import Read
from mail_pipelines.sources.kinds.rest_writing import Send
from tests.parts import web

COLUMNS = ("id", "properties.email", "properties.first", "changed")


def test_what_is_wanted_stands_in_the_request_as_it_is_needed_there() -> None:
    given = {**asking.values(COLUMNS, None, "2026-01-02T03:04:05.678+0200"), "after": "7"}
    tree = {
        "q": "SELECT {columns} FROM x WHERE at >= {since} AND id > {after}",
        "graphql": "nodes { {selection} }",
        "n": [3, None, "{columns}"],
        "ms": "{since_ms}",
    }
    assert asking.filled(tree, given) == {
        "q": "SELECT id, properties.email, properties.first, changed FROM x WHERE at >= 2026-01-02T01:04:05Z AND id > 7",
        "graphql": "nodes { id properties { email first } changed }",
        "n": [3, None, ["id", "properties.email", "properties.first", "changed"]],
        "ms": "1767315845678",
    }
    assert asking.filled("{columns}", asking.values(COLUMNS, "properties", None)) == ["email", "first"]
    assert asking.filled("{since} {since_ms}", asking.values(COLUMNS, None, None)) == "1970-01-01T00:00:00Z 0"
    assert asking.filled("{since}", asking.values(COLUMNS, None, "41")) == "41"
    # Other braces are the query's own.
    assert asking.filled("{ a { b } } {place}", given) == "{ a { b } } {place}"


@pytest.mark.parametrize("column", ["a b", "x) { deleteAll", "", "a..b", "1a", "x'"])
def test_a_column_that_is_no_name_stands_in_no_query(column: str) -> None:
    with pytest.raises(SourceError, match="cannot stand in the query"):
        asking.filled("SELECT {columns} FROM x", asking.values(("id", column), None, None))
    with pytest.raises(SourceError, match="cannot stand in the query"):
        asking.filled("{ {selection} }", asking.values((column,), None, None))
    assert asking.filled({"properties": "{columns}"}, asking.values((column,), None, None)) == {"properties": [column]}


@pytest.mark.parametrize("value", [None, "", "1' OR '1'='1", "a b", "x" * 191, "\n"])
def test_a_record_that_is_no_word_is_not_asked_for(value: Any) -> None:
    with pytest.raises(SourceError, match="no usable value"):
        asking.after(value)


def test_paging_by_the_last_record_needs_a_place_for_it() -> None:
    paging = {"type": "keyset", "column": "id"}
    with pytest.raises(ValueError, match=r"keyset needs \{after\}"):
        Read.model_validate({"path": "x", "paging": paging})
    assert Read.model_validate({"path": "x", "paging": paging, "params": {"id_after": "{after}"}}).keyset is not None


def _event(**values: Any) -> kinds.Event:
    return {**dict.fromkeys(kinds.EVENT_FIELDS), "key": "unsubscribe-1", "kind": "unsubscribe", **values}


@pytest.mark.parametrize(
    ("value", "path"),
    [
        ("003A", "contacts/003A/leave?channel=EMAIL"),
        ("a+b@example.test", "contacts/a%2Bb%40example.test/leave?channel=EMAIL"),
        ("../admin?x=1#y", "contacts/..%2Fadmin%3Fx%3D1%23y/leave?channel=EMAIL"),
        ("gid://shop/1", "contacts/gid%3A%2F%2Fshop%2F1/leave?channel=EMAIL"),
        ("%2e%2e", "contacts/%252e%252e/leave?channel=EMAIL"),
        ("ü\n", "contacts/%C3%BC%0A/leave?channel=EMAIL"),
    ],
)
def test_a_value_is_one_part_of_the_path_whatever_it_is(value: str, path: str) -> None:
    send = Send.model_validate({"path": "contacts/{external_id}/leave?channel=EMAIL", "batch": 1, "idempotent": True})
    assert rest_writing.address(send, _event(external_id=value)) == path


@pytest.mark.parametrize("value", [None, "", ".", ".."])
def test_a_value_that_would_lead_elsewhere_is_refused(value: str | None) -> None:
    send = Send.model_validate({"path": "contacts/{external_id}", "batch": 1, "idempotent": True})
    with pytest.raises(kinds.Refused, match="no external_id"):
        rest_writing.address(send, _event(external_id=value))


def test_constants_and_values_make_one_document() -> None:
    send = Send.model_validate(
        {"path": "x", "batch": 1, "idempotent": True, "constants": {"query": "mutation", "variables.state": "GONE"}, "body": {"variables.id": "external_id"}}
    )
    assert rest_writing.document(send, _event(external_id="7")) == {"query": "mutation", "variables": {"state": "GONE", "id": "7"}}


def _answer(status: int, document: Any, *, graphql: bool = False, **headers: str) -> requests.Response:
    response = requests.Response()
    response.status_code, response.reason = status, "as HTTP says"
    response._content = document if isinstance(document, bytes) else json.dumps(document).encode()
    response.headers.update(headers)
    answers.as_http(response, graphql=graphql)
    return response


THROTTLED = {"errors": [{"message": "Throttled", "extensions": {"code": "THROTTLED"}}]}


@pytest.mark.parametrize(
    ("status", "document", "graphql", "means"),
    [
        (200, {"errors": ["in the data of somebody"]}, False, (200, "as HTTP says")),
        (200, {"data": 1}, True, (200, "as HTTP says")),
        (200, b"no json", True, (200, "as HTTP says")),
        (200, THROTTLED, True, (429, "THROTTLED")),
        (200, {"errors": [{"message": "no", "extensions": {"code": "ACCESS_DENIED"}}], "data": None}, True, (403, "ACCESS_DENIED")),
        (200, {"errors": [{"message": "Ann <ann@example.test> is wrong"}]}, True, (400, "errors")),
        (403, [{"message": "TotalRequests Limit exceeded.", "errorCode": "REQUEST_LIMIT_EXCEEDED"}], False, (429, "REQUEST_LIMIT_EXCEEDED")),
        (403, [{"message": "no", "errorCode": "INSUFFICIENT_ACCESS"}], False, (403, "INSUFFICIENT_ACCESS")),
        (400, {"error": "invalid_client", "error_description": "secret abc"}, False, (400, "invalid_client")),
        (400, {"error": "Ann Smith is unknown"}, False, (400, "as HTTP says")),
        (429, {"status": "error", "policyName": "DAILY", "category": "RATE_LIMITS"}, False, (429, "DAILY")),
        (500, b"<html>", False, (500, "as HTTP says")),
    ],
)
def test_a_services_own_word_is_understood_and_nothing_else_of_its_words_is_kept(status: int, document: Any, graphql: bool, means: tuple[int, str]) -> None:
    response = _answer(status, document, graphql=graphql)
    assert (response.status_code, response.reason) == means


def test_a_bucket_of_query_cost_says_how_long_to_wait() -> None:
    cost = {"requestedQueryCost": 302, "throttleStatus": {"maximumAvailable": 2000.0, "currentlyAvailable": 52, "restoreRate": 100.0}}
    assert _answer(200, {**THROTTLED, "extensions": {"cost": cost}}, graphql=True).headers["retry-after"] == "2.5"
    assert "retry-after" not in _answer(200, {**THROTTLED, "extensions": {"cost": {}}}, graphql=True).headers
    assert _answer(429, THROTTLED, graphql=True, **{"Retry-After": "7"}).headers["retry-after"] == "7"


def test_a_login_goes_to_no_other_host() -> None:
    """What is not called `Authorization` would be sent there by `requests`."""
    from mail_pipelines.sources.kinds.http import PatientSession

    strangers: list[web.Asked] = []

    def stranger(asked: web.Asked) -> web.Answer:
        strangers.append(asked)
        return web.says(200, {})

    with web.serving(stranger) as elsewhere, web.serving(lambda asked: web.says(302, None, Location=f"{elsewhere}/x")) as url, PatientSession() as session:
        assert session.get(url).status_code == 200
        session.auth = HTTPBasicAuth("me", "secret")
        with pytest.raises(SourceError, match="sends us to another host"):
            session.get(url)
    assert len(strangers) == 1


def test_times_in_documents_have_their_zone() -> None:
    send = Send.model_validate({"path": "{external_id}", "batch": 1, "idempotent": True, "body": {"at": "occurred_at"}})
    at = dt.datetime(2026, 1, 2, 3, 4, 5, tzinfo=dt.UTC)
    assert rest_writing.document(send, _event(external_id="1", occurred_at=at)) == {"at": "2026-01-02T03:04:05+00:00"}
