"""Custom fields of contacts: their keys and types, and what a text means in a type.

A contact's `attributes` is a JSON object of field key to value: text is a string, number a number, boolean true or false,
date `"YYYY-MM-DD"`, datetime `"YYYY-MM-DDTHH:MM:SS[.ffffff]Z"`. A field without value is left out, never null.
"""

from __future__ import annotations

import datetime as dt
import itertools
import math
import re
from collections.abc import Iterable, Sequence
from typing import Literal, get_args

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from mail_pipelines.contacts.sets import insert_if_absent
from mail_pipelines.database.models import Contact, Field
from mail_pipelines.errors import MailPipelinesError
from mail_pipelines.keys import MAX_LENGTH, InvalidKey, slug

FieldType = Literal["text", "number", "boolean", "date", "datetime"]
FIELD_TYPES: tuple[FieldType, ...] = get_args(FieldType)
Value = str | int | float | bool
TEXT_LENGTH = 4_096
# Above this a number no longer keeps all its digits as a double.
NUMBER_DIGITS = 15
# Texts by which a type is guessed.
SAMPLE = 1_000
_KEY = re.compile(r"[a-z][a-z0-9_]*")
# These names mean the contact's own columns in criteria and templates.
RESERVED = frozenset(column.key for column in sa.inspect(Contact).columns)
_BOOLEANS = {word: value for value, words in ((True, "true yes y t on 1"), (False, "false no n f off 0")) for word in words.split()}
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d{1,3})?", re.IGNORECASE)
_DATE = re.compile(r"\d{4}-\d{2}-\d{2}")
_DATETIME = re.compile(r"\d{4}-\d{2}-\d{2}([T ]\d{2}:\d{2}(:\d{2}([.,]\d{1,6})?)?\s?(Z|[+-]\d{2}:?\d{2})?)?", re.IGNORECASE)


class FieldError(MailPipelinesError):
    """A field key or type that cannot be used as given."""


def check_key(key: str) -> str:
    """`key` itself if it can name a field: 1 to 64 of a-z, 0-9 and underscore, a letter first (templates read it as a variable)."""
    if key in RESERVED:
        raise FieldError(f"field key {key!r} is the name of a built-in value of every contact; choose another")
    if not _KEY.fullmatch(key) or len(key) > MAX_LENGTH:
        raise FieldError(f"{key!r} is no field key: use 1 to {MAX_LENGTH} of a-z, 0-9 and underscore, beginning with a letter")
    return key


def key_of(name: str) -> str:
    """The field key of a column or label: `First name` becomes `first_name`. Raises `FieldError` if none can be made."""
    try:
        return check_key(slug(name, "field key").replace("-", "_"))
    except InvalidKey as error:
        raise FieldError(str(error)) from None


def check_type(text: str) -> FieldType:
    for known in FIELD_TYPES:
        if text == known:
            return known
    raise FieldError(f"{text!r} is no field type; expected one of {', '.join(FIELD_TYPES)}")


def declared(connection: Connection) -> dict[str, FieldType]:
    """The types of all fields by key."""
    return {row.key: check_type(row.type) for row in connection.execute(sa.select(Field.key, Field.type))}


def declare(connection: Connection, key: str, type_: FieldType, *, label: str | None = None, now: dt.datetime) -> None:
    """Make the field, or find it with the same type. Raises `FieldError` if it has another, for stored values would change their meaning."""
    row = {"key": check_key(key), "label": (label or key)[:200], "type": check_type(type_), "created_at": now}
    connection.execute(insert_if_absent(Field), row)
    stored = connection.execute(sa.select(Field.type).where(Field.key == key)).scalar_one()
    if stored != type_:
        raise FieldError(f"field {key!r} is declared as {stored}, not {type_}: use {stored}, or another key")


def parse_value(text: str, type_: FieldType) -> Value:
    """What a text without surrounding blanks means in a type, in its JSON form. Raises `ValueError` with a reason that does not repeat the text."""
    if type_ == "text":
        return _text(text)
    if type_ == "number":
        return _number(text)
    if type_ == "boolean":
        if (value := _BOOLEANS.get(text.lower())) is None:
            raise ValueError("not a boolean (true or false, yes or no, 1 or 0)")
        return value
    if type_ == "date":
        return _date(text)
    return _datetime(text)


def _text(text: str) -> str:
    if len(text) > TEXT_LENGTH:
        raise ValueError(f"longer than {TEXT_LENGTH} characters")
    if "\0" in text:
        raise ValueError("holds a NUL character")
    return text


def _number(text: str) -> int | float:
    if not text.isascii() or not _NUMBER.fullmatch(text):
        raise ValueError("not a number (like 12 or -3.5)")
    value = float(text)
    if not math.isfinite(value) or abs(value) >= 10**NUMBER_DIGITS:
        raise ValueError(f"a number of more than {NUMBER_DIGITS} digits (text keeps them)")
    return int(value) if value.is_integer() else value


def _date(text: str) -> str:
    if text.isascii() and _DATE.fullmatch(text):
        try:
            return dt.date.fromisoformat(text).isoformat()
        except ValueError:
            raise ValueError("a day that the calendar does not have") from None
    raise ValueError("not a date (like 2026-11-24)")


def _datetime(text: str) -> str:
    if not text.isascii() or not _DATETIME.fullmatch(text):
        raise ValueError("not a time (like 2026-11-24T09:30:00Z)")
    try:
        value = dt.datetime.fromisoformat(text.upper().replace(",", ".").replace(" Z", "Z"))
        value = value.replace(tzinfo=dt.UTC) if value.tzinfo is None else value.astimezone(dt.UTC)
    except (ValueError, OverflowError):
        raise ValueError("a time that the calendar does not have") from None
    return value.replace(tzinfo=None).isoformat() + "Z"


def infer_type(texts: Iterable[str]) -> FieldType:
    """The narrowest type that the first texts have but for one in a hundred, so that a bad row among many does not make text of numbers.

    It is text if there are none. Numbers with leading zeros or a plus are codes, so they are text.
    """
    sample = list(itertools.islice(texts, SAMPLE))
    candidates: tuple[FieldType, ...] = ("boolean", "number", "date", "datetime")
    return next((type_ for type_ in candidates if sample and fits(sample, type_)), "text")


def fits(sample: Sequence[str], type_: FieldType) -> bool:
    """Whether texts without surrounding blanks are of a type, but for one in a hundred."""
    allowed = len(sample) // 100
    misfits = itertools.islice((text for text in sample if not _looks_like(text, type_)), allowed + 1)
    return len(list(misfits)) <= allowed


def _looks_like(text: str, type_: FieldType) -> bool:
    if type_ == "boolean" and text.lower() not in ("true", "false", "yes", "no"):
        return False
    if type_ == "number" and not re.fullmatch(r"-?(0|[1-9]\d*)(\.\d+)?", text):
        return False
    if type_ == "datetime" and len(text) <= len("2026-11-24"):
        return False
    try:
        parse_value(text, type_)
    except ValueError:
        return False
    return True
