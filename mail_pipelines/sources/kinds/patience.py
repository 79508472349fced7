"""How long an answer of a source may take in all, whatever it is that does not come: a connection, a query, a page after many attempts.

A source that hangs would keep its place in the pool from the others, until Dagster ends the run after hours without a word.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

from mail_pipelines.sources.errors import SourceError

# Beyond what `http` waits for a service that answers at all.
MOST_SECONDS = 900.0
T = TypeVar("T")


@contextmanager
def within(seconds: float, error: Exception) -> Iterator[None]:
    """Raise `error` in the block if it lasts longer: by SIGALRM, which ends whatever waits. In threads no signal arrives; there is no limit there."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(*_: object) -> None:
        raise error

    began = time.monotonic()
    handler = signal.signal(signal.SIGALRM, end)
    left, interval = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        if left:
            # Somebody else's alarm goes on.
            signal.setitimer(signal.ITIMER_REAL, max(0.001, left - (time.monotonic() - began)), interval)


def each(pages: Iterator[T]) -> Iterator[T]:
    """The pages. Raises `SourceError` if one takes longer than `MOST_SECONDS`."""
    too_long = SourceError(f"the source has given nothing for {MOST_SECONDS:.0f} s: it hangs, or its pages are too large; it is read again in the next run")
    while True:
        with within(MOST_SECONDS, too_long):
            try:
                page = next(pages)
            except StopIteration:
                return
        yield page
