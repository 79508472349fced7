"""The sending of one provider's rows in bursts: a claim is handed over to the server's queue, and goes out over connections that are used for many messages.

Each connection slot of the lane has one queue runner at work as long as anything waits. A message in the queue is inert: it goes out only
while its claim's gate says so (`gate`) and its permit stands. So its row stays *claimed*, as in cutthrough mode, and what is left when the
burst's time is over is as if it had never been handed over. A claim ends, as any other, by the journal.

The next burst begins when the rows of the one before have all begun (a final reply may be awaited for a minute, and would hold up everybody).
"""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

from mail_pipelines.delivery.domain_health import NO_CONNECTION
from mail_pipelines.dispatch import permit
from mail_pipelines.dispatch.batch import Batch
from mail_pipelines.dispatch.claiming import wanted
from mail_pipelines.dispatch.endings import Ending, Next
from mail_pipelines.dispatch.exim import runners
from mail_pipelines.dispatch.gate import Gate
from mail_pipelines.dispatch.lane import QUICK_SECONDS, Lane, Limits, in_thread
from mail_pipelines.dispatch.link import Link
from mail_pipelines.dispatch.pacer import Slot
from mail_pipelines.dispatch.smtp import ServerUnreachable

if TYPE_CHECKING:
    from mail_pipelines.delivery.recording import Result
    from mail_pipelines.dispatch.claims import Row
    from mail_pipelines.dispatch.session import Session
    from mail_pipelines.messages.composing import Message

# A claim holds what can be sent in this time, at the pace of the claims before.
BURST_SECONDS = 10.0
# No body is begun later than this after its claim was asked for: it bounds how long a suppression takes to act. (A pause acts sooner.)
OFFER_SECONDS = 14.0
EARLY_SECONDS = 1.0
# What a connection is expected to send at first.
_FIRST_PER_SECOND = 2.0
# Exim only receives, so a few connections hand over more than any number can deliver.
_HAND_OVER_CONNECTIONS = 4
_TAKEN = Ending.DELIVERED
# What Exim says of a host that did not answer.
_SILENCE = "timed out"
_WATCH_SECONDS = 0.1
# So often a burst asks whether it is still to be sent.
_ASK_AGAIN_SECONDS = 2.0
# A runner that found nothing to do is started again after this, doubled each time.
_IDLE_SECONDS = 0.1
_LONGEST_IDLE_SECONDS = 1.0


