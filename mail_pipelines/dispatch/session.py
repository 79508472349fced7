"""A send session: one process that sends the due rows of one shard of one campaign through one server.

It keeps a lane for each provider. A lane claims what it can send in two seconds, offers it over its connections at the
pace the pacer allows, withdraws the permit, reads the journal and records the end of every row; then it claims again.
The session ends when its shard is final, nothing falls due soon, its time is up, or the campaign does not want mail sent.
"""

from __future__ import annotations

import asyncio
import datetime as dt
import math
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import sqlalchemy as sa
from sqlalchemy.engine import Engine

from mail_pipelines.capacity import allotments
from mail_pipelines.config import Settings
from mail_pipelines.database.engine import reading, transact
from mail_pipelines.database.models import Brand, Campaign, CampaignVersion, ProviderLimit, State
from mail_pipelines.delivery.events import mask_addresses
from mail_pipelines.delivery.recording import Result, record
from mail_pipelines.dispatch import claims, permit, servers, settlement
from mail_pipelines.dispatch.claims import Memory, NothingClaimed, OpenClaim, Sender
from mail_pipelines.dispatch.due import due_times, next_due, open_rows, pending_elsewhere
from mail_pipelines.dispatch.endings import Ending, Next
from mail_pipelines.dispatch.files import DispatchError, ServerFolders, boot_id, only_one
from mail_pipelines.dispatch.journal import Journal, Position
from mail_pipelines.dispatch.pacer import Pacer, Slot
from mail_pipelines.dispatch.settlement import Offered
from mail_pipelines.dispatch.smtp import Connection, Offer, ServerUnreachable
from mail_pipelines.domains.signing import SendingAs, sending_as
from mail_pipelines.messages.compiled import CompiledMessage
from mail_pipelines.messages.composing import ComposeError, Message, Recipient, SenderIdentity, compose

T = TypeVar("T")
CLAIM_SECONDS = 2.0
CLAIM_ROWS = 500
# Nothing of a claim is offered later than this after it was asked for: it bounds how long a pause or a suppression takes to act.
OFFER_SECONDS = 4.0
# A claim is recorded so long before its lease ends.
LEASE_MARGIN_SECONDS = 3.0
# Claims of one lane whose last replies are still awaited while the next is being sent.
CLAIMS_AT_ONCE = 4
# A connection on which a message takes no longer than this gets the next envelope with each body.
QUICK_SECONDS = 0.1
_IDLE_POLL_SECONDS = 0.5
_NO_LINK_SECONDS = 2.0
# How long workers that still wait for a reply may hold up the next claim.
_STRAGGLER_SECONDS = 0.5
_JOURNAL_POLL_SECONDS = 0.05


@dataclass(frozen=True)
class Limits:
    """What this server may send to one provider (table `provider_limits`)."""

    connections: int
    per_second: float
    messages_per_connection: int


@dataclass
class Report:
    """What a session did, in counts only. `reason` says why it ended, `next_due` (epoch seconds) when the shard has work again."""

    server: str
    claimed: int = 0
    results: Counter[State] = field(default_factory=Counter)
    settled: Counter[State] = field(default_factory=Counter)
    claims: int = 0
    reason: str = ""
    open_rows: int = 0
    next_due: float | None = None
    seconds: float = 0.0

    @property
    def sent(self) -> int:
        return self.results[State.DELIVERED]


class SessionOver(Exception):
    """Ends all lanes; the message is the reason shown to the operator."""


