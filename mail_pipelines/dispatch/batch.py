"""A claim on its way: which of its rows are still to be handed out, which have a message, and when it is time for the next claim.

What belongs here: the counting of one claim's rows, and the waiting for it. What does not: connections, and what becomes of an offer (`lane`).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Executor
from dataclasses import dataclass, field

from mail_pipelines.dispatch import permit
from mail_pipelines.dispatch.claims import OpenClaim, Row
from mail_pipelines.dispatch.composer import Composer
from mail_pipelines.dispatch.endings import Ending, Next
from mail_pipelines.dispatch.follower import Watch
from mail_pipelines.dispatch.meetings import Meetings, Turns
from mail_pipelines.dispatch.smtp import Offer
from mail_pipelines.messages.compiled import CompiledMessage
from mail_pipelines.messages.composing import Draft, Message, Recipient, SenderIdentity, draft

# A domain that answers does so within this: longer than that, the rows held for its answer do not hold up the next claim.
MEETING_SECONDS = 1.0


@dataclass(eq=False)
class Batch:
    """A claim on its way: the rows that are still to be handed out, and how the offers of the others ended."""

    claimed: OpenClaim
    granted: permit.Permit
    watch: Watch
    # The token of each row's message, by contact.
    tokens: Mapping[int, str]
    draft: Callable[[Row], Draft]
    # Threads.
    signing: Executor
    # Monotonic second after which nothing more is offered.
    deadline: float
    # The next claim is opened when no more rows than this wait for their turn.
    low_water: int
    meetings: Meetings
    # Told of each row whose offer will not be made: (batch, row, None).
    end_offer: Callable[[Batch, Row, bool | None], None]
    offers: dict[int, Offer] = field(default_factory=dict)
    # Contacts whose offer took long enough to be called silence, if it was not answered.
    slow: set[int] = field(default_factory=set)
    stopped: str = ""

    def __post_init__(self) -> None:
        self.turns = Turns(self.claimed.rows, self.meetings)
        self.composer = Composer(self._draw, self.draft, self.signing, self.drop)
        # Rows that have had their turn here, have a message or get one, and wait for the pacer.
        self._drawn = 0
        self._connections = 0
        self._low, self._met, self._over, self._left = asyncio.Event(), asyncio.Event(), asyncio.Event(), asyncio.Event()
        self._left.set()
        self._look()

    @property
    def waiting(self) -> int:
        """How many rows have not been offered yet, or not begun."""
        return self.turns.waiting + max(0, self._drawn)

    @property
    def has_next(self) -> bool:
        """Whether `composed` may have a row now that may still be offered: who asked in vain again and again would let nobody else have a turn."""
        return time.monotonic() < self.deadline and (self.turns.has_next or self.composer.busy)

    @property
    def is_over(self) -> bool:
        """Whether it will not have one any more."""
        return self.turns.is_empty and not self.composer.busy

    def waits_no_more(self) -> None:
        """One row more is being offered, or will not be any more."""
        self._drawn -= 1
        self._look()

    def settle(self, domain: str, answered: bool | None) -> None:
        """A meeting is over, whichever claim it was in: rows that were held for it have their turn, or are left out."""
        self.turns.settle(domain, answered)
        self._look()

    def end(self) -> None:
        """Hand out no more rows, and count none any more: one that is on its way ends with its connection."""
        self.turns.clear()
        self.composer.end()
        self._drawn = 0
        self._look()

    def stop(self, reason: str) -> None:
        """Hand out no more rows, and let the lane wait: the server is the reason."""
        self.stopped = self.stopped or reason
        self.end()

    def _look(self) -> None:
        _set(self._low, self.turns.quick + self._drawn <= self.low_water)
        _set(self._met, self.turns.held <= self.low_water)
        if self.turns.is_empty and self._drawn <= 0:
            self._over.set()

    def enter(self) -> None:
        """A connection takes rows of this claim."""
        self._connections += 1
        self._left.clear()

    def leave(self) -> None:
        self._connections -= 1
        if not self._connections:
            self._left.set()

    async def nearly_over(self) -> None:
        """Wait until it is time for the next claim. Rows that are held come soon, or not at all."""
        await set_within(self._low, self._time_left())
        if not self._met.is_set():
            await set_within(self._met, min(self._time_left(), MEETING_SECONDS))
            if self._met.is_set():
                await set_within(self._low, self._time_left())

    async def over(self) -> None:
        """Wait until no row is handed out any more and no connection has one."""
        await set_within(self._over, self._time_left())
        self.turns.clear()
        self.composer.end()
        await self._left.wait()

    def _time_left(self) -> float:
        return max(0.0, self.deadline - time.monotonic())

    def _draw(self) -> Row | None:
        row = self.turns.next()
        if row is not None:
            self._drawn += 1
        self._look()
        return row

    def drop(self, row: Row) -> None:
        """A row that was drawn is not offered."""
        self.end_offer(self, row, None)
        self.waits_no_more()

    async def composed(self) -> tuple[Row, Message] | None:
        """The next row that a message can be made for."""
        while (made := await self.composer.next()) is not None:
            row, message = made
            if isinstance(message, Message):
                return row, message
            # One bad value must not stop the others, and trying it again would not mend it.
            self.offers[row.contact_id] = Offer(Next.GO_ON, Ending.NOT_ATTEMPTED, unusable=str(message))
            self.drop(row)
        return None


def drafted(campaign_id: int, compiled: CompiledMessage, identity: SenderIdentity, row: Row) -> Draft:
    """The message of a row of a claim, but for its signature. Raises `ComposeError`."""
    return draft(compiled, Recipient(campaign_id, row.contact_id, row.attempt, row.email, row.values), identity)


def _set(event: asyncio.Event, value: bool) -> None:
    if value:
        event.set()
    else:
        event.clear()


async def set_within(event: asyncio.Event, seconds: float) -> None:
    """Wait for the event, but no longer than this."""
    try:
        async with asyncio.timeout(seconds):
            await event.wait()
    except TimeoutError:
        pass
