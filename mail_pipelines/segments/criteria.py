"""Criteria of a segment: a tree of plain values (YAML, JSON) checked and turned into frozen dataclasses.

    all:
      - {field: city, op: in, value: [Berlin, Hamburg]}
      - {in_list: news}
      - {did: opened, last: 5, within_days: 30}
      - not: {field: age, op: "<", value: 18}
      - {sample: {percent: 10, seed: spring}}

What is true of a contact:

* A comparison with an absent value is false, `!=` too. `not` is plain negation, so `not: {field: age, op: "=", value: 3}` holds for a contact
  without an age. `empty` is true of an absent value and of text without characters. `all: []` is true, `any: []` false.
* Text is compared without regard to case (`text.fold`).
* A date stands for its midnight UTC where it is compared with a point in time. `within_days: N` looks back N days, or forward with
  `direction: next`, both ends included; for a date field the days are calendar days in UTC.
* `did` / `did_not` speak of `received`, `opened` or `clicked`: for one `campaign`, for any of the `last: K` campaigns that were started, or, with neither,
  for any campaign. `within_days` looks back from now. Opens and clicks made by machines do not count.
* `sample` takes `percent` of all contacts by a hash of contact id and seed: always the same ones (`sampling`).

What does not belong here: how a tree is evaluated (`compilation`, `evaluation`).
"""

from __future__ import annotations

import datetime as dt
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from mail_pipelines.errors import MailPipelinesError, nearest
from mail_pipelines.segments.catalogue import Catalogue, FieldType
from mail_pipelines.segments.text import fold

MAX_DEPTH = 32
MAX_NODES = 1_000
MAX_VALUES = 10_000
MAX_DAYS = 36_500

T = TypeVar("T")
Scalar = str | float | bool | dt.date | dt.datetime
BehaviourKind = Literal["received", "opened", "clicked"]
BEHAVIOURS: tuple[BehaviourKind, ...] = ("received", "opened", "clicked")

_ORDER = ("=", "!=", "<", "<=", ">", ">=", "between")
_TIME = (*_ORDER, "before", "after", "within_days")
OPERATORS: Mapping[FieldType, tuple[str, ...]] = {
    "text": ("=", "!=", "contains", "starts_with", "ends_with", "in", "empty"),
    "number": (*_ORDER, "empty"),
    "boolean": ("=", "!=", "empty"),
    "date": (*_TIME, "empty"),
    "datetime": (*_TIME, "empty"),
}
_SYNONYMS = {"before": "<", "after": ">"}


class CriteriaError(MailPipelinesError):
    """Criteria that cannot be used. The message begins with the place in the tree, as in `all[1].field`."""


@dataclass(frozen=True)
class Comparison:
    """`operand` has one value, two for between, any number for in, none for empty; text is folded, times are aware."""

    column: str
    type: FieldType
    operator: str
    operand: tuple[Scalar, ...]


@dataclass(frozen=True)
class WithinDays:
    column: str
    type: FieldType
    days: int
    direction: Literal["past", "next"]


@dataclass(frozen=True)
class InList:
    column: str


@dataclass(frozen=True)
class Behaviour:
    """`campaigns` are ids, or None for any campaign."""

    kind: BehaviourKind
    campaigns: tuple[int, ...] | None
    within_days: int | None


@dataclass(frozen=True)
class Sample:
    percent: float
    seed: str


@dataclass(frozen=True)
class AllOf:
    children: tuple[Criteria, ...]


@dataclass(frozen=True)
class AnyOf:
    children: tuple[Criteria, ...]


@dataclass(frozen=True)
class Not:
    child: Criteria


Criteria = Comparison | WithinDays | InList | Behaviour | Sample | AllOf | AnyOf | Not


def parse(tree: object, catalogue: Catalogue) -> Criteria:
    """Check a tree of plain values against what the catalogue knows. Raises `CriteriaError`, which names the place."""
    return _Parser(catalogue).node(tree, "", 0)


