"""Time zones of contacts: names of the IANA database, as in `Europe/Berlin`."""

from __future__ import annotations

import functools
import zoneinfo
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pyarrow as pa

# Files beside the zones: the host's own, and what stands for none.
_NO_ZONES = frozenset({"localtime", "Factory"})


@functools.cache
def names() -> frozenset[str]:
    """All zones that this host knows."""
    return frozenset(zoneinfo.available_timezones() - _NO_ZONES)


def normal(text: str) -> str | None:
    """The name as the database has it, whatever its case; None if there is no such zone."""
    return _by_lower_case().get(text.strip().lower())


@functools.cache
def _by_lower_case() -> dict[str, str]:
    return {name.lower(): name for name in names()}


def encode(texts: pa.Array) -> tuple[pa.Array, dict[int, str]]:
    """Each text as the name of its zone, null for an empty one; and the rows whose text names none, with the reason."""
    import pyarrow as pa

    # Few zones, many rows.
    found = {text: normal(text) for text in texts.unique().to_pylist() if text and text.strip()}
    values = texts.to_pylist()
    problems = {
        row: f"{text[:60]!r} is no time zone: expected a name of the IANA database, as Europe/Berlin"
        for row, text in enumerate(values)
        if text in found and found[text] is None
    }
    return pa.array([found.get(text) for text in values], pa.string()), problems
