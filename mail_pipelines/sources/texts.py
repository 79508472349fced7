"""What a column of texts says: yes, deleted, a time. No two services write these alike.

What many rows say alike is looked at once, and times in the usual form are read by Arrow, many at a time.
"""

from __future__ import annotations

import datetime as dt
import re
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING

from mail_pipelines.contacts import fields
from mail_pipelines.contacts.attributes import DAY

if TYPE_CHECKING:
    import pyarrow as pa

_EPOCH = re.compile(r"\d{9,13}(\.\d+)?")
# In the syntax of RE2; each is a time in UTC.
_USUAL = rf"^{DAY}[T ](?:[01]\d|2[0-3]):[0-5]\d:[0-5]\d(?:\.\d{{1,6}})?Z?$"


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


def that(says: Callable[[str | None], bool], texts: pa.Array) -> pa.Array:
    """Of each text whether it says that (`is_true`, `is_marked`)."""
    import pyarrow as pa
    import pyarrow.compute as pc

    saying = [text for text in texts.unique().to_pylist() if text is not None and says(text)]
    return pc.is_in(texts, value_set=pa.array(saying, pa.string()))


def moments(texts: pa.Array) -> tuple[pa.Array, dict[int, str]]:
    """Each text as a `moment`, in microseconds of UTC without zone, null for nothing; and the rows whose text is none, with the reason."""
    import pyarrow as pa
    import pyarrow.compute as pc

    times = usual_moments(texts)
    odd = pc.indices_nonzero(pc.and_(pc.is_null(times), pc.is_valid(texts)))
    if not len(odd):
        return times, {}
    problems: dict[int, str] = {}
    found = times.to_pylist()
    for row, text in zip(odd.to_pylist(), texts.take(odd).to_pylist(), strict=True):
        try:
            value = moment(text)
            found[row] = value and value.replace(tzinfo=None)
        except ValueError as error:
            problems[row] = str(error)
    return pa.array(found, pa.timestamp("us")), problems


def usual_moments(texts: pa.Array) -> pa.Array:
    """Of `moments` those that are written as databases write them, `2026-11-24 09:30:00` or with T and Z; null for the others."""
    import pyarrow as pa
    import pyarrow.compute as pc

    usual = pc.fill_null(pc.match_substring_regex(texts, _USUAL), False)
    # Arrow reads a time without zone, and takes a blank or a T.
    return pc.utf8_rtrim(pc.if_else(usual, texts, pa.scalar(None, pa.string())), "Z").cast(pa.timestamp("us"))