class _Parser:
    def __init__(self, catalogue: Catalogue) -> None:
        self.catalogue = catalogue
        self.fields = catalogue.field_by_key()
        self.lists = {known.key: known for known in catalogue.lists}
        self.campaigns = {known.key: known for known in catalogue.campaigns}
        self.nodes = 0
        self.forms: dict[str, tuple[Callable[[Mapping[str, Any], str, int], Criteria], frozenset[str]]] = {
            "all": (lambda node, path, depth: AllOf(self.children(node["all"], f"{path}all", depth)), frozenset()),
            "any": (lambda node, path, depth: AnyOf(self.children(node["any"], f"{path}any", depth)), frozenset()),
            "not": (lambda node, path, depth: Not(self.node(node["not"], f"{path}not", depth + 1)), frozenset()),
            "field": (lambda node, path, _: self.field(node, path), frozenset({"op", "value", "direction"})),
            "in_list": (lambda node, path, _: self.in_list(node, path, "in_list"), frozenset()),
            "not_in_list": (lambda node, path, _: Not(self.in_list(node, path, "not_in_list")), frozenset()),
            "did": (lambda node, path, _: self.behaviour(node, path, "did"), frozenset({"campaign", "last", "within_days"})),
            "did_not": (lambda node, path, _: Not(self.behaviour(node, path, "did_not")), frozenset({"campaign", "last", "within_days"})),
            "sample": (lambda node, path, _: self.sample(node["sample"], f"{path}sample"), frozenset()),
        }

    def node(self, tree: object, path: str, depth: int) -> Criteria:
        self.nodes += 1
        if depth > MAX_DEPTH:
            raise _error(path, f"nested deeper than {MAX_DEPTH} levels")
        if self.nodes > MAX_NODES:
            raise _error(path, f"more than {MAX_NODES} conditions")
        if not isinstance(tree, Mapping):
            raise _error(path, f"expected a condition such as {{field: city, op: '=', value: Berlin}}, got {_shown(tree)}")
        form = [key for key in tree if key in self.forms]
        if len(form) != 1:
            if form:
                raise _error(path, f"{' and '.join(form)} cannot stand in one condition; put them below `all`")
            raise _error(path, f"no condition known by {', '.join(map(_shown, tree)) or 'an empty mapping'}; {nearest(next(iter(tree), ''), self.forms)}")
        build, extra = self.forms[form[0]]
        prefix = f"{path}." if path else ""
        for key in tree:
            if key != form[0] and key not in extra:
                raise _error(f"{prefix}{key}", f"not known beside `{form[0]}`; {nearest(key, extra) if extra else 'nothing may stand beside it'}")
        return build(tree, prefix, depth)

    def children(self, trees: object, path: str, depth: int) -> tuple[Criteria, ...]:
        if not isinstance(trees, list | tuple):
            raise _error(path, f"expected a list of conditions, got {_shown(trees)}")
        return tuple(self.node(tree, f"{path}[{number}]", depth + 1) for number, tree in enumerate(trees))

    def field(self, node: Mapping[str, Any], path: str) -> Criteria:
        field = _known(node["field"], self.fields, f"{path}field", "field")
        operator = node.get("op")
        allowed = OPERATORS[field.type]
        if operator not in allowed:
            given = f"unknown operator {_shown(operator)}" if "op" in node else "no operator"
            raise _error(f"{path}op", f"{given} for {field.key}, a {field.type} field; known: {', '.join(allowed)}")
        if "direction" in node and operator != "within_days":
            raise _error(f"{path}direction", "only within_days has a direction")
        if operator == "empty":
            if "value" in node:
                raise _error(f"{path}value", "empty takes no value")
            return Comparison(field.column, field.type, "empty", ())
        value, at = node.get("value"), f"{path}value"
        if operator == "within_days":
            direction = node.get("direction", "past")
            if direction not in ("past", "next"):
                raise _error(f"{path}direction", f"expected past or next, got {_shown(direction)}")
            return WithinDays(field.column, field.type, _whole(value, at, MAX_DAYS, "days"), direction)
        if operator in ("in", "between"):
            if not isinstance(value, list | tuple) or not value:
                raise _error(at, f"{operator} takes a list of values, got {_shown(value)}")
            if operator == "between" and len(value) != 2:
                raise _error(at, f"between takes two values, got {len(value)}")
            if len(value) > MAX_VALUES:
                raise _error(at, f"at most {MAX_VALUES:,} values, got {len(value):,}")
            operand = tuple(_operand(item, field.type, f"{at}[{number}]") for number, item in enumerate(value))
            if operator == "between" and operand[0] > operand[1]:  # type: ignore[operator]
                raise _error(at, f"the first value is greater than the second: {_shown(value)}")
        else:
            operand = (_operand(value, field.type, at),)
        return Comparison(field.column, field.type, _SYNONYMS.get(operator, operator), operand)

    def in_list(self, node: Mapping[str, Any], path: str, form: str) -> Criteria:
        return InList(_known(node[form], self.lists, f"{path}{form}", "list").column)

    def behaviour(self, node: Mapping[str, Any], path: str, form: str) -> Criteria:
        kind = node[form]
        if kind not in BEHAVIOURS:
            raise _error(f"{path}{form}", f"expected {', '.join(BEHAVIOURS)}, got {_shown(kind)}")
        campaigns: tuple[int, ...] | None = None
        if "campaign" in node and "last" in node:
            raise _error(f"{path}last", "give either campaign or last")
        if "campaign" in node:
            campaigns = (_known(node["campaign"], self.campaigns, f"{path}campaign", "campaign").id,)
        elif "last" in node:
            campaigns = self.catalogue.last_campaigns(_whole(node["last"], f"{path}last", MAX_VALUES, "campaigns"))
        days = _whole(node["within_days"], f"{path}within_days", MAX_DAYS, "days") if "within_days" in node else None
        return Behaviour(kind, campaigns, days)

    def sample(self, node: object, path: str) -> Criteria:
        if not isinstance(node, Mapping) or set(node) != {"percent", "seed"}:
            raise _error(path, f"expected {{percent: 10, seed: spring}}, got {_shown(node)}")
        percent, seed = node["percent"], node["seed"]
        if isinstance(percent, bool) or not isinstance(percent, int | float) or not 0 < percent <= 100:
            raise _error(f"{path}.percent", f"expected a number above 0 and up to 100, got {_shown(percent)}")
        if isinstance(seed, bool) or not isinstance(seed, int | str):
            raise _error(f"{path}.seed", f"expected a number or text, got {_shown(seed)}")
        return Sample(float(percent), str(seed))


