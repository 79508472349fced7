"""Criteria about a contact's own values as DuckDB expressions over the columns of the contact snapshot. No query text is ever built.

What does not belong here: behaviour, which needs the engagement snapshot (`matching`). Imports duckdb: import this inside functions.
"""

from __future__ import annotations

import datetime as dt
import functools
import operator
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import duckdb
from duckdb import CaseExpression, ColumnExpression, ConstantExpression, Expression, FunctionExpression

from mail_pipelines.segments.catalogue import FieldType
from mail_pipelines.segments.criteria import AllOf, AnyOf, Behaviour, Comparison, Criteria, InList, Not, Sample, Scalar, WithinDays, as_instant
from mail_pipelines.segments.manifest import Part
from mail_pipelines.segments.sampling import LAST_SHIFT, MASK, ROUNDS, seed_number, threshold

SQL_TYPES: dict[FieldType, str] = {"text": "VARCHAR", "number": "DOUBLE", "boolean": "BOOLEAN", "date": "DATE", "datetime": "TIMESTAMP"}
TRUE, FALSE = ConstantExpression(True), ConstantExpression(False)
CONTACT_ID, PROVIDER = ColumnExpression("contact_id"), ColumnExpression("provider")

_COMPARE: Mapping[str, Callable[[Expression, Expression], Expression]] = {
    "=": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
    "contains": lambda column, value: FunctionExpression("contains", column, value),
    "starts_with": lambda column, value: FunctionExpression("starts_with", column, value),
    "ends_with": lambda column, value: FunctionExpression("suffix", column, value),
}


def connect() -> duckdb.DuckDBPyConnection:
    """A connection of its own that keeps nothing and fetches no extensions."""
    return duckdb.connect(config={"autoinstall_known_extensions": False, "autoload_known_extensions": False})


def both(left: Expression, right: Expression) -> Expression:
    return left & right


def either(left: Expression, right: Expression) -> Expression:
    return left | right


def has_behaviour(criteria: Criteria) -> bool:
    match criteria:
        case Behaviour():
            return True
        case AllOf(children) | AnyOf(children):
            return any(map(has_behaviour, children))
        case Not(child):
            return has_behaviour(child)
        case _:
            return False


def columns_of(criteria: Criteria) -> dict[str, str]:
    """The columns that criteria without behaviour read, with their SQL types."""
    match criteria:
        case AllOf(children) | AnyOf(children):
            return {name: type_ for child in children for name, type_ in columns_of(child).items()}
        case Not(child):
            return columns_of(child)
        case Comparison(column=column, type=type_) | WithinDays(column=column, type=type_):
            return {column: SQL_TYPES[type_]}
        case InList(column):
            return {column: "BOOLEAN"}
        case _:
            return {}


def expression(criteria: Criteria, now: dt.datetime) -> Expression:
    """True or not: NULL means that an absent value was compared, and is as good as false in a filter, below AND and OR, but not below NOT."""
    match criteria:
        case AllOf(children):
            return functools.reduce(both, [expression(child, now) for child in children], TRUE) if len(children) != 1 else expression(children[0], now)
        case AnyOf(children):
            return functools.reduce(either, [expression(child, now) for child in children], FALSE)
        case Not(child):
            return ~definite(expression(child, now))
        case Comparison():
            return _comparison(criteria)
        case WithinDays(column, type_, days, direction):
            here: dt.date = now.date() if type_ == "date" else now
            there = here + dt.timedelta(days=days if direction == "next" else -days)
            low, high = sorted((here, there))
            return (ColumnExpression(column) >= _constant(low)) & (ColumnExpression(column) <= _constant(high))
        case InList(column):
            return ColumnExpression(column)
        case Sample(percent, seed):
            return _hashed(seed) < ConstantExpression(threshold(percent))
        case _:
            raise TypeError(f"{type(criteria).__name__} needs the engagement snapshot")


def definite(condition: Expression) -> Expression:
    """`condition` with NULL as false."""
    return CaseExpression(condition, TRUE).otherwise(FALSE)


def _comparison(criteria: Comparison) -> Expression:
    column = ColumnExpression(criteria.column)
    if criteria.column == "time_zone":
        # The one text column kept as it was given.
        column = FunctionExpression("lower", column)
    operands = [_constant(value) for value in criteria.operand]
    match criteria.operator:
        case "empty":
            return column.isnull() | (column == ConstantExpression("")) if criteria.type == "text" else column.isnull()
        case "in":
            return column.isin(*operands)
        case "between":
            return (column >= operands[0]) & (column <= operands[1])
        case compared:
            return _COMPARE[compared](column, operands[0])


def _constant(value: Scalar) -> Expression:
    # Columns hold naive UTC.
    return ConstantExpression(as_instant(value).replace(tzinfo=None) if isinstance(value, dt.datetime) else value)


def _hashed(seed: str) -> Expression:
    mask = ConstantExpression(MASK)
    mixed = _call("xor", _call("&", CONTACT_ID, mask), _call("&", _call(">>", CONTACT_ID, ConstantExpression(32)), mask))
    mixed = _call("xor", mixed, ConstantExpression(seed_number(seed)))
    for shift, multiplier in ROUNDS:
        mixed = _call("xor", mixed, _call(">>", mixed, ConstantExpression(shift)))
        mixed = _call("&", mixed * ConstantExpression(multiplier), mask)
    return _call("xor", mixed, _call(">>", mixed, ConstantExpression(LAST_SHIFT)))


def _call(name: str, left: Expression, right: Expression) -> Expression:
    return FunctionExpression(name, left.cast("BIGINT"), right.cast("BIGINT"))


def scan(connection: duckdb.DuckDBPyConnection, folder: Path, parts: Iterable[Part], columns: Mapping[str, str]) -> duckdb.DuckDBPyRelation | None:
    """The `columns` (name to SQL type) of the parts; what a part lacks is NULL. None if there is no part."""
    groups: dict[frozenset[str], list[str]] = defaultdict(list)
    for part in parts:
        groups[frozenset(columns).intersection(part.columns)].append(str(folder / part.name))
    relations = [
        connection.read_parquet(paths).select(
            *[ColumnExpression(name) if name in present else ConstantExpression(None).cast(type_).alias(name) for name, type_ in columns.items()]
        )
        for present, paths in groups.items()
    ]
    return functools.reduce(lambda left, right: left.union(right), relations) if relations else None
