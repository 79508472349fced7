"""How a server process ends: told to by a signal, or because something that it does has ended."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Coroutine


async def until_signal(*beside: Coroutine[None, None, None]) -> None:
    """Run coroutines until SIGTERM or SIGINT comes or one of them ends, and raise what it raised."""
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    tasks = [asyncio.create_task(work) for work in beside]
    stopping = asyncio.create_task(stop.wait())
    try:
        await asyncio.wait([*tasks, stopping], return_when=asyncio.FIRST_COMPLETED)
        for task in tasks:
            if task.done():
                task.result()
    finally:
        for pending in (*tasks, stopping):
            pending.cancel()