def _operand(value: object, type_: FieldType, path: str) -> Scalar:
    """One operand in the type of its field."""
    if type_ == "text" and isinstance(value, str):
        return fold(value)
    if type_ == "number" and isinstance(value, int | float) and not isinstance(value, bool):
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
        if math.isfinite(number):
            return number
    if type_ == "boolean" and isinstance(value, bool):
        return value
    if type_ in ("date", "datetime"):
        moment = _moment(value)
        if type_ == "datetime" and moment is not None:
            try:
                return as_instant(moment)
            except OverflowError as error:
                raise _error(path, f"{_shown(value)} lies outside the years 1 to 9999 in UTC") from error
        if type_ == "date" and moment is not None and not isinstance(moment, dt.datetime):
            return moment
    examples = {"text": "text", "number": "a number", "boolean": "true or false", "date": "a date such as 2026-01-31"}
    wanted = examples.get(type_, "a date or time such as 2026-01-31 or 2026-01-31T08:00:00Z")
    raise _error(path, f"expected {wanted}, got {_shown(value)}")


def _moment(value: object) -> dt.date | dt.datetime | None:
    if isinstance(value, dt.date):
        return value
    if isinstance(value, str):
        for kind in (dt.date, dt.datetime):
            try:
                return kind.fromisoformat(value)
            except ValueError:
                continue
    return None


def as_instant(moment: dt.date | dt.datetime) -> dt.datetime:
    """A point in time in UTC: a date is its midnight, a time without zone is taken as UTC."""
    if not isinstance(moment, dt.datetime):
        moment = dt.datetime.combine(moment, dt.time())
    return moment.replace(tzinfo=dt.UTC) if moment.tzinfo is None else moment.astimezone(dt.UTC)


def _whole(value: object, path: str, most: int, unit: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
        raise _error(path, f"expected a whole number of {unit} from 1 to {most:,}, got {_shown(value)}")
    return value


def _known(key: object, known: Mapping[str, T], path: str, what: str) -> T:
    if isinstance(key, str) and key in known:
        return known[key]
    raise _error(path, f"unknown {what} {_shown(key)}; {nearest(key, known)}")


def _shown(value: object) -> str:
    """A value as an error shows it, cut short."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}…"


def _error(path: str, message: str) -> CriteriaError:
    return CriteriaError(f"{path or 'criteria'}: {message}")
