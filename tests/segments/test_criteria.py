"""Criteria that cannot work are refused, with the place in the tree and what would work."""

from __future__ import annotations

import datetime as dt
from typing import Any

import pytest

from mail_pipelines.segments.catalogue import Catalogue, CustomField, KnownCampaign, KnownList
from mail_pipelines.segments.criteria import AllOf, Behaviour, Comparison, CriteriaError, InList, Not, WithinDays, parse

JANUARY = dt.datetime(2026, 1, 1, tzinfo=dt.UTC)
CATALOGUE = Catalogue(
    fields=(CustomField(1, "city", "text"), CustomField(2, "age", "number"), CustomField(3, "vip", "boolean"), CustomField(4, "born", "date")),
    lists=(KnownList(1, "news"),),
    campaigns=(KnownCampaign(1, "spring", JANUARY), KnownCampaign(2, "summer", JANUARY + dt.timedelta(days=90)), KnownCampaign(3, "draft", None)),
)

REFUSED: list[tuple[Any, str]] = [
    (None, "criteria: expected a condition"),
    ([], "criteria: expected a condition"),
    ({}, "criteria: no condition known by an empty mapping"),
    ({"al": []}, "criteria: no condition known by 'al'; did you mean 'all'?"),
    ({True: 1}, "criteria: no condition known by True"),
    ({"all": {}, "any": []}, "criteria: all and any cannot stand in one condition"),
    ({"all": {"field": "city"}}, "all: expected a list of conditions"),
    ({"all": [{"in_list": "news"}, {"field": "cty", "op": "=", "value": "x"}]}, "all[1].field: unknown field 'cty'; did you mean 'city'?"),
    ({"any": [{"not": {"field": "age", "op": "contains", "value": 1}}]}, "any[0].not.op: unknown operator 'contains' for age, a number field; known: =, !=, <"),
    ({"field": "age"}, "op: no operator for age"),
    ({"field": "age", "op": [1], "value": 1}, "op: unknown operator [1]"),
    ({"field": ["age"], "op": "=", "value": 1}, "field: unknown field ['age']"),
    ({"field": "age", "op": "=", "value": "18"}, "value: expected a number, got '18'"),
    ({"field": "age", "op": "=", "value": True}, "value: expected a number, got True"),
    ({"field": "age", "op": "=", "value": float("nan")}, "value: expected a number, got nan"),
    ({"field": "age", "op": "=", "value": 10**400}, "value: expected a number, got 1000"),
    ({"field": "age", "op": "="}, "value: expected a number, got None"),
    ({"field": "city", "op": "=", "value": 3}, "value: expected text, got 3"),
    ({"field": "city", "op": "in", "value": "Berlin"}, "value: in takes a list of values, got 'Berlin'"),
    ({"field": "city", "op": "in", "value": []}, "value: in takes a list of values, got []"),
    ({"field": "city", "op": "in", "value": ["a", None]}, "value[1]: expected text, got None"),
    ({"field": "city", "op": "empty", "value": True}, "value: empty takes no value"),
    ({"field": "vip", "op": "=", "value": "yes"}, "value: expected true or false, got 'yes'"),
    ({"field": "born", "op": "=", "value": "31.1.2026"}, "value: expected a date such as 2026-01-31, got '31.1.2026'"),
    ({"field": "born", "op": "=", "value": "2026-01-31T10:00:00"}, "value: expected a date such as"),
    ({"field": "created_at", "op": "after", "value": "0001-01-01T00:00:00+05:00"}, "value: '0001-01-01T00:00:00+05:00' lies outside"),
    ({"field": "age", "op": "between", "value": [1, 2, 3]}, "value: between takes two values, got 3"),
    ({"field": "age", "op": "between", "value": [5, 1]}, "value: the first value is greater than the second"),
    ({"field": "born", "op": "within_days", "value": 0}, "value: expected a whole number of days from 1"),
    ({"field": "born", "op": "within_days", "value": 1.5}, "value: expected a whole number of days"),
    ({"field": "born", "op": "within_days", "value": 3, "direction": "ahead"}, "direction: expected past or next, got 'ahead'"),
    ({"field": "age", "op": "=", "value": 3, "direction": "next"}, "direction: only within_days has a direction"),
    ({"field": "age", "op": "=", "valu": 3}, "valu: not known beside `field`; did you mean 'value'?"),
    ({"in_list": "news", "extra": 1}, "extra: not known beside `in_list`; nothing may stand beside it"),
    ({"not_in_list": "nws"}, "not_in_list: unknown list 'nws'; did you mean 'news'?"),
    ({"did": "open", "campaign": "spring"}, "did: expected received, opened, clicked, got 'open'"),
    ({"did_not": "opened", "campaign": "sprng"}, "campaign: unknown campaign 'sprng'; did you mean 'spring'?"),
    ({"did": "opened", "campaign": "spring", "last": 2}, "last: give either campaign or last"),
    ({"did": "opened", "last": 0}, "last: expected a whole number of campaigns"),
    ({"did": "opened", "last": 1, "within_days": True}, "within_days: expected a whole number of days"),
    ({"sample": 10}, "sample: expected {percent: 10, seed: spring}, got 10"),
    ({"sample": {"percent": 101, "seed": 1}}, "sample.percent: expected a number above 0"),
    ({"sample": {"percent": 1, "seed": None}}, "sample.seed: expected a number or text"),
    ({"any": [{"field": "city", "op": "=", "value": "x"}] * 1001}, "any[999]: more than 1000 conditions"),
]


@pytest.mark.parametrize(("tree", "message"), REFUSED)
def test_what_cannot_work_is_refused_with_its_place(tree: Any, message: str) -> None:
    with pytest.raises(CriteriaError) as caught:
        parse(tree, CATALOGUE)
    assert str(caught.value).startswith(message)


def test_a_tree_too_deep_is_refused_before_python_gives_up() -> None:
    tree: dict[str, Any] = {"in_list": "news"}
    for _ in range(5_000):
        tree = {"not": tree}
    with pytest.raises(CriteriaError, match="nested deeper than 32 levels"):
        parse(tree, CATALOGUE)


def test_criteria_become_typed_and_name_columns_by_id() -> None:
    tree = {
        "all": [
            {"field": "city", "op": "=", "value": "MÜNCHEN"},
            {"field": "born", "op": "before", "value": dt.date(2000, 1, 1)},
            {"field": "created_at", "op": "after", "value": "2026-01-01T01:00:00+01:00"},
            {"field": "born", "op": "within_days", "value": 7, "direction": "next"},
            {"not_in_list": "news"},
            {"did": "opened", "last": 1},
            {"did": "clicked", "last": 5, "within_days": 3},
        ]
    }
    assert parse(tree, CATALOGUE) == AllOf(
        (
            Comparison("f1", "text", "=", ("münchen",)),
            Comparison("f4", "date", "<", (dt.date(2000, 1, 1),)),
            Comparison("created_at", "datetime", ">", (JANUARY,)),
            WithinDays("f4", "date", 7, "next"),
            Not(InList("l1")),
            Behaviour("opened", (2,), None),
            Behaviour("clicked", (2, 1), 3),
        )
    )
