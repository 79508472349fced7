"""The gate of a burst: a Unix socket at which the mail server asks the living sender about each message that it has in its queue.

Two questions, one line each, answered by `go` or `no`:

  turn <token>   before the message is named to its destination: `go` when the pacer has a turn for it
  body <token>   before its body goes out: `go` once for each message

So a queued message goes out at the provider's pace, at most once whatever is killed (Exim would give it to the next host of a domain after
a connection broke behind the body), and not at all without a sender that lives and has time left. Who gets no answer takes it for a `no`.

What belongs here: the socket and its answers. What does not: the pace (`pacer`), and the fence that holds without a sender (`permit`).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import Iterable
from pathlib import Path

from mail_pipelines.dispatch.files import DispatchError
from mail_pipelines.dispatch.pacer import Pacer

# `sun_path` of unix(7), with its final zero.
_PATH_OCTETS = 107
_QUESTION_SECONDS = 5.0


class Gate:
    """The gate of the messages `tokens` until `deadline` (monotonic seconds), at `folder`/`name`. Raises `DispatchError` if it cannot listen."""

    def __init__(self, folder: Path, name: str, tokens: Iterable[str], pacer: Pacer, deadline: float) -> None:
        self._path = folder / name
        self._waiting = set(tokens)
        self._pacer = pacer
        self.deadline = deadline
        self._asking: set[asyncio.Task[None]] = set()

    @property
    def asked(self) -> int:
        """How many questions are waiting for an answer."""
        return len(self._asking)

    async def open(self) -> None:
        if len(os.fsencode(self._path)) > _PATH_OCTETS:
            raise DispatchError(f"the path {self._path} is too long for a socket (at most {_PATH_OCTETS} bytes): set server.run_folder to a shorter one")
        try:
            self._server = await asyncio.start_unix_server(self._asked, self._path, backlog=1024)
        except OSError as error:
            raise DispatchError(f"{self._path}: {error.strerror}") from error
        # The mail server is another user.
        self._path.chmod(0o666)

    async def close(self) -> None:
        """Answer nobody any more, nor who waits for a turn."""
        self._waiting.clear()
        self._server.close()
        self._path.unlink(missing_ok=True)
        for task in self._asking:
            task.cancel()
        await asyncio.gather(*self._asking, return_exceptions=True)

    async def _asked(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._asking.add(task)
        try:
            async with asyncio.timeout(_QUESTION_SECONDS):
                question, _, token = (await reader.readline()).decode("ascii", "replace").strip().partition(" ")
            go = await self._turn(token) if question == "turn" else question == "body" and self._body(token)
            writer.write(b"go" if go else b"no")
            with contextlib.suppress(ConnectionError):
                await writer.drain()
        except (TimeoutError, ConnectionError, asyncio.CancelledError):
            # Slow, or gone; or the gate closes.
            pass
        finally:
            self._asking.discard(task)
            writer.close()

    async def _turn(self, token: str) -> bool:
        return token in self._waiting and await self._pacer.turn(self.deadline) and token in self._waiting

    def _body(self, token: str) -> bool:
        if token not in self._waiting or time.monotonic() > self.deadline:
            return False
        self._waiting.discard(token)
        return True
