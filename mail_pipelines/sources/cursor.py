"""Cursors: the highest value of a column that was merged, as the source writes it: a number, or a time in ISO 8601."""

from __future__ import annotations

import datetime as dt
import re
from typing import TYPE_CHECKING

from mail_pipelines.sources import texts
from mail_pipelines.sources.errors import SourceError

if TYPE_CHECKING:
    import pyarrow as pa

_NUMBER = re.compile(r"-?\d+(\.\d+)?")
_TIME = re.compile(r"(\d{4}-\d{2}-\d{2})([T ])(\d{2}:\d{2}:\d{2})(?:[.,]\d+)?\s?(Z|[+-]\d{2}:?\d{2})?")
# A clock that is wrong by more would stop the cursor for ever.
_AHEAD = dt.timedelta(days=1)


def order(text: str) -> tuple[int, float]:
    """A key to compare by. Raises `SourceError` for what is neither number nor time."""
    if _NUMBER.fullmatch(text):
        return 0, float(text)
    return 1, _moment(text).timestamp()


def _moment(text: str) -> dt.datetime:
    try:
        if not _TIME.fullmatch(text):
            raise ValueError
        value = dt.datetime.fromisoformat(text.replace(",", ".").replace(" Z", "Z"))
    except ValueError:
        raise SourceError("the cursor's column holds neither numbers nor times in ISO 8601: choose another column, or leave `cursor` out") from None
    return value if value.tzinfo else value.replace(tzinfo=dt.UTC)


def highest(given: pa.Array, so_far: str | None, now: dt.datetime) -> str | None:
    """The highest value of a column of texts, of those that are not in the future. Raises `SourceError`."""
    best = so_far
    for text in _candidates(given, now):
        if not text or not text.strip():
            continue
        key = order(text.strip())
        if key[0] == 1 and key[1] > (now + _AHEAD).timestamp():
            continue
        if best is None or key > order(best):
            best = text.strip()
    return best


def _candidates(given: pa.Array, now: dt.datetime) -> list[str | None]:
    """The one text that matters if all are times in the usual form, as a database writes them, else all."""
    import pyarrow as pa
    import pyarrow.compute as pc

    given = given.drop_null()
    times = texts.usual_moments(given)
    if times.null_count:
        return list(given.to_pylist())
    # A time in the future does not count.
    limit = pa.scalar((now + _AHEAD).astimezone(dt.UTC).replace(tzinfo=None), pa.timestamp("us"))
    latest = pc.max(times.filter(pc.less_equal(times, limit)))
    return [given[pc.index(times, latest).as_py()].as_py()] if latest.is_valid else []


def since(text: str, overlap: float) -> str:
    """The value from which the source is asked: `overlap` before the cursor, in the same form."""
    if _NUMBER.fullmatch(text):
        value = float(text) - overlap
        return str(int(value)) if value.is_integer() else str(value)
    match = _TIME.fullmatch(text)
    assert match is not None
    before = dt.datetime.fromisoformat(f"{match[1]}T{match[3]}") - dt.timedelta(seconds=overlap)
    return before.strftime(f"%Y-%m-%d{match[2]}%H:%M:%S") + (match[4] or "")


def as_time(text: str) -> dt.datetime:
    """A cursor as a time in UTC without zone, for a column of a database that holds such. Raises `SourceError`."""
    return _moment(text).astimezone(dt.UTC).replace(tzinfo=None)
