"""Declarations: what is wrong is named with its place, and no secret stands in one."""

from __future__ import annotations

import datetime as dt
from typing import Any

import pyarrow as pa
import pytest
import yaml

from mail_pipelines.sources import cursor, declaration, recipes
from mail_pipelines.sources.errors import DeclarationError, SourceError
from mail_pipelines.sources.texts import is_marked, moment, moments

GOOD: dict[str, Any] = {
    "name": "crm",
    "kind": "rest",
    "connection": {"url": "https://crm.example/", "auth": {"type": "bearer", "token_env": "CRM_TOKEN"}},
    "schedule": "*/15 * * * *",
    "contacts": {"read": {"path": "contacts"}, "map": {"id": "external_id", "mail": "email"}, "list": "News", "consent": {"subscribe": "always"}},
}


def changed(path: str, value: Any) -> dict[str, Any]:
    tree: dict[str, Any] = yaml.safe_load(yaml.safe_dump(GOOD))
    *outer, last = path.split(".")
    place = tree
    for name in outer:
        place = place[name]
    if value is None:
        del place[last]
    else:
        place[last] = value
    return tree


def test_the_good_one_is_read() -> None:
    source = declaration.parse(yaml.safe_dump(GOOD), "crm.yaml")
    assert list(source.sections) == ["contacts"]
    assert source.contacts is not None
    assert source.contacts.rule_of("anything") == "theirs"
    assert declaration.parse(yaml.safe_dump(GOOD | {"schedule": "0,30 8-18/2 1,15 */3 1-5", "time_zone": "Europe/Berlin"}), "crm.yaml").schedule


TOLD = {"what": ["opens"]}
ONLY = {"path": "x/{email}", "batch": 1, "idempotent": True, "says": ["unsubscribes"]}
GONE = {"map": {"mail": "email", "out": "opted_out"}}


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("kind", "ftp", "kind: 'ftp' is not known"),
        ("name", "A B", "source name"),
        ("name", "x" * 40, "more than 32"),
        ("schedule", "daily", "schedule: expected five fields of cron"),
        ("schedule", "61 * * * *", "schedule: expected five fields of cron"),
        ("schedule", "0 3 * * 1-9", "schedule: expected five fields of cron"),
        ("time_zone", "Mars/Base", "time_zone: 'Mars/Base' is no time zone"),
        ("connection.url", "https://ann:hush@crm.example/", "connection.url: a password stands in it"),
        ("connection.headers", {"X-Api-Key": "hush"}, "connection.headers: X-Api-Key: give it by `auth`"),
        ("connection.url", None, "connection.url: Field required"),
        ("connection.auth", {"type": "bearer", "token_env": "eyJhbGciOi.abc"}, "expected the name of an environment variable"),
        ("connection.auth", {"type": "bearer", "token_env": "MAIL_PIPELINES_X"}, "expected the name of an environment variable"),
        ("connection.auth", {"type": "basic", "token_env": "X"}, "user_env is missing"),
        ("contacts.map", {"id": "external_id"}, "no column becomes `email`"),
        ("contacts.map", {"a": "email", "b": "email"}, "two columns become `email`"),
        ("contacts.map", {"a": "email", "b": "First Name"}, "is no field key"),
        ("contacts.map", {"a": "email", "b": "address"}, "built-in"),
        ("contacts.list", None, "list: is missing"),
        ("contacts", GONE | {"consent": {"subscribe": "never"}}, "list: is missing, which those leave whose column says that they left"),
        ("contacts.consent", {"subscribe": "always", "left": ["GONE"]}, "agreed or left needs a column that is mapped to `opted_in`"),
        ("contacts.consent", {"subscribe": "opted_in"}, "needs a column that is mapped to `opted_in`"),
        ("contacts.consent", None, "contacts.consent: Field required"),
        ("contacts.conflict", {"default": "newest", "city": "ours"}, "conflict.city: no column becomes this field"),
        ("contacts.types", {"city": "number"}, "types.city: no column becomes this field"),
        ("contacts.read", {"path": "x", "pages": 3}, "read.pages: Extra inputs"),
        ("contacts", None, "contacts or suppressions"),
        ("write_back", {"what": ["sales"], "send": {}}, "write_back.what.0: Input should be 'opens'"),
        ("write_back", TOLD | {"send": {"path": "x", "body": {"who": "email"}}}, "write_back.send.body: `key` is missing"),
        ("write_back", TOLD | {"send": {"path": "x", "body": {"id": "key"}}}, "write_back.send.body: neither `email` nor `external_id`"),
        ("write_back", TOLD | {"send": {"path": "x", "body": {"id": "secret"}}}, "write_back.send.body.id: Input should be 'key'"),
        ("write_back", TOLD | {"send": {"path": "x", "body": {"id": "key"}, "key_header": "A: b"}}, "write_back.send.key_header: String should match"),
        (
            "write_back",
            TOLD | {"send": {"path": "x/{external_id}", "idempotent": True}},
            "write_back.send.path: it has a field of an event, so each is sent alone",
        ),
        ("write_back", TOLD | {"send": {"path": "x/{id}/{email}", "batch": 1}}, "write_back.send.path: {id} is no field of an event"),
        ("write_back", TOLD | {"send": {"path": "x/{email}", "batch": 1}}, "write_back.send.body: `key` is missing"),
        ("write_back", TOLD | {"send": ONLY}, "write_back.what: opens cannot be told by this request, which says only unsubscribes"),
        ("recipe", "hubspit", "recipe: 'hubspit' is not known; did you mean 'hubspot'?"),
    ],
)
def test_what_is_wrong_is_named_with_its_place(path: str, value: Any, words: str) -> None:
    with pytest.raises(DeclarationError) as caught:
        declaration.parse(yaml.safe_dump(changed(path, value)), "crm.yaml")
    assert str(caught.value).startswith("crm.yaml: ")
    assert words in str(caught.value)
    assert "eyJ" not in str(caught.value)


