"""Imports by which a process starts, without garbage collection."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def uncollected() -> Iterator[None]:
    """Import in this block what the process keeps to its end.

    Importing makes hundreds of thousands of objects, hardly any of which is garbage. A collector that looks through them again and again takes a fifth
    of the time, and afterwards each full collection would look through all of them (and, in a fork, copy the memory that it shares with its parent).
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if enabled:
            gc.enable()
