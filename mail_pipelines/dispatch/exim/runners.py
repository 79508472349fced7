"""Queue runners of Exim on request: what takes a provider's queue to its destinations, one connection each.

The process that runs Exim starts them, since it may, and since only Exim's parent can put them where Exim's other processes are. Whoever asks
keeps the connection open and ends its own half to have the runner stopped, or goes away. A delivery then still goes on, over its one
connection, with what it finds in the queue, perhaps another session's: so the answer comes when that connection has ended as well.

A request is one line, `<provider> <messages for each connection>`; the answer is `done`, or nothing if the runner has failed or was stopped.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
from pathlib import Path
from typing import Any

from mail_pipelines.dispatch.exim.instance import EximError, Instance, Speaker
from mail_pipelines.dispatch.smtp import ServerUnreachable

_REQUEST = re.compile(rb"([a-z0-9_-]{1,32}) (\d{1,6})\n")
_REQUEST_SECONDS = 5.0
_DONE = b"done\n"


async def run_queue(path: Path, provider: str, messages: int) -> None:
    """Have a runner go once through a provider's queue, with at most so many messages on a connection. Raises `ServerUnreachable`.

    When cancelled it returns as soon as the connection has ended.
    """
    try:
        reader, writer = await asyncio.open_unix_connection(path)
    except OSError as error:
        raise ServerUnreachable(f"nobody runs queues at {path}: {error.strerror}") from error
    try:
        writer.write(f"{provider} {messages}\n".encode("ascii"))
        try:
            answer = await reader.read()
        except asyncio.CancelledError:
            writer.write_eof()
            await reader.read()
            raise
    except OSError as error:
        raise ServerUnreachable(f"{path}: {error.strerror}") from error
    finally:
        writer.close()
    if answer != _DONE:
        raise ServerUnreachable(f"the queue of {provider} was not run: Exim has been stopped, or main.log says why")


async def serve(own: Instance, group: int, speaker: Speaker) -> None:
    """Answer the requests of one server of the Exim until cancelled.

    Runners join the process group of the daemon, so that whoever ends that ends them.
    Raises `EximError` if it cannot listen.
    """
    prefix = own.queue_prefix(speaker.key)
    conversations: set[asyncio.Task[None]] = set()

    async def converse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        conversations.add(task)
        try:
            async with asyncio.timeout(_REQUEST_SECONDS):
                request = _REQUEST.fullmatch(await reader.readline())
            if request is not None and await _run(own, group, prefix + request[1].decode(), int(request[2]), reader) == 0:
                writer.write(_DONE)
        except (TimeoutError, OSError, asyncio.CancelledError):
            pass
        finally:
            conversations.discard(task)
            writer.close()

    path = speaker.folders.runners
    path.unlink(missing_ok=True)
    try:
        server = await asyncio.start_unix_server(converse, path, backlog=1024)
    except OSError as error:
        raise EximError(f"cannot listen at {path}: {error} (a socket's path has at most 107 bytes; it is below server.run_folder)") from error
    try:
        await asyncio.Event().wait()
    finally:
        server.close()
        for task in conversations:
            task.cancel()
        await asyncio.gather(*conversations, return_exceptions=True)


async def _run(own: Instance, group: int, queue: str, messages: int, asker: asyncio.StreamReader) -> int:
    """The status with which the runner ended."""
    account: dict[str, Any] = {"user": own.account.uid, "group": own.account.gid, "extra_groups": []} if os.geteuid() == 0 else {}
    words = ["-C", str(own.configuration), f"-oB{messages}", f"-qG{queue}"]
    null, pipe = asyncio.subprocess.DEVNULL, asyncio.subprocess.PIPE
    # All processes of its deliveries inherit the pipe: it ends with the last of them.
    runner = await asyncio.create_subprocess_exec(own.binary, *words, stdin=null, stdout=pipe, stderr=null, process_group=group, **account)
    assert runner.stdout is not None
    gone = asyncio.ensure_future(asker.read())
    ended = asyncio.ensure_future(runner.wait())
    try:
        await asyncio.wait({gone, ended}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        gone.cancel()
        with contextlib.suppress(ProcessLookupError):
            runner.terminate()
    status = await ended
    while await runner.stdout.read(4096):
        pass
    return status