class BurstLane(Lane):
    """A lane in burst mode. `_links` only hand over; the slots are the runners'."""

    claim_seconds = BURST_SECONDS
    early_seconds = EARLY_SECONDS

    def __init__(self, session: Session, provider: str, limits: Limits) -> None:
        super().__init__(session, provider, limits)
        # A claim must end before its lease.
        self.offer_seconds = min(OFFER_SECONDS, session.settings.sending.lease_seconds / 2)
        self._gates = session.folders.gates / provider
        self._gates.mkdir(parents=True, exist_ok=True)
        self._runners: set[asyncio.Task[None]] = set()
        self._bursts: dict[Batch, asyncio.Task[None]] = {}
        # Set while anything that was handed over may have to be sent.
        self._queued = asyncio.Event()

    async def close(self) -> None:
        for task in self._runners:
            task.cancel()
        await asyncio.gather(*self._runners, return_exceptions=True)
        await super().close()

    def _first_pace(self) -> float:
        return len(self._runners) * _FIRST_PER_SECOND

    def _greeting(self, batch: Batch) -> str:
        return f"{batch.granted.name}.{self.provider}"

    # --- one burst ----------------------------------------------------------------------------------------------------

    async def _begin(self, batch: Batch) -> None:
        self._clear_gates()
        gate = Gate(self._gates, batch.granted.name, batch.tokens.values(), self.pacer, batch.deadline)
        await gate.open()
        batch.enter()
        self._bursts[batch] = task = asyncio.create_task(self._watch(batch, gate))
        task.add_done_callback(self._worked)
        await super()._begin(batch)

    def _clear_gates(self) -> None:
        """Remove the gates of senders that were killed."""
        for path in self._gates.iterdir():
            if not (self.session.folders.permits / path.name).exists():
                path.unlink(missing_ok=True)

    async def _watch(self, batch: Batch, gate: Gate) -> None:
        """See by the journal which rows have begun, until all have, or the time is over."""
        seen: set[str] = set()
        told: set[str] = set()
        asked_again = time.monotonic()
        try:
            while batch.waiting and time.monotonic() < batch.deadline:
                await asyncio.sleep(_WATCH_SECONDS)
                # One look later than its line came: a process that has written INTENT may not have looked at the permit yet.
                for _ in told - seen:
                    batch.waits_no_more()
                self._offered += len(told - seen)
                seen = told
                if time.monotonic() > asked_again + _ASK_AGAIN_SECONDS:
                    asked_again = time.monotonic()
                    if not await in_thread(self._look_up, wanted.claim, batch.claimed.ref):
                        # The next claim will say why.
                        batch.end()
                if not permit.is_valid(batch.granted.path.parent, batch.granted.name):
                    batch.stop("the permit has been withdrawn")
                # What is in the queue already Exim would deliver down to the last byte.
                if shortage := self._shortage():
                    batch.stop(shortage)
                evidence = await in_thread(self.session.follower.evidence, batch.watch)
                refused = {batch.tokens[contact_id] for contact_id, offer in batch.offers.items() if not offer.unusable and offer.ending is not _TAKEN}
                told = seen | evidence.intents.keys() | evidence.outcomes.keys() | refused
        finally:
            # First the permit: what a runner finds from now on it throws away, and troubles no destination with it.
            batch.granted.withdraw()
            await gate.close()
            del self._bursts[batch]
            if not self._bursts:
                self._queued.clear()
            batch.leave()

    async def _offer_rows(self, link: Link, batch: Batch) -> Next:
        """Hand over rows of a claim until none is left."""
        ahead: tuple[Row, Message] | None = None
        ending = Next.GO_ON
        while ending is Next.GO_ON and time.monotonic() < batch.deadline and (current := ahead or await batch.composed()) is not None:
            row, message = current
            ahead = await batch.composed() if link.connection.seconds < QUICK_SECONDS else None
            link.offered += 1
            offer = await link.connection.offer(message, ahead[1] if ahead else None)
            # What Exim answered says nothing of the destination. Whether that is silent, the journal will say.
            batch.offers[row.contact_id] = offer._replace(reply=None)
            self._end_offer(batch, row, True)
            if batch in self._bursts:
                self._queued.set()
            if offer.next is Next.STOP_CLAIM:
                batch.stop(offer.refusal)
            ending = offer.next
        if ahead is not None:
            batch.drop(ahead[0])
        return ending

    async def _results(self, batch: Batch) -> list[Result]:
        """As in cutthrough mode. How long a connection was waited for only Exim knows, and says."""
        results = await super()._results(batch)
        batch.slow.update(result.contact_id for result in results if result.reason == NO_CONNECTION and _SILENCE in result.text)
        return results

    # --- connections ----------------------------------------------------------------------------------------------------

    def _staff(self) -> bool:
        while len(self._runners) < self._share and (slot := self.pacer.slot()) is not None:
            task = asyncio.create_task(self._run_queue(slot))
            self._runners.add(task)
            task.add_done_callback(self._worked)
        while len(self._links) < min(_HAND_OVER_CONNECTIONS, len(self._runners)):
            self._hire(None)
        return bool(self._runners)

    async def _run_queue(self, slot: Slot) -> None:
        """Have one runner at work whenever something is in the queue."""
        task = asyncio.current_task()
        assert task is not None
        idle = _IDLE_SECONDS
        try:
            while True:
                await self._queued.wait()
                begin = time.monotonic()
                await runners.run_queue(self.session.folders.runners, self.provider, self.limits.messages_per_connection)
                idle = _IDLE_SECONDS if time.monotonic() - begin > _IDLE_SECONDS else min(2 * idle, _LONGEST_IDLE_SECONDS)
                await asyncio.sleep(idle if idle > _IDLE_SECONDS else 0)
        except ServerUnreachable as error:
            self.reason = str(error)
        finally:
            slot.free()
            self._runners.discard(task)
            if not self._runners:
                for batch in self._bursts:
                    batch.stop(self.reason or "no queue runner is left")