def test_broken_yaml_is_named_with_its_line() -> None:
    with pytest.raises(DeclarationError, match=r"crm.yaml: line 2: no valid YAML"):
        declaration.parse("name: crm\nkind: [rest", "crm.yaml")


@pytest.mark.parametrize(
    ("text", "overlap", "asked"),
    [
        ("1000", 10, "990"),
        ("2026-01-01T00:05:00Z", 300, "2026-01-01T00:00:00Z"),
        ("2026-01-01 00:05:00.123456", 300, "2026-01-01 00:00:00"),
        ("2026-01-01T00:05:00+02:00", 60, "2026-01-01T00:04:00+02:00"),
    ],
)
def test_a_cursor_goes_back_in_its_own_form(text: str, overlap: float, asked: str) -> None:
    assert cursor.since(text, overlap) == asked
    assert cursor.order(asked) < cursor.order(text)


@pytest.mark.parametrize(
    ("texts", "found"),
    [
        (["2026-05-01T00:00:00Z", "2099-01-01T00:00:00Z", None], "2026-05-01T00:00:00Z"),
        (["2026-05-01T00:00:00Z", "2026-05-01T00:00:00.5Z"], "2026-05-01T00:00:00.5Z"),
        (["2026-05-01T03:00:00+02:00", "2026-05-01 02:00:00", " "], "2026-05-01 02:00:00"),
        (["2099-01-01T00:00:00Z"], "2026-01-01T00:00:00Z"),
        ([None], "2026-01-01T00:00:00Z"),
    ],
)
def test_a_cursor_from_the_future_stops_nothing(texts: list[str | None], found: str) -> None:
    now = moment("2026-06-01T00:00:00Z")
    assert now is not None
    assert cursor.highest(pa.array(texts, pa.string()), "2026-01-01T00:00:00Z", now) == found


def test_a_cursor_is_a_number_or_a_time() -> None:
    now = dt.datetime.now(dt.UTC)
    assert cursor.highest(pa.array(["9", "12", None]), "3", now) == "12"
    with pytest.raises(SourceError, match="neither numbers nor times"):
        cursor.highest(pa.array(["soon"]), None, now)


