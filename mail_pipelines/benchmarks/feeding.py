"""Composed and signed messages over the own SMTP client, from one process, without a ledger: into a sink, or into a queue to be measured."""

from __future__ import annotations

import asyncio
import dataclasses
import gc
import itertools
import time
from collections.abc import Iterator

from mail_pipelines.benchmarks.compose import SENDER, compiled, recipients
from mail_pipelines.benchmarks.sign import OFFERS
from mail_pipelines.dispatch.endings import Ending
from mail_pipelines.dispatch.smtp import Connection
from mail_pipelines.domains import keys
from mail_pipelines.errors import MailPipelinesError
from mail_pipelines.messages.composing import Message, compose
from mail_pipelines.messages.dkim import Signer

_TIMEOUT_SECONDS = 60.0


class Messages:
    """Signed messages of about 16 KB, one recipient after the other."""

    def __init__(self) -> None:
        self.compiled = compiled(OFFERS)
        self.key = keys.generate()
        self.sender = dataclasses.replace(SENDER, signer=Signer(self.compiled.from_domain, "bench", self.key))
        self._recipients = recipients()

    def take(self, count: int) -> Iterator[Message]:
        for recipient in itertools.islice(self._recipients, count):
            yield compose(self.compiled, recipient, self.sender)


def send(port: int, messages: Iterator[Message], connections: int) -> float:
    """Seconds from the first message to the last reply."""
    # As a session does.
    gc.freeze()
    try:
        return asyncio.run(_send(port, messages, connections))
    finally:
        gc.unfreeze()


async def _send(port: int, messages: Iterator[Message], connections: int) -> float:
    opened = [Connection("127.0.0.1", port, _TIMEOUT_SECONDS) for _ in range(connections)]
    for connection in opened:
        await connection.open()
        await connection.greet("bench.example.test")
    begin = time.perf_counter()
    await asyncio.gather(*(_feed(connection, messages) for connection in opened))
    taken = time.perf_counter() - begin
    for connection in opened:
        await connection.close()
    return taken


async def _feed(connection: Connection, messages: Iterator[Message]) -> None:
    message = next(messages, None)
    while message is not None:
        following = next(messages, None)
        offer = await connection.offer(message, following)
        if offer.ending is not Ending.DELIVERED:
            raise MailPipelinesError(f"a message was {offer.ending.value}: {offer.refusal or 'no reply'}")
        message = following
