"""Watching how large the transactions of bulk writers are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import sqlalchemy as sa


@contextmanager
def sizes_of_transactions(engine: sa.Engine, statement: str) -> Iterator[list[int]]:
    """How many rows each transaction changes by statements that begin with `statement`."""
    sizes: list[int] = []
    current = 0

    def count(_connection: object, cursor: Any, text: str, *_rest: object) -> None:
        nonlocal current
        if text.startswith(statement):
            current += cursor.rowcount

    def commit(_connection: object) -> None:
        nonlocal current
        sizes.append(current)
        current = 0

    sa.event.listen(engine, "after_cursor_execute", count)
    sa.event.listen(engine, "commit", commit)
    yield sizes
    sa.event.remove(engine, "after_cursor_execute", count)
    sa.event.remove(engine, "commit", commit)
