"""Field types: whole columns are read as single texts are, and types are guessed narrowly."""

from __future__ import annotations

import json

import pyarrow as pa
import pytest
import sqlalchemy as sa
from hypothesis import given
from hypothesis import strategies as st

from mail_pipelines.contacts import attributes, fields
from mail_pipelines.contacts.fields import FIELD_TYPES, FieldError, FieldType
from mail_pipelines.database.engine import reading, transact
from tests.contacts.conftest import NOW

TEXTS = st.one_of(
    st.none(),
    st.text(max_size=12),
    st.from_regex(r"\A[+-]?[0-9]{0,17}\.?[0-9]{0,6}(e[+-]?[0-9]{1,3})?\Z"),
    st.from_regex(r"\A[0-9]{4}-[0-3][0-9]-[0-3][0-9]([T ][0-2][0-9]:[0-5][0-9](:[0-6][0-9](\.[0-9]{1,6})?)?(Z|[+-][0-1][0-9]:[0-5][0-9])?)?\Z"),
    st.dates().map(str),
    st.datetimes().map(lambda value: value.isoformat() + "Z"),
    st.floats(allow_nan=False, allow_infinity=False).map(str),
    st.sampled_from(["true", "False", "YES", "0", "1", "-0", "0.10", '"', "\\", "\x00", "\u2028", "x" * 4097]),
)


def obvious(text: str, type_: FieldType) -> tuple[fields.Value | None, str | None]:
    try:
        return fields.parse_value(text.strip(), type_), None
    except ValueError as error:
        return None, str(error)


@given(st.lists(TEXTS, max_size=8), st.sampled_from(FIELD_TYPES))
def test_a_column_is_read_as_its_texts_are(texts: list[str | None], type_: FieldType) -> None:
    encoded, problems = attributes.encode(pa.array(texts, pa.string()), type_)
    for number, (text, value) in enumerate(zip(texts, encoded.to_pylist(), strict=True)):
        if not text or not text.strip():
            assert value is None
            continue
        expected, problem = obvious(text, type_)
        assert problems.pop(number, None) == problem
        assert (None if value is None else json.loads(value)) == expected
        assert value is None or type(json.loads(value)) is type(expected)
    assert problems == {}


@given(st.lists(st.lists(st.one_of(st.none(), st.text(max_size=6)), min_size=3, max_size=3), max_size=6))
def test_joined_columns_are_one_object_a_row(rows: list[list[str | None]]) -> None:
    columns = {key: pa.array([None if row[number] is None else json.dumps(row[number]) for row in rows], pa.string()) for number, key in enumerate("abc")}
    expected = [{key: value for key, value in zip("abc", row, strict=True) if value is not None} for row in rows]
    joined = attributes.join(columns, len(rows)).to_pylist()
    assert [json.loads(text) for text in joined] == expected
    # Letter by letter as `json.dumps` writes it, which is what tells the database that nothing changed.
    assert joined == [json.dumps(value) for value in expected]


@pytest.mark.parametrize(
    ("texts", "type_"),
    [
        ([], "text"),
        (["yes", "No"], "boolean"),
        (["0", "1"], "number"),
        (["-1.5", "20"], "number"),
        (["01234", "99999"], "text"),
        (["+4912", "5"], "text"),
        (["1234567890123456"], "text"),
        (["2026-01-02", "1999-12-31"], "date"),
        (["2026-02-30"], "text"),
        (["2026-01-02T03:04:05Z", "2026-01-02 03:04"], "datetime"),
        (["2026-01-02", "2026-01-02 03:04"], "text"),
        (["1", "x"], "text"),
        (["1"] * 99 + ["many"], "number"),
        (["1"] * 98 + ["many", "few"], "text"),
        (["1"] * 1000 + ["many"] * 1000, "number"),
    ],
)
def test_types_are_guessed_narrowly(texts: list[str], type_: str) -> None:
    assert fields.infer_type(texts) == type_


def test_a_field_keeps_its_type(engine: sa.Engine) -> None:
    transact(engine, lambda connection: fields.declare(connection, "orders", "number", label="Orders", now=NOW))
    transact(engine, lambda connection: fields.declare(connection, "orders", "number", now=NOW))
    with pytest.raises(FieldError, match="'orders' is declared as number, not text"):
        transact(engine, lambda connection: fields.declare(connection, "orders", "text", now=NOW))
    with pytest.raises(FieldError, match="'first-name' is no field key"):
        transact(engine, lambda connection: fields.declare(connection, "first-name", "text", now=NOW))
    with reading(engine) as connection:
        assert fields.declared(connection) == {"orders": "number"}


def test_keys_are_made_of_column_names() -> None:
    assert fields.key_of("First Name") == "first_name"
    assert fields.key_of("Größe (cm)") == "groe_cm"
    assert fields.key_of("orders_2025") == "orders_2025"
    for name in ("2nd", "email", "***", "x" * 0):
        with pytest.raises(FieldError):
            fields.key_of(name)
