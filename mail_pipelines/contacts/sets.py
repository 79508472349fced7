"""Writing many rows with few statements: what the modules of this package share."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import TypeVar

import sqlalchemy as sa

from mail_pipelines.database.models import Base

T = TypeVar("T")
# Values of one IN list; SQLite takes 32,766 parameters.
_SLICE = 5_000


def slices(values: Iterable[T]) -> Iterator[list[T]]:
    """The values in lists that fit into one IN list."""
    remaining = iter(values)
    while chosen := list(itertools.islice(remaining, _SLICE)):
        yield chosen


def insert_if_absent(table: type[Base]) -> sa.Insert:
    """An insert that leaves out rows whose key exists and counts only those it made."""
    insert = sa.insert(table).prefix_with("OR IGNORE", dialect="sqlite")
    return insert.prefix_with("IGNORE", dialect="mysql").prefix_with("IGNORE", dialect="mariadb")
