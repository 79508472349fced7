"""What a check says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

# Of many things of one kind the first so many are named.
SHOWN = 5


@dataclass(frozen=True)
class Finding:
    """One problem: what was looked at, what is wrong, what to do."""

    check: str
    problem: str
    remedy: str


def names(names: Sequence[str]) -> str:
    """The first of them, and how many more there are."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
