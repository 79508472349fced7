"""Messages made a little ahead of their sending, and signed by threads: while a signature is computed the event loop goes on, and other processors sign.

Only the signature is left to a thread. It holds no lock of Python's, so that the two do not wait for each other; composing would.
"""

from __future__ import annotations

import asyncio
import os
from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from typing import Generic, TypeVar

from mail_pipelines.messages.composing import ComposeError, Draft, Message

R = TypeVar("R")
_MOST_THREADS = 4
# Rows that one call of a thread signs: a call for each would cost a fifth of a signature.
_ROWS_A_CALL = 8


def threads() -> ThreadPoolExecutor:
    """The threads that sign for one session."""
    return ThreadPoolExecutor(min(_MOST_THREADS, os.cpu_count() or 1), thread_name_prefix="signing")


class Composer(Generic[R]):
    """Makes the messages of rows as they are asked for, signed by the threads of `pool`. For one event loop.

    `draw` gives the next row, None if there is none now; it is asked for a few rows more than are given out. `draft` raises `ComposeError` for a
    row that no message can be made for. Rows that were drawn when the composer ended go to `drop`.
    """

    def __init__(self, draw: Callable[[], R | None], draft: Callable[[R], Draft], pool: Executor, drop: Callable[[R], None]) -> None:
        self._draw = draw
        self._draft = draft
        self._pool = pool
        self._drop = drop
        self._made: deque[tuple[R, Message | ComposeError]] = deque()
        self._signing: set[asyncio.Future[list[bytes]]] = set()
        self._ended = False

    @property
    def busy(self) -> bool:
        """Whether a message is made, or being signed, that nobody has taken."""
        return bool(self._made or self._signing) and not self._ended

    def end(self) -> None:
        """Give out nothing more."""
        self._ended = True
        while self._made:
            self._drop(self._made.popleft()[0])

    async def next(self) -> tuple[R, Message | ComposeError] | None:
        """The next row with its message, or why there is none; None if there is no row now, or the composer has ended."""
        while not self._made:
            rows = self._drawn()
            if rows:
                await self._make(rows)
            elif self._signing:
                await asyncio.wait(self._signing, return_when=asyncio.FIRST_COMPLETED)
            else:
                return None
        return self._made.popleft()

    def _drawn(self) -> list[R]:
        rows: list[R] = []
        while not self._ended and len(rows) < _ROWS_A_CALL and (row := self._draw()) is not None:
            rows.append(row)
        return rows

    async def _make(self, rows: list[R]) -> None:
        """Make the messages of some rows."""
        drafts: list[tuple[R, Draft]] = []
        for row in rows:
            try:
                drafts.append((row, self._draft(row)))
            except ComposeError as error:
                self._made.append((row, error))
        if not drafts:
            return
        signing = asyncio.get_running_loop().run_in_executor(self._pool, _sign, [draft for _, draft in drafts])
        self._signing.add(signing)
        try:
            signatures = await signing
        finally:
            self._signing.discard(signing)
        for (row, draft), signature in zip(drafts, signatures, strict=True):
            if self._ended:
                self._drop(row)
            else:
                self._made.append((row, draft.message(signature)))


def _sign(drafts: list[Draft]) -> list[bytes]:
    return [draft.sign() for draft in drafts]
