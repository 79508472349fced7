"""What a column of texts says: yes, deleted, a time. No two services write these alike."""

from __future__ import annotations

import datetime as dt
import re
from collections.abc import Collection

from mail_pipelines.contacts import fields

_EPOCH = re.compile(r"\d{9,13}(\.\d+)?")


def is_true(text: str | None) -> bool:
    """Whether a text says yes; anything else, and nothing, does not."""
    try:
        return bool(text) and fields.parse_value((text or "").strip(), "boolean") is True
    except ValueError:
        return False


def is_false(text: str | None) -> bool:
    """Whether a text says no; anything else, and nothing, does not."""
    try:
        return bool(text) and fields.parse_value((text or "").strip(), "boolean") is False
    except ValueError:
        return False


def is_one_of(text: str | None, words: Collection[str]) -> bool:
    """Whether a text is one of some words, in whatever case."""
    return bool(text) and (text or "").strip().casefold() in {word.strip().casefold() for word in words}


def is_marked(text: str | None) -> bool:
    """Whether a column says that the record is deleted: by yes, or by a time (of its deletion)."""
    if is_true(text):
        return True
    try:
        return moment(text) is not None and (text or "").strip() not in ("0", "1")
    except ValueError:
        return False


def moment(text: str | None) -> dt.datetime | None:
    """A time in ISO 8601, or in seconds or milliseconds since 1970; None for nothing. Raises `ValueError` with a reason."""
    given = (text or "").strip()
    if not given:
        return None
    if _EPOCH.fullmatch(given):
        seconds = float(given)
        return dt.datetime.fromtimestamp(seconds / 1000 if seconds >= 1e11 else seconds, dt.UTC)
    value = str(fields.parse_value(given, "datetime"))
    return dt.datetime.fromisoformat(value.replace("Z", "+00:00")).astimezone(dt.UTC)