@dataclass
class Session:
    """One session; `run` does the work. `progress` is called with the report now and then."""

    engine: Engine
    settings: Settings
    server: servers.ServerInfo
    campaign_id: int
    campaign_key: str
    shard: int
    run_id: str
    journal: Journal
    progress: Callable[[Report], None] = lambda _: None

    def __post_init__(self) -> None:
        self.folders = ServerFolders.of(self.settings.server, self.server.key)
        self.report = Report(self.server.key)
        self.sender = Sender(self.server.id, self.server.key, self.folders.incarnation(), boot_id(), self.run_id)
        self.memory = servers.recall(self.engine, self.folders)
        self.token_key = self.settings.token_key()
        with reading(self.engine) as connection:
            self.brand = connection.execute(
                sa.select(Brand.key).join(Campaign, Campaign.brand_id == Brand.id).where(Campaign.id == self.campaign_id)
            ).scalar_one()
        self._versions: dict[int, tuple[CompiledMessage, SendingAs | None]] = {}

    def run(self) -> Report:
        """Send until there is a reason to end. Raises `DispatchError` when this process must not send at all."""
        begin = time.monotonic()
        with only_one(self.folders.sessions / self.run_id, f"run {self.run_id}"):
            try:
                done = settlement.settle_all(self.engine, self.sender, self.folders, self.journal, self.settings.sending, self.token_key)
                self.report.settled.update(done.rows)
                allotments.fill(self.engine)
                asyncio.run(self._send(begin + self.settings.sending.session_seconds))
            finally:
                (self.folders.sessions / self.run_id).unlink(missing_ok=True)
        with reading(self.engine) as connection:
            self.report.open_rows = open_rows(connection, self.campaign_id, self.shard)
            self.report.next_due = next_due(connection, self.campaign_id, self.shard)
        self.report.seconds = time.monotonic() - begin
        return self.report

    async def _send(self, until: float) -> None:
        """Run the lanes until nothing is due within `linger_seconds`, or one of them ends the session."""
        lanes: dict[str, Lane] = {}
        running: dict[str, asyncio.Task[None]] = {}
        self.stopping = asyncio.Event()
        last_progress = time.monotonic()
        try:
            while True:
                if time.monotonic() >= until:
                    raise SessionOver("the session's time is up")
                for provider in await in_thread(self._due_providers):
                    lane = lanes.get(provider) or lanes.setdefault(provider, Lane(self, provider, await in_thread(self.limits, provider)))
                    if provider not in running and lane.wait_until <= time.time():
                        running[provider] = asyncio.create_task(lane.run(until))
                claims_before = self.report.claims
                if running:
                    await asyncio.wait(running.values(), timeout=_IDLE_POLL_SECONDS, return_when=asyncio.FIRST_COMPLETED)
                else:
                    await asyncio.sleep(_IDLE_POLL_SECONDS)
                for provider in [provider for provider, task in running.items() if task.done()]:
                    running.pop(provider).result()
                self.progress(self.report)
                if running or self.report.claims > claims_before:
                    last_progress = time.monotonic()
                    continue
                waited = time.monotonic() - last_progress
                if (reason := await in_thread(self._idle_reason, lanes, waited)) is not None:
                    raise SessionOver(reason)
        except SessionOver as over:
            self.report.reason = str(over)
        finally:
            # The others finish the claim they are at; nothing is torn away from a connection.
            self.stopping.set()
            for ended in await asyncio.gather(*running.values(), return_exceptions=True):
                if isinstance(ended, BaseException) and not isinstance(ended, SessionOver):
                    raise ended
            for lane in lanes.values():
                await lane.close()

    def _due_providers(self) -> list[str]:
        with reading(self.engine) as connection:
            return [provider for (_, provider), due in due_times(connection, self.campaign_id, self.shard).items() if due <= time.time()]

    def _idle_reason(self, lanes: Mapping[str, Lane], waited: float) -> str | None:
        """Why to end now that no lane has anything to do and none has had for `waited` seconds; None if it is worth waiting."""
        with reading(self.engine) as connection:
            due = due_times(connection, self.campaign_id, self.shard)
            left = open_rows(connection, self.campaign_id, self.shard)
            elsewhere = pending_elsewhere(connection, self.campaign_id, self.shard)
        if not left:
            return "the shard is final"
        waits = [max(moment, lanes[provider].wait_until if provider in lanes else 0) for (_, provider), moment in due.items()]
        if not waits:
            return "all open rows are with other sessions or unknown"
        # A slot that only waits is better used by a shard that has work now.
        linger = 0 if elsewhere else self.settings.sending.linger_seconds
        if min(waits) - time.time() > linger or waited > linger:
            refusals = {lane.reason for lane in lanes.values() if lane.reason}
            return "; ".join(sorted(refusals)) or "nothing falls due soon"
        return None

    def limits(self, provider: str) -> Limits:
        with reading(self.engine) as connection:
            row = connection.execute(
                sa.select(ProviderLimit.connections, ProviderLimit.per_second, ProviderLimit.messages_per_connection)
                .where(ProviderLimit.server_id.in_((0, self.server.id)), ProviderLimit.provider.in_((provider, "*")))
                .order_by(ProviderLimit.server_id.desc(), ProviderLimit.provider.desc())
                .limit(1)
            ).one_or_none()
        if row is None:
            raise DispatchError(f"no limits are set for {provider} on {self.server.key}: run `mail-pipelines server limits`")
        return Limits(*row)

    def content(self, version_id: int) -> tuple[CompiledMessage, SendingAs | None]:
        """The content of a version and as whom it is sent (None: its From domain is not registered, so it is not signed), fetched once.

        A key that is retired meanwhile goes on signing here until the session ends; its record stays published for longer.
        """
        if version_id not in self._versions:
            with reading(self.engine) as connection:
                blob = connection.execute(sa.select(CampaignVersion.compiled).where(CampaignVersion.id == version_id)).scalar_one()
                compiled = CompiledMessage.from_bytes(blob)
                self._versions[version_id] = compiled, sending_as(connection, compiled.from_domain, self.server.id, self.token_key)
        return self._versions[version_id]

    def identity(self, sending_as: SendingAs | None) -> SenderIdentity:
        """Who the messages of the next claim are from, dated now."""
        sending = self.settings.sending
        return SenderIdentity(
            token_key=self.token_key,
            return_path_domain=sending_as.return_path_domain if sending_as else sending.return_path_domain,
            public_url=sending_as.public_url if sending_as else sending.public_url,
            date=dt.datetime.now(dt.UTC),
            campaign_key=self.campaign_key,
            brand=self.brand,
            sender_id=sending.sender_id,
            signer=sending_as.signer if sending_as else None,
        )


