"""Signals that ask a session to end: the first one is a request, the second one is what it would have been without us.

Dagster's cancellation (SIGINT), Celery's (SIGTERM to the process of the run) and a worker that is told to stop all come as a signal. Dagster's
own handler raises an exception wherever the program happens to be: it would tear messages away from their connections.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def on_first_signal(act: Callable[[], object]) -> Iterator[None]:
    """In the block, call `act` at the first signal, amid the main thread's work. After that, and after the block, signals do what they did before."""
    if threading.current_thread() is not threading.main_thread():
        # Only the main thread can have signals.
        yield
        return
    before = {number: signal.getsignal(number) for number in SIGNALS}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def heard(_number: int, _frame: FrameType | None) -> None:
        restore()
        act()

    for number in SIGNALS:
        signal.signal(number, heard)
    try:
        yield
    finally:
        restore()