def test_a_column_of_times_says_what_each_says() -> None:
    given = ["2026-01-01 12:00:00", "2026-01-01T12:00:00.25Z", "2026-01-01T12:00:00+02:00", "1700000000", "2026-02-30", "soon", "", " ", None]
    times, problems = moments(pa.array(given, pa.string()))
    assert set(problems) == {given.index("2026-02-30"), given.index("soon")}
    expected = [None if row in problems else moment(text) for row, text in enumerate(given)]
    assert times.to_pylist() == [value and value.replace(tzinfo=None) for value in expected]


@pytest.mark.parametrize(
    ("text", "marked"), [("true", True), ("1", True), ("2026-01-01T00:00:00Z", True), ("false", False), ("0", False), ("", False), (None, False)]
)
def test_what_marks_a_record_as_deleted(text: str | None, marked: bool) -> None:
    assert is_marked(text) is marked


def test_what_is_only_read_is_told_nothing() -> None:
    document = {"name": "shop", "kind": "files", "connection": {"url": "shop"}, "suppressions": {"read": {"glob": "*"}, "map": {"mail": "email"}}}
    with pytest.raises(DeclarationError, match="say unknown: create, or declare contacts"):
        declaration.parse(yaml.safe_dump(document | {"write_back": {"what": ["opens"], "send": {}}}), "shop.yaml")
    with pytest.raises(DeclarationError, match="a source of kind files is only read; expected one of rest, sql"):
        declaration.parse(yaml.safe_dump(document | {"write_back": {"what": ["opens"], "send": {}, "unknown": "create"}}), "shop.yaml")


@pytest.mark.parametrize("recipe", recipes.names())
def test_by_a_recipe_the_service_is_told_nothing_that_the_request_does_not_mean(recipe: str) -> None:
    contacts = {"list": "News", "consent": {"subscribe": "always"}}
    given = {"name": "crm", "recipe": recipe, "connection": {"url": "https://crm.example"}, "contacts": contacts}
    assert declaration.parse(yaml.safe_dump(given), "crm.yaml").write_back is None
    with pytest.raises(DeclarationError, match="opens cannot be told by this request, which says only unsubscribes"):
        declaration.parse(yaml.safe_dump(given | {"write_back": {"what": ["opens"]}}), "crm.yaml")


def test_a_declaration_is_laid_over_its_recipe() -> None:
    contacts: dict[str, Any] = {"list": "News", "map": {"lastName": None, "numberOfOrders": "orders"}, "types": {"last_name": None}, "whole_hours": 6}
    given = {
        "name": "shop",
        "recipe": "shopify",
        "connection": {"url": "https://shop.example", "auth": {"type": "api_key", "user_env": None, "token_url": None, "token_env": "SHOP_TOKEN"}},
        "contacts": contacts,
    }
    source = declaration.parse(yaml.safe_dump(given), "shop.yaml")
    assert source.write_back is None
    assert source.contacts is not None
    assert source.contacts.field_columns == {"firstName": "first_name", "numberOfOrders": "orders"}
    assert (source.contacts.whole_hours, source.contacts.consent.left, source.contacts.cursor) == (6, ["UNSUBSCRIBED"], "updatedAt")
    assert source.connection["auth"] == {"type": "api_key", "token_env": "SHOP_TOKEN", "name": "X-Shopify-Access-Token"}
    told = declaration.parse(yaml.safe_dump(given | {"write_back": {}}), "shop.yaml").write_back
    assert told is not None
    assert (told.what, told.lists) == (["unsubscribes"], "own")
    never = {
        **contacts,
        "list": None,
        "map": {**contacts["map"], "defaultEmailAddress.marketingState": None},
        "consent": {"subscribe": "never", "agreed": [], "left": []},
    }
    with pytest.raises(DeclarationError, match=r"write_back\.lists: own is the list of contacts"):
        declaration.parse(yaml.safe_dump(given | {"contacts": never, "write_back": {"unknown": "create"}}), "shop.yaml")
