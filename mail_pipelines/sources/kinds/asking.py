"""The request of a REST source: what stands in braces in its texts becomes what is wanted.

    {columns}    the mapped columns: a list where it is the whole of a value, else with commas (`SELECT {columns} FROM Contact`)
    {selection}  the mapped columns as GraphQL selects them: `id name { first last }`
    {since}      from when changes are wanted, in UTC as RFC 3339 has it; a number if the cursor is one
    {since_ms}   the same in milliseconds since 1970
    {after}      the value of the last record of the page before (`paging: {type: keyset}`)

Columns are names of the declaration, times and numbers are written here: nothing that a service says gets into a query, except by `{after}`, which is a word.
"""

from __future__ import annotations

import datetime as dt
import re
from collections.abc import Iterable, Mapping
from typing import Any

from mail_pipelines.sources import cursor
from mail_pipelines.sources.errors import SourceError

BEGINNING = "1970-01-01T00:00:00Z"
_PLACE = re.compile(r"\{(columns|selection|since|since_ms|after)\}")
_COLUMN = re.compile(r"[A-Za-z_][A-Za-z0-9_]*(\.[A-Za-z_][A-Za-z0-9_]*)*")
_AFTER = re.compile(r"[A-Za-z0-9_.:+/=-]{1,190}")
Values = Mapping[str, str | list[str]]


def values(columns: Iterable[str], under: str | None, since: str | None) -> dict[str, str | list[str]]:
    """What the places of a request stand for; `under` leaves only the columns that are nested in that one, without its name."""
    within = f"{under}." if under else ""
    names = [column.removeprefix(within) for column in columns if column.startswith(within)]
    return {"columns": names, **_times(since or BEGINNING)}


def _times(since: str) -> dict[str, str]:
    if cursor.order(since)[0] == 0:
        return {"since": since, "since_ms": since}
    moment = cursor.as_time(since).replace(tzinfo=dt.UTC)
    return {"since": f"{moment:%Y-%m-%dT%H:%M:%SZ}", "since_ms": str(int(moment.timestamp() * 1000))}


def after(value: Any) -> str:
    """The last record's value as `{after}`. Raises `SourceError` if it is no word."""
    text = str(value)
    if value is None or not _AFTER.fullmatch(text):
        raise SourceError("the last record of a page has no usable value in the column of read.paging: choose its id")
    return text


def filled(tree: Any, given: Values) -> Any:
    """A copy of a request's part with all places filled. Raises `SourceError` for a column that cannot stand in a query."""
    if isinstance(tree, dict):
        return {name: filled(value, given) for name, value in tree.items()}
    if isinstance(tree, list):
        return [filled(value, given) for value in tree]
    if not isinstance(tree, str):
        return tree
    if tree == "{columns}":
        return given["columns"]
    return _PLACE.sub(lambda place: _text(place[1], given), tree)


def _text(place: str, given: Values) -> str:
    if place in ("columns", "selection"):
        names = list(given["columns"])
        if wrong := [name for name in names if not _COLUMN.fullmatch(name)]:
            raise SourceError(f"map: {wrong[0]!r} cannot stand in the query of read: expected letters, digits and _, with dots between nested names")
        return ", ".join(names) if place == "columns" else _selection(names)
    found = given.get(place, "")
    assert isinstance(found, str)
    return found


def _selection(names: Iterable[str]) -> str:
    tree: dict[str, Any] = {}
    for name in names:
        place = tree
        for part in name.split("."):
            place = place.setdefault(part, {})
    return _braced(tree)


def _braced(tree: Mapping[str, Any]) -> str:
    return " ".join(f"{name} {{ {_braced(inner)} }}" if inner else name for name, inner in tree.items())
