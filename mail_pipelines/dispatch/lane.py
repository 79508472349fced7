"""The sending of one provider's rows in a session: claims in a row, connections that go from one to the next, and the end of each claim.

A claim holds what can be sent in two seconds. The next one is opened shortly before its rows are all handed out, so that no
connection waits for the database; its last replies, its journal and its results are waited for beside the sending of the next.
"""

from __future__ import annotations

import asyncio
import functools
import math
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeVar

from sqlalchemy.engine import Connection as DatabaseConnection

from mail_pipelines.database.engine import reading, transact
from mail_pipelines.database.models import State
from mail_pipelines.delivery import domain_health
from mail_pipelines.delivery.domain_health import Lesson
from mail_pipelines.delivery.events import mask_addresses
from mail_pipelines.delivery.recording import Result, record
from mail_pipelines.dispatch import claims, last_error, permit, servers, settlement
from mail_pipelines.dispatch.batch import Batch, drafted
from mail_pipelines.dispatch.claiming import wanted
from mail_pipelines.dispatch.claims import Memory, NothingClaimed, OpenClaim, Row
from mail_pipelines.dispatch.endings import Ending, Next
from mail_pipelines.dispatch.journal import Position
from mail_pipelines.dispatch.link import Link
from mail_pipelines.dispatch.meetings import Meetings
from mail_pipelines.dispatch.pacer import Pacer, Slot
from mail_pipelines.dispatch.settlement import Offered
from mail_pipelines.dispatch.smtp import Connection, Offer, ServerUnreachable
from mail_pipelines.messages.composing import Message

if TYPE_CHECKING:
    from mail_pipelines.dispatch.session import Session

T = TypeVar("T")
CLAIM_SECONDS = 2.0
CLAIM_ROWS = 500
# Nothing of a claim is offered later than this after the database was asked for it, and no body sent without asking again: it bounds how long a pause or a
# suppression takes to act.
OFFER_SECONDS = 4.0
# The next claim is opened when the rows that are left are sent in this time and that of a claim.
EARLY_SECONDS = 0.25
# A claim is recorded so long before its lease ends.
LEASE_MARGIN_SECONDS = 3.0
# Claims of one lane that are open at once: the one being sent, the next, and those whose last replies are still awaited.
CLAIMS_AT_ONCE = 16
# A connection on which a message takes no longer than this gets the next envelope with each body.
QUICK_SECONDS = 0.1
# The pace is measured over at least so long.
_PACE_SECONDS = 0.2
# How long a lane waits after the mail server could not be reached, or took nothing more.
_NO_SERVER_SECONDS = 2.0
_NOTHING_SECONDS = 0.5
# A lane whose grant or limit is used up asks again after so long at the latest: more may have been granted within the slot, by the rule or by a plan.
_ASK_AGAIN_SECONDS = 30.0
_JOURNAL_POLL_SECONDS = 0.05
# However long it took: the destination has said something, or has the message.
_ANSWERED = frozenset({Ending.DELIVERED, Ending.REFUSED, Ending.UNKNOWN})


@dataclass(frozen=True)
class Limits:
    """What this server may send to one provider (table `provider_limits`)."""

    connections: int
    per_second: float
    messages_per_connection: int
    mode: str = "cutthrough"


class SessionOver(Exception):
    """Ends all lanes; the message is the reason shown to the operator."""