class Lane:
    """The sending of one provider's rows: its pacer, its connections and its open claims."""

    def __init__(self, session: Session, provider: str, limits: Limits) -> None:
        self.session = session
        self.provider = provider
        self.limits = limits
        self.pacer = Pacer(session.folders.pacers, provider, per_second=self.limits.per_second, connections=self.limits.connections)
        self.links: list[Link] = []
        self.reason = ""
        self.wait_until = 0.0
        self._rows_per_second = 0.0
        self._concluding: set[asyncio.Task[None]] = set()

    async def close(self) -> None:
        await asyncio.gather(*self._concluding, return_exceptions=True)
        for link in self.links:
            await link.close()
        self.links.clear()
        self.pacer.close()

    async def run(self, until: float) -> None:
        """Claim and send until nothing is due (or allowed) for this provider."""
        try:
            while time.monotonic() < until and not self.session.stopping.is_set():
                while len(self._concluding) >= CLAIMS_AT_ONCE:
                    await asyncio.wait(self._concluding, return_when=asyncio.FIRST_COMPLETED)
                for task in [task for task in self._concluding if task.done()]:
                    task.result()
                if not await self._claim_and_send():
                    break
        finally:
            if self._concluding:
                await asyncio.wait(self._concluding)
            for task in list(self._concluding):
                self._concluding.discard(task)
                task.result()

    async def _claim_and_send(self) -> bool:
        """One claim; false if there is nothing to claim now."""
        session = self.session
        claim_id = claims.new_id()
        offered_from = time.monotonic()
        position = session.journal.end()
        granted = permit.grant(session.folders.permits, claim_id, seconds=session.settings.sending.lease_seconds)
        claimed: OpenClaim | None = None
        try:
            links = await self._greeted(granted.name)
            if not links:
                self.reason, self.wait_until = self.reason or "all connection slots are taken", time.time() + _NO_LINK_SECONDS
                return False
            answer = await in_thread(self._open, claim_id, position, len(links))
            if isinstance(answer, NothingClaimed):
                if answer.ends_session:
                    raise SessionOver(answer.reason)
                self.reason, self.wait_until = answer.reason, answer.retry_at or time.time() + _IDLE_POLL_SECONDS
                return False
            claimed = answer
        finally:
            if claimed is None:
                granted.release()
        session.report.claims += 1
        session.report.claimed += len(claimed.rows)
        if not claimed.rows:
            granted.release()
            return True
        offers: dict[int, Offer] = {}
        queue = iter(claimed.rows)
        deadline = offered_from + OFFER_SECONDS
        workers = [asyncio.create_task(self._work(link, queue, claimed, offers, deadline)) for link in links]
        # The rows are handed out when the first worker finds none left; slow replies of the others do not hold up the next claim.
        await asyncio.wait(workers, return_when=asyncio.FIRST_COMPLETED)
        await asyncio.wait(workers, timeout=_STRAGGLER_SECONDS)
        elapsed = time.monotonic() - offered_from
        self.reason = ""
        self._rows_per_second = len(offers) / max(elapsed, 0.01)
        task = asyncio.create_task(self._conclude(claimed, granted, offers, workers))
        self._concluding.add(task)
        task.add_done_callback(lambda done: None if done.exception() else self._concluding.discard(done))
        return True

    def _open(self, claim_id: int, position: Position, connections: int) -> OpenClaim | NothingClaimed:
        session = self.session
        # What can be sent in two seconds at the pace of the last claim; the first claim of a lane gives each connection a few.
        pace = min(self._rows_per_second or connections * 4 / CLAIM_SECONDS, self.limits.per_second)
        answer = claims.open_claim(
            session.engine,
            session.sender,
            session.memory,
            claim_id=claim_id,
            campaign_id=session.campaign_id,
            shard=session.shard,
            provider=self.provider,
            limit=min(CLAIM_ROWS, max(1, math.ceil(pace * CLAIM_SECONDS))),
            position=position,
            lease_seconds=session.settings.sending.lease_seconds,
        )
        if isinstance(answer, OpenClaim):
            session.memory = Memory(session.memory.generation, claim_id)
            servers.remember(session.folders, session.memory)
        return answer

    async def _greeted(self, permit_name: str) -> list[Link]:
        """The connections that took the permit's name: those that are free, and new ones as far as slots allow."""
        free = [link for link in self.links if not link.busy]
        share = max(1, math.ceil(self.limits.connections / self.session.settings.server.slots))
        while len(self.links) < share and (slot := self.pacer.slot()) is not None:
            link = Link(slot, self.session.server.host, self.session.server.port, self.session.settings.sending.reply_timeout_seconds)
            self.links.append(link)
            free.append(link)
        answers = await asyncio.gather(*(link.greet(permit_name) for link in free), return_exceptions=True)
        ready = []
        for link, answer in zip(free, answers, strict=True):
            if answer is None:
                ready.append(link)
                continue
            self.links.remove(link)
            await link.close()
            if not isinstance(answer, ServerUnreachable):
                raise answer
            self.reason = str(answer)
        return ready

    async def _work(self, link: Link, queue: Any, claimed: OpenClaim, offers: dict[int, Offer], deadline: float) -> None:
        """Offer rows over one connection until none is left, the claim's time is over or the server wants no more."""
        link.busy = True
        try:
            compiled, sending_as = await in_thread(self.session.content, claimed.version_id)
            identity = self.session.identity(sending_as)

            def composed() -> tuple[int, Message] | None:
                """The next row that a message can be made for."""
                for row in queue:
                    recipient = Recipient(claimed.ref.campaign_id, row.contact_id, row.attempt, row.email, row.values)
                    try:
                        return row.contact_id, compose(compiled, recipient, identity)
                    except ComposeError as error:
                        # One bad value must not stop the others, and trying it again would not mend it.
                        offers[row.contact_id] = Offer(Next.GO_ON, Ending.NOT_ATTEMPTED, unusable=str(error))
                return None

            ahead: tuple[int, Message] | None = None
            while link.usable and await self.pacer.turn(deadline):
                current = ahead or composed()
                if current is None:
                    return
                contact_id, message = current
                # An envelope goes ahead only where its body is not likely to wait for the pace, or for a slow destination beyond the deadline.
                last = link.offered + 1 >= self.limits.messages_per_connection
                ahead = composed() if not last and link.quick and self.pacer.is_free() else None
                offer = await link.offer(message, ahead[1] if ahead else None)
                offers[contact_id] = offer
                if offer.next is not Next.GO_ON:
                    link.usable = False
                    if offer.next is Next.STOP_CLAIM:
                        for _ in queue:
                            pass
                elif last:
                    link.usable = False
        finally:
            link.busy = False
            link.usable = link.usable and not link.expects_more
            if not link.usable:
                self.links.remove(link)
                await link.close()

    async def _conclude(self, claimed: OpenClaim, granted: permit.Permit, offers: dict[int, Offer], workers: list[asyncio.Task[None]]) -> None:
        """Wait for the last replies, close the gate, read the journal, record."""
        session = self.session
        try:
            await asyncio.wait(workers)
            granted.withdraw()
            results = await self._results(claimed, offers)
            counts = await in_thread(transact, session.engine, lambda connection: record(connection, claimed.ref, results, claim_state="open"))
        finally:
            granted.release()
        session.report.results.update(counts)
        for worker in workers:
            worker.result()
        released = {result.contact_id for result in results if result.state is State.PENDING}
        refusals = [offer.refusal for contact_id, offer in offers.items() if contact_id in released and offer.refusal and offer.next is Next.GO_ON]
        if refusals:
            # The destination was never asked, so trying again would go on for ever.
            raise SessionOver(f"the mail server {session.server.key} itself refuses messages: {mask_addresses(refusals[0])[:120]}")

    async def _results(self, claimed: OpenClaim, offers: dict[int, Offer]) -> list[Result]:
        """The end of every row: by the journal, or that no message could be made."""
        not_offered = Offer(Next.GO_ON, Ending.NOT_ATTEMPTED)
        heard = [(row, offers.get(row.contact_id, not_offered)) for row in claimed.rows]
        results = await self._read_results(claimed, [Offered(row.contact_id, row.attempt, offer.reply) for row, offer in heard if not offer.unusable])
        unusable = [row for row, offer in heard if offer.unusable]
        return results + [Result(row.contact_id, row.attempt, State.SUPPRESSED, reason="cannot_be_composed") for row in unusable]

    async def _read_results(self, claimed: OpenClaim, rows: list[Offered]) -> list[Result]:
        """The end of each row by the journal, once the mail server has nothing of this claim at a destination any more."""
        session = self.session
        # What has been answered is over: the mail server writes its line first. Its process may live on for the connection's next message.
        tokens = {settlement.token_of(claimed.ref, row, session.token_key) for row in rows if row.reply is None}
        # The lease must not run out while we wait: what is in flight then is unknown, as it would be to a settler.
        end = time.monotonic() + session.settings.sending.reply_timeout_seconds
        end = min(end, claimed.opened + session.settings.sending.lease_seconds - LEASE_MARGIN_SECONDS)
        while True:
            evidence = await in_thread(session.journal.evidence, claimed.position, claimed.ref.id)
            if not settlement.in_flight(evidence, tokens) or time.monotonic() > end:
                return settlement.conclude(rows, evidence, claimed.ref, session.settings.sending, session.token_key, time.time())
            await asyncio.sleep(_JOURNAL_POLL_SECONDS)


