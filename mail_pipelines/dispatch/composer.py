"""Messages made a little ahead of their sending, and signed by threads: while a signature is computed the event loop goes on, and other processors sign.

Only the signature is left to a thread. It holds no lock of Python's, so that the two do not wait for each other; composing would.
"""

from __future__ import annotations

import asyncio
import os
from collections import deque
from collections.abc import Callable, Iterable
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
    """Makes the messages of `rows` in their order, as they are asked for, signed by the threads of `pool`. For one event loop.

    `draft` raises `ComposeError` for a row that no message can be made for.
    """

    def __init__(self, rows: Iterable[R], draft: Callable[[R], Draft], pool: Executor) -> None:
        self._rows = deque(rows)
        self._draft = draft
        self._pool = pool
        self._made: deque[tuple[R, Message | ComposeError]] = deque()
        self._signing: set[asyncio.Future[list[bytes]]] = set()
        self._ended = False

    def __bool__(self) -> bool:
        """Whether there may be another message."""
        return bool(self._made or self._rows or self._signing) and not self._ended

    def end(self) -> None:
        """Give out nothing more."""
        self._ended = True
        self._rows.clear()
        self._made.clear()

    async def next(self) -> tuple[R, Message | ComposeError] | None:
        """The next row with its message, or why there is none; None at the end."""
        while not self._made:
            if self._rows:
                await self._make()
            elif self._signing:
                await asyncio.wait(self._signing, return_when=asyncio.FIRST_COMPLETED)
            else:
                return None
        return self._made.popleft()

    async def _make(self) -> None:
        """Make the messages of some rows."""
        drafts: list[tuple[R, Draft]] = []
        for _ in range(min(_ROWS_A_CALL, len(self._rows))):
            row = self._rows.popleft()
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
        if not self._ended:
            self._made.extend((row, draft.message(signature)) for (row, draft), signature in zip(drafts, signatures, strict=True))


def _sign(drafts: list[Draft]) -> list[bytes]:
    return [draft.sign() for draft in drafts]
