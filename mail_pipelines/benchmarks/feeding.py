"""Composed and signed messages over the own SMTP client, from one process, without a ledger: into a sink, or into a queue to be measured."""

from __future__ import annotations

import asyncio
import dataclasses
import gc
import itertools
import time
from collections.abc import Awaitable, Callable, Iterator

from mail_pipelines.benchmarks.compose import SENDER, compiled, recipients
from mail_pipelines.benchmarks.sign import OFFERS
from mail_pipelines.dispatch import composer
from mail_pipelines.dispatch.endings import Ending
from mail_pipelines.dispatch.smtp import Connection
from mail_pipelines.domains import keys
from mail_pipelines.errors import MailPipelinesError
from mail_pipelines.messages.composing import ComposeError, Draft, Message, Recipient, compose, draft
from mail_pipelines.messages.dkim import Signer

_TIMEOUT_SECONDS = 60.0
Source = Callable[[], Awaitable[Message | None]]


class Messages:
    """Signed messages of about 16 KB, one recipient after the other."""

    def __init__(self) -> None:
        self.compiled = compiled(OFFERS)
        self.key = keys.generate()
        self.sender = dataclasses.replace(SENDER, signer=Signer(self.compiled.from_domain, "bench", self.key))
        self._recipients = recipients()

    def recipients(self, count: int) -> Iterator[Recipient]:
        return itertools.islice(self._recipients, count)

    def draft(self, recipient: Recipient) -> Draft:
        return draft(self.compiled, recipient, self.sender)

    def take(self, count: int) -> Iterator[Message]:
        for recipient in self.recipients(count):
            yield compose(self.compiled, recipient, self.sender)


def send(port: int, messages: Messages, count: int, connections: int) -> float:
    """Seconds from the first message to the last reply, composed and signed meanwhile as a session does it."""
    with composer.threads() as pool:
        recipients = messages.recipients(count)
        made = composer.Composer(lambda: next(recipients, None), messages.draft, pool, drop=lambda _: None)

        async def following() -> Message | None:
            _, message = await made.next() or (None, None)
            assert not isinstance(message, ComposeError)
            return message

        return _run(port, following, connections)


def send_composed(port: int, messages: Iterator[Message], connections: int) -> float:
    """The same with messages that somebody else has composed."""

    async def following() -> Message | None:
        return next(messages, None)

    return _run(port, following, connections)


def _run(port: int, source: Source, connections: int) -> float:
    # As a session does.
    gc.freeze()
    try:
        return asyncio.run(_send(port, source, connections))
    finally:
        gc.unfreeze()


async def _send(port: int, source: Source, connections: int) -> float:
    opened = [Connection("127.0.0.1", port, _TIMEOUT_SECONDS) for _ in range(connections)]
    for connection in opened:
        await connection.open()
        await connection.greet("bench.example.test")
    begin = time.perf_counter()
    await asyncio.gather(*(_feed(connection, source) for connection in opened))
    taken = time.perf_counter() - begin
    for connection in opened:
        await connection.close()
    return taken


async def _feed(connection: Connection, source: Source) -> None:
    message = await source()
    while message is not None:
        following = await source()
        offer = await connection.offer(message, following)
        if offer.ending is not Ending.DELIVERED:
            raise MailPipelinesError(f"a message was {offer.ending.value}: {offer.refusal or 'no reply'}")
        message = following