class Link:
    """One connection with the slot that allows it."""

    def __init__(self, slot: Slot, host: str, port: int, timeout: float) -> None:
        self._slot = slot
        self._connection = Connection(host, port, timeout)
        self._open = False
        self.busy = False
        self.usable = True
        self.offered = 0
        # Whether the last message took no time to speak of.
        self.quick = False

    @property
    def expects_more(self) -> bool:
        """Whether the mail server has the envelope of a message that has not been offered."""
        return self._connection.ahead is not None

    async def greet(self, permit_name: str) -> None:
        if not self._open:
            await self._connection.open()
            self._open = True
        await self._connection.greet(permit_name)

    async def offer(self, message: Message, following: Message | None) -> Offer:
        self.offered += 1
        begin = time.monotonic()
        offer = await self._connection.offer(message, following)
        self.quick = time.monotonic() - begin < QUICK_SECONDS
        return offer

    async def close(self) -> None:
        if self._open:
            await self._connection.close()
            self._open = False
        self._slot.free()


async def in_thread(function: Callable[..., T], *arguments: Any) -> T:
    """Run a blocking call (database, journal) beside the event loop, so that SMTP goes on."""
    return await asyncio.to_thread(function, *arguments)


def journal_of(folders: ServerFolders, kind: str) -> Journal:
    """The journal of a server of this kind."""
    if kind == "catcher":
        from mail_pipelines.dispatch.catcher import log

        return Journal(folders.journal, log.parse)
    if kind == "exim":
        from mail_pipelines.dispatch.exim import log as exim_log

        return Journal(folders.journal, exim_log.parse, exim_log.continues)
    raise DispatchError(f"servers of kind {kind!r} are not supported; expected catcher or exim")