class Lane:
    """The sending of one provider's rows: its pacer, its connections and its open claims. This one is in cutthrough mode (`burst` has the other)."""

    claim_seconds = CLAIM_SECONDS
    offer_seconds = OFFER_SECONDS
    early_seconds = EARLY_SECONDS

    def __init__(self, session: Session, provider: str, limits: Limits) -> None:
        self.session = session
        self.provider = provider
        self.limits = limits
        self.pacer = Pacer(session.folders.pacers, provider, per_second=self.limits.per_second, connections=self.limits.connections)
        # Why nothing is sent, until when by what is known, and when it is worth asking again (monotonic seconds).
        self.reason = ""
        self.wait_until = self.asks_at = 0.0
        # This session's share of the connection slots.
        self._share = max(1, math.ceil(self.limits.connections / session.settings.server.slots))
        self._links: dict[Link, asyncio.Task[None]] = {}
        self._meetings = Meetings(self._share)
        # Greets for each claim before it is opened: the line in the journal by which the claim finds its beginning.
        self._herald = self._connection()
        self._batches: deque[Batch] = deque()
        self._news = asyncio.Event()
        self._closing = False
        self._failure: BaseException | None = None
        self._concluding: set[asyncio.Task[None]] = set()
        self._offered = 0
        self._rows_per_second = 0.0

    def _connection(self) -> Connection:
        server = self.session.server
        return Connection(server.host, server.port, self.session.settings.sending.reply_timeout_seconds)

    @property
    def has_claims(self) -> bool:
        """Whether any is open."""
        return bool(self._concluding)

    def offer_no_more(self) -> None:
        """Hand out no more rows of the claims that are open."""
        for batch in self._batches:
            batch.end()

    async def close(self) -> None:
        """End the connections. Whoever runs the lane has waited for the end of its claims."""
        self._closing = True
        self._news.set()
        await asyncio.gather(*self._links.values(), return_exceptions=True)
        await self._herald.close()
        self.pacer.close()

    # --- claims -----------------------------------------------------------------------------------------------------

    async def run(self, until: float, shards: Sequence[int]) -> None:
        """Claim from these shards, one after the other, and send until nothing is due there (or allowed), and every claim is recorded."""
        self._pace_from = time.monotonic(), self._offered
        left = deque(shards)
        try:
            while time.monotonic() < until and not self.session.stopping.is_set():
                self._raise_failures()
                while len(self._concluding) >= CLAIMS_AT_ONCE:
                    await asyncio.wait(self._concluding, return_when=asyncio.FIRST_COMPLETED)
                    self._raise_failures()
                batch = await self._claim(left[0])
                if isinstance(batch, NothingClaimed):
                    left.popleft()
                    if not batch.only_here or not left:
                        self._wait(batch.reason, _NOTHING_SECONDS if batch.retry_seconds is None else batch.retry_seconds)
                        break
                    continue
                await batch.nearly_over()
                if batch.stopped:
                    self._wait(f"the mail server takes no more: {batch.stopped}", _NO_SERVER_SECONDS)
                    break
        finally:
            if self._concluding:
                await asyncio.wait(self._concluding)
            self._raise_failures()

    def _raise_failures(self) -> None:
        done = [task for task in self._concluding if task.done()]
        self._concluding.difference_update(done)
        failures = [error for task in done if (error := task.exception()) is not None]
        if self._failure is not None:
            failures.append(self._failure)
        if failures:
            raise failures[0]

    def _wait(self, reason: str, seconds: float) -> None:
        now = time.monotonic()
        self.reason, self.wait_until, self.asks_at = reason, now + seconds, now + min(seconds, _ASK_AGAIN_SECONDS)

    async def _claim(self, shard: int) -> Batch | NothingClaimed:
        """Open the next claim, of rows of a shard."""
        session = self.session
        if shortage := self._shortage():
            return NothingClaimed(shortage, _NO_SERVER_SECONDS)
        # Its rows would all be given back, and claimed again at once.
        if (wait := self.pacer.wait()) > self.offer_seconds:
            return NothingClaimed(f"{self.provider} takes the next message in {wait:.0f} s", wait)
        claim_id = claims.new_id()
        asked = time.monotonic()
        watch = await in_thread(session.follower.watch, claim_id)
        position = session.journal.end()
        granted = permit.grant(session.folders.permits, claim_id, seconds=session.settings.sending.lease_seconds)
        batch: Batch | None = None
        try:
            if error := await self._heralded(granted.name):
                return NothingClaimed(error, _NO_SERVER_SECONDS)
            if not self._staff():
                return NothingClaimed("all connection slots are taken", _NO_SERVER_SECONDS)
            pace = self._pace()
            answer = await in_thread(self._open, claim_id, shard, position, min(CLAIM_ROWS, max(1, math.ceil(pace * self.claim_seconds))))
            if isinstance(answer, NothingClaimed):
                if answer.ends_session:
                    raise SessionOver(answer.reason)
                return answer
            compiled, sending_as = await in_thread(session.content, answer.version_id)
            tokens = {row.contact_id: settlement.token_of(answer.ref, row.contact_id, row.attempt, session.token_key) for row in answer.rows}
            drafts = functools.partial(drafted, answer.ref.campaign_id, compiled, session.identity(sending_as, answer.ref.opened_at))
            # A database that is far away is asked so much earlier as this answer took; a row of this claim goes out before that.
            took = time.monotonic() - asked
            low_water = min(int(pace * (self.early_seconds + took)), max(0, len(answer.rows) - 1))
            # The turn of a claim in the database may be long in coming: it is nothing that was looked at.
            deadline = answer.opened + self.offer_seconds
            batch = Batch(answer, granted, watch, tokens, drafts, session.signing, deadline, low_water, self._meetings, self._end_offer)
        finally:
            if batch is None:
                granted.release()
                session.follower.forget(watch)
        session.follower.expect(watch, tokens.values())
        session.report.claims += 1
        session.report.claimed += len(answer.rows)
        session.report.shards.add(shard)
        self.reason = ""
        self._concluding.add(asyncio.create_task(self._conclude(batch)))
        if not batch.is_over:
            await self._begin(batch)
        if self.session.report.interrupted:
            batch.end()
        return batch

    def _shortage(self) -> str:
        """Why nothing may be claimed, nor a burst go on: too little room for the journal. Empty if there is enough."""
        return servers.short_of_space(self.session.server.key, self.session.journal.free_mb())

    async def _begin(self, batch: Batch) -> None:
        """Give the rows of a claim to the connections."""
        self._batches.append(batch)
        self._news.set()

    def _greeting(self, batch: Batch) -> str:
        """What a connection says before it offers rows of a claim."""
        return batch.granted.name

    async def _heralded(self, permit_name: str) -> str:
        """Have the mail server write the claim's marker; why it does not."""
        reason = ""
        for _ in range(2):
            try:
                if not self._herald.is_open:
                    await self._herald.open()
                await self._herald.greet(permit_name)
                return ""
            except ServerUnreachable as error:
                # It may have closed a connection that was idle for long: once more on a new one.
                reason = str(error)
                await self._herald.close()
                self._herald = self._connection()
        last_error.keep(self.session.folders, f"session {self.session.run_id}", reason)
        return reason

    def _pace(self) -> float:
        """Rows a second that this lane offers; before any is offered, a few for each connection."""
        begin, offered = self._pace_from
        now = time.monotonic()
        if now - begin >= _PACE_SECONDS:
            self._rows_per_second = (self._offered - offered) / (now - begin)
            self._pace_from = now, self._offered
        return min(self._rows_per_second or self._first_pace(), self.limits.per_second)

    def _first_pace(self) -> float:
        return len(self._links) * 4 / CLAIM_SECONDS

    def _open(self, claim_id: int, shard: int, position: Position, limit: int) -> OpenClaim | NothingClaimed:
        session = self.session
        answer = claims.open_claim(
            session.engine,
            session.sender,
            replace(session.memory, last_beat=servers.last_beat(session.folders)),
            claim_id=claim_id,
            campaign_id=session.campaign_id,
            shard=shard,
            provider=self.provider,
            limit=limit,
            position=position,
            lease_seconds=session.settings.sending.lease_seconds,
        )
        if isinstance(answer, OpenClaim):
            session.memory = Memory(session.memory.generation, claim_id)
            servers.remember(session.folders, session.memory)
        return answer

    # --- connections ------------------------------------------------------------------------------------------------

    def _staff(self) -> bool:
        """Have as many connections as this session's share of the slots allows; returns whether there are any."""
        while len(self._links) < self._share and (slot := self.pacer.slot()) is not None:
            self._hire(slot)
        return bool(self._links)

    def _hire(self, slot: Slot | None) -> None:
        """Put a new connection to work."""
        link = Link(slot, self._connection)
        self._links[link] = task = asyncio.create_task(self._work(link))
        task.add_done_callback(self._worked)

    async def _work(self, link: Link) -> None:
        """Offer rows over one connection, claim after claim, until the lane closes or the mail server cannot be reached."""
        try:
            while (batch := await self._batch_with_rows(link.cut)) is not None:
                batch.enter()
                try:
                    await link.greet(self._greeting(batch))
                    ending = await self._offer_rows(link, batch)
                finally:
                    batch.leave()
                if ending is not Next.GO_ON or link.connection.ahead is not None or link.offered >= self.limits.messages_per_connection:
                    await link.renew()
                # A connection that was cut rests until the next claim: coming back at once would press where somebody asks for less.
                link.cut = None if ending is Next.GO_ON else batch
                if all(other.cut is batch for other in self._links):
                    batch.end()
        except ServerUnreachable as error:
            self.reason = str(error)
        finally:
            del self._links[link]
            if not self._links:
                for batch in self._batches:
                    batch.stop(self.reason or "no connection is left")
            await link.close()

    def _worked(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled():
            self._failure = self._failure or task.exception()

    async def _batch_with_rows(self, cut: Batch | None) -> Batch | None:
        """The oldest claim but `cut` with rows to hand out, as soon as there is one; None when the lane closes."""
        while True:
            while self._batches and self._batches[0].is_over:
                self._batches.popleft()
            for batch in self._batches:
                if batch is not cut and batch.has_next:
                    return batch
            if self._closing:
                return None
            self._news.clear()
            await self._news.wait()

    async def _offer_rows(self, link: Link, batch: Batch) -> Next:
        """Offer rows of a claim until none is left, its time is over or the connection is of no more use; returns what it is good for."""
        ahead: tuple[Row, Message] | None = None
        ending = Next.GO_ON
        # A row first, then its turn: a turn that finds no row would be lost to the others.
        while (current := ahead or await batch.composed()) is not None:
            row, message = current
            ahead = None
            if not await self.pacer.turn(batch.deadline):
                batch.drop(row)
                break
            batch.waits_no_more()
            last = link.offered + 1 >= self.limits.messages_per_connection
            # An envelope goes ahead only where its body is not likely to wait for its turn, or for a slow destination beyond the deadline.
            ahead = await batch.composed() if not last and link.connection.seconds < QUICK_SECONDS and self.pacer.is_free() else None
            link.offered += 1
            begin = time.monotonic()
            offer = await link.connection.offer(message, ahead[1] if ahead else None, functools.partial(self._is_wanted, batch, row))
            slow = time.monotonic() - begin >= domain_health.rules().silent_seconds
            if slow:
                batch.slow.add(row.contact_id)
            batch.offers[row.contact_id] = offer
            self._end_offer(batch, row, not slow or offer.ending in _ANSWERED)
            self._offered += 1
            if offer.next is Next.STOP_CLAIM:
                batch.stop(offer.refusal)
            ending = offer.next
            if ending is not Next.GO_ON or last:
                break
        if ahead is not None:
            batch.drop(ahead[0])
        return ending

    async def _is_wanted(self, batch: Batch, row: Row) -> bool:
        """Whether the message may still be sent, now that its destination has taken the recipient. Late ones ask what was decided meanwhile."""
        if time.monotonic() <= batch.deadline:
            return True
        return await in_thread(self._look_up, wanted.message, batch.claimed.ref, row.contact_id)

    def _look_up(self, question: Callable[..., bool], *arguments: object) -> bool:
        with reading(self.session.engine) as connection:
            return question(connection, *arguments)

    def _end_offer(self, batch: Batch, row: Row, answered: bool | None) -> None:
        """The offer of a row has been answered or not (None: it was not made)."""
        may_go_on = self._meetings.end(row, answered)
        if may_go_on:
            for other in {batch, *self._batches}:
                other.settle(row.domain, answered)
        if may_go_on or row.asks:
            # There are rows again: those that were held, or one that asks for another domain.
            self._news.set()

    # --- the end of a claim -----------------------------------------------------------------------------------------

    async def _conclude(self, batch: Batch) -> None:
        """Wait for the last replies, close the gate, read the journal, record."""
        session, claimed = self.session, batch.claimed
        try:
            if not claimed.rows:
                return
            await batch.over()
            batch.granted.withdraw()
            results = await self._results(batch)
            learnt = _lesson(batch, results)

            def write(connection: DatabaseConnection) -> Counter[State]:
                counts = record(connection, claimed.ref, results, claim_state="open")
                domain_health.learn(connection, claimed.ref, learnt)
                return counts

            counts = await in_thread(transact, session.engine, write)
        finally:
            batch.granted.release()
            session.follower.forget(batch.watch)
            for row in claimed.rows if batch.slow else ():
                if row.contact_id in batch.slow and self._meetings.recorded(row.domain):
                    for other in self._batches:
                        other.settle(row.domain, False)
        session.report.results.update(counts)
        released = {result.contact_id for result in results if result.state is State.PENDING}
        refusals = [offer.refusal for contact_id, offer in batch.offers.items() if contact_id in released and offer.refusal and offer.next is Next.GO_ON]
        if refusals:
            # The destination was never asked, so trying again would go on for ever.
            reason = f"the mail server {session.server.key} itself refuses messages: {mask_addresses(refusals[0])[:120]}"
            last_error.keep(session.folders, f"session {session.run_id}", reason)
            raise SessionOver(reason)

    async def _results(self, batch: Batch) -> list[Result]:
        """The end of every row: by the journal, or that no message could be made."""
        not_offered = Offer(Next.GO_ON, Ending.NOT_ATTEMPTED)
        heard = [(row, batch.offers.get(row.contact_id, not_offered)) for row in batch.claimed.rows]
        results = await self._read_results(
            batch, [Offered(row.contact_id, row.attempt, batch.tokens[row.contact_id], offer.reply is not None) for row, offer in heard if not offer.unusable]
        )
        unusable = [row for row, offer in heard if offer.unusable]
        return results + [Result(row.contact_id, row.attempt, State.SUPPRESSED, reason="cannot_be_composed") for row in unusable]

    async def _read_results(self, batch: Batch, rows: list[Offered]) -> list[Result]:
        """The end of each row by the journal, once the mail server has nothing of this claim at a destination any more."""
        session, claimed = self.session, batch.claimed
        # What has been answered is over: the mail server writes its line first. Its process may live on for the connection's next message.
        tokens = {row.token for row in rows if not row.answered}
        # The lease must not run out while we wait: what is in flight then is unknown, as it would be to a settler.
        end = time.monotonic() + session.settings.sending.reply_timeout_seconds
        end = min(end, claimed.opened + session.settings.sending.lease_seconds - LEASE_MARGIN_SECONDS)
        while True:
            evidence = await in_thread(session.follower.evidence, batch.watch)
            over = time.monotonic() > end
            if not over and not settlement.in_flight(evidence, tokens) and evidence.intents.keys() & tokens:
                # A process may end between its last line and the look at it: what it wrote is read once more.
                evidence = await in_thread(session.follower.evidence, batch.watch)
            if over or not settlement.in_flight(evidence, tokens):
                return settlement.conclude(rows, evidence, claimed.ref, session.settings.sending, claimed.database_second(time.monotonic()))
            await asyncio.sleep(_JOURNAL_POLL_SECONDS)


def _lesson(batch: Batch, results: Sequence[Result]) -> Lesson:
    """What the end of a claim says of the domains that it met. Few claims say anything."""
    rows = batch.claimed.rows
    asking = [row.contact_id for row in rows if row.asks]
    if not batch.slow and not asking:
        return Lesson()
    return domain_health.lesson(results, {row.contact_id: row.domain for row in rows}, batch.slow, asking)


async def in_thread(function: Callable[..., T], *arguments: object) -> T:
    """Run a blocking call (database, journal) beside the event loop, so that SMTP goes on."""
    return await asyncio.to_thread(function, *arguments)
