"""A send session: one process that sends the due rows of one campaign through one server, those of its own shard first.

It keeps a lane for each provider, which claims, sends and records (`lane`). The session ends when nothing of the campaign falls due soon,
its time is up, another campaign needs its slot more, or its own does not want mail sent.
"""

from __future__ import annotations

import asyncio
import datetime as dt
import gc
import math
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import sqlalchemy as sa
from sqlalchemy.engine import Engine

from mail_pipelines.capacity import allotments
from mail_pipelines.config import Settings
from mail_pipelines.database import migrate
from mail_pipelines.database.engine import database_now, reading
from mail_pipelines.database.models import Brand, Campaign, CampaignVersion, ProviderLimit, State
from mail_pipelines.dispatch import composer, errands, giving_way, last_error, servers, settlement
from mail_pipelines.dispatch.batch import set_within
from mail_pipelines.dispatch.burst import BurstLane
from mail_pipelines.dispatch.claims import Sender
from mail_pipelines.dispatch.due import due_times, next_due, open_rows
from mail_pipelines.dispatch.errands import Errands
from mail_pipelines.dispatch.files import DispatchError, ServerFolders, boot_id, is_locked, only_one
from mail_pipelines.dispatch.follower import Follower
from mail_pipelines.dispatch.interruption import on_first_signal
from mail_pipelines.dispatch.journal import Journal
from mail_pipelines.dispatch.lane import Lane, Limits, SessionOver, in_thread
from mail_pipelines.dispatch.recovery.reading import take_part
from mail_pipelines.domains.signing import SendingAs, sending_as
from mail_pipelines.messages.compiled import CompiledMessage
from mail_pipelines.messages.composing import SenderIdentity

_POLL_SECONDS = 0.5
# A session that waits looks the more seldom the longer it has waited: after this part of that time, and so often at least.
_POLL_PART, _LONGEST_POLL_SECONDS = 0.25, 5.0
# How often a session looks what its campaign's other shards have, while only some of its lanes have something to do; it does as well when one ends.
_LOOK_AROUND_SECONDS = 5.0
# Of how many of them a lane then takes rows before it looks again: others do so too.
_SHARDS_AT_ONCE = 8
# How often a session looks whether its version is still one the database works with, a campaign of higher priority waits for its slot, or something is to
# be done for another campaign.
_GIVE_WAY_SECONDS = 5.0


@dataclass
class Report:
    """What a session did, in counts only. `reason` says why it ended, `next_due` (epoch seconds) when the shard has work again.

    `interrupted`: a signal asked it to end.
    """

    server: str
    claimed: int = 0
    results: Counter[State] = field(default_factory=Counter)
    settled: Counter[State] = field(default_factory=Counter)
    claims: int = 0
    # From which rows were claimed.
    shards: set[int] = field(default_factory=set)
    # Rows of other campaigns that were claimed besides.
    errands: int = 0
    reason: str = ""
    interrupted: bool = False
    open_rows: int = 0
    next_due: float | None = None
    seconds: float = 0.0

    @property
    def sent(self) -> int:
        return self.results[State.DELIVERED]


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
    # Sends only what is due of a campaign, in the run of another one's session.
    is_errand: bool = False

    def __post_init__(self) -> None:
        self.folders = ServerFolders.of(self.settings.server, self.server.key)
        self.report = Report(self.server.key)
        self.sender = Sender(self.server.id, self.server.key, self.folders.incarnation(), boot_id(), self.run_id)
        self.follower = Follower(self.journal)
        if not take_part(self.engine, self.settings, self.server, self.sender, self.journal):
            raise DispatchError(f"the database is being recovered: server {self.server.key} sends nothing until `mail-pipelines recover` has finished")
        self.memory = servers.recall(self.engine, self.folders)
        self.token_key = self.settings.token_key()
        with reading(self.engine) as connection:
            self.brand = connection.execute(
                sa.select(Brand.key).join(Campaign, Campaign.brand_id == Brand.id).where(Campaign.id == self.campaign_id)
            ).scalar_one()
        self._versions: dict[int, tuple[CompiledMessage, SendingAs | None]] = {}
        self.errands = Errands(self)

    def run(self) -> Report:
        """Send until there is a reason to end. Raises `DispatchError` when this process must not send at all."""
        begin = time.monotonic()
        with only_one(self.folders.sessions / self.run_id, f"run {self.run_id}"):
            try:
                done = settlement.settle_all(self.engine, self.sender, self.folders, self.journal, self.settings.sending, self.token_key)
                self.report.settled.update(done.rows)
                if self.settings.this_server is None:
                    allotments.fill(self.engine, self.settings.server.heartbeat_seconds)
                # What is loaded by now stays. Looking through it again and again would take a tenth of a session's time.
                gc.freeze()
                with composer.threads() as self.signing:
                    self._serve(begin + self.settings.sending.session_seconds)
            except Exception as error:
                last_error.keep(self.folders, f"session {self.run_id}", error)
                raise
            finally:
                gc.unfreeze()
                (self.folders.sessions / self.run_id).unlink(missing_ok=True)
        with reading(self.engine) as connection:
            self.report.open_rows = open_rows(connection, self.campaign_id, self.shard)
            self.report.next_due = next_due(connection, self.campaign_id, self.shard)
        self.report.seconds = time.monotonic() - begin
        return self.report

    def _serve(self, until: float) -> None:
        """Send, and do errands between: nothing of its own is on its way then, so connections and their slots are free."""
        asyncio.run(self.send(until))
        while (errand := self.errands.wanted) is not None and not self.report.interrupted:
            self.errands.do(errand, until)
            if not self.report.interrupted:
                asyncio.run(self.send(until))
        if self.report.interrupted:
            self.report.reason = "asked to end"

    async def send(self, until: float) -> None:
        """Run the lanes until nothing is due within `linger_seconds`, one of them ends the session, or a signal asks for its end."""
        self.stopping = asyncio.Event()
        lanes: dict[str, Lane] = {}
        loop = asyncio.get_running_loop()
        with on_first_signal(lambda: loop.call_soon_threadsafe(self._interrupt, lanes)):
            await self._run_lanes(lanes, until)

    def _interrupt(self, lanes: Mapping[str, Lane]) -> None:
        """Offer nothing more: what is on its way is finished and recorded, all other rows are released."""
        self.report.interrupted = True
        self.stopping.set()
        for lane in lanes.values():
            lane.offer_no_more()

    async def _run_lanes(self, lanes: dict[str, Lane], until: float) -> None:
        running: dict[str, asyncio.Task[None]] = {}
        last_progress = last_look = time.monotonic()
        progress = self.report.claims, self.report.results.total()
        next_around = -math.inf
        try:
            while True:
                if self.report.interrupted:
                    raise SessionOver("asked to end")
                if time.monotonic() >= until:
                    raise SessionOver("the session's time is up")
                if time.monotonic() - last_look >= _GIVE_WAY_SECONDS:
                    last_look = time.monotonic()
                    if (key := await in_thread(self._wanted_by)) is not None:
                        raise SessionOver(f"campaign {key} has a higher priority and waits for a slot of this server")
                    if (errand := await in_thread(self.errands.look, not any(lane.has_claims for lane in lanes.values()))) is not None:
                        raise SessionOver(f"an errand for campaign {errand.campaign}")
                looked = time.monotonic()
                around = not running or looked >= next_around
                if around:
                    next_around = looked + _LOOK_AROUND_SECONDS
                for provider, shards in (await in_thread(self._due_shards, around)).items():
                    lane = lanes.get(provider) or lanes.setdefault(provider, self._lane(provider, await in_thread(self.limits, provider)))
                    if provider in running:
                        continue
                    if lane.asks_at > time.monotonic():
                        next_around = min(next_around, lane.asks_at)
                        continue
                    running[provider] = asyncio.create_task(lane.run(until, shards))
                if running:
                    await asyncio.wait(running.values(), timeout=_POLL_SECONDS, return_when=asyncio.FIRST_COMPLETED)
                else:
                    waited = time.monotonic() - last_progress
                    await set_within(self.stopping, min(max(_POLL_SECONDS, waited * _POLL_PART), _LONGEST_POLL_SECONDS))
                for provider in [provider for provider, task in running.items() if task.done()]:
                    running.pop(provider).result()
                    next_around = min(next_around, lanes[provider].asks_at)
                self.progress(self.report)
                # One that only asks in vain makes no progress; one whose claim gave its rows back does, and they are to be claimed again.
                before, progress = progress, (self.report.claims, self.report.results.total())
                if progress != before or any(lane.has_claims for lane in lanes.values()):
                    last_progress = time.monotonic()
                    continue
                # In vain up to its last look: what has passed since, while it slept or the host stood still, was not waited in vain.
                waited = looked - last_progress
                if running and waited <= self._linger_seconds + self.settings.sending.reply_timeout_seconds:
                    # What a lane asks for is due. A mail server or a database that is busy may take longer over the answer than a session lingers.
                    continue
                if (reason := await in_thread(self._idle_reason, lanes, waited, looked)) is not None:
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

    def _lane(self, provider: str, limits: Limits) -> Lane:
        """A catcher delivers nothing onward, so it knows only one mode."""
        return BurstLane(self, provider, limits) if limits.mode == "burst" and self.server.kind == "exim" else Lane(self, provider, limits)

    def _due_shards(self, around: bool) -> dict[str, list[int]]:
        """By provider the shards that have rows to send now: its own, or if that has none and the session looks `around`, the next ones of the campaign."""
        with reading(self.engine) as connection:
            # A session that waits has no claim by which it would notice.
            second = servers.check_time(connection, self.server.id, self.server.key, self.folders).timestamp()
            due = due_times(connection, self.campaign_id, None if around else self.shard, server_id=self.server.id)
        found: defaultdict[str, list[int]] = defaultdict(list)
        # Each session begins behind its own shard, so that they meet late.
        for shard, provider in sorted((place for place, moment in due.items() if moment <= second), key=lambda place: (place[0] < self.shard, place)):
            found[provider].append(shard)
        return {provider: shards[:1] if shards[0] == self.shard else shards[:_SHARDS_AT_ONCE] for provider, shards in found.items()}

    def _wanted_by(self) -> str | None:
        """The campaign of higher priority that needs this session's slot; None if there is none.

        Raises `SchemaOutdated` if the centre was upgraded so far meanwhile that this version may send no more.
        """
        with reading(self.engine) as connection:
            migrate.require_known(connection)
            return giving_way.waits_for_a_slot(connection, self.server, self.run_id, slots=self.settings.server.slots)

    def slots_are_taken(self) -> bool:
        """Whether as many sessions of this server live as it has slots."""
        return sum(is_locked(path) for path in self.folders.sessions.iterdir()) >= self.settings.server.slots

    @property
    def _linger_seconds(self) -> float:
        return errands.LINGER_SECONDS if self.is_errand else self.settings.sending.linger_seconds

    def _idle_reason(self, lanes: Mapping[str, Lane], waited: float, looked: float) -> str | None:
        """Why to end now that no lane has anything to do and none has had for `waited` seconds before the session `looked` last (monotonic); None if it is
        worth waiting."""
        with reading(self.engine) as connection:
            due = due_times(connection, self.campaign_id, server_id=self.server.id)
            second = database_now(connection).timestamp()
            left = open_rows(connection, self.campaign_id, self.shard)
            # A slot that only waits is better used by whoever has work now.
            waiting = giving_way.campaign_with_work(connection, self.server, besides=[self.campaign_id]) if self.slots_are_taken() else None
        asked = time.monotonic()
        if not due:
            return "all open rows are with other sessions or unknown" if left else "the shard is final"
        # When each is due, and when it is worth asking for.
        waits = [(moment - second, lanes[provider].wait_until - asked if provider in lanes else 0) for (_, provider), moment in due.items()]
        linger = self._linger_seconds
        # What was due at the last look after so long has been asked for in vain; what has fallen due since, or falls due only now, has not.
        if not any(max(wait) <= linger and (waited <= linger or wait[0] > looked - asked) for wait in waits):
            refusals = {lane.reason for lane in lanes.values() if lane.reason}
            return "; ".join(sorted(refusals)) or "nothing falls due soon"
        return f"campaign {waiting} waits for a slot of this server" if waiting is not None and not self.is_errand else None

    def limits(self, provider: str) -> Limits:
        with reading(self.engine) as connection:
            row = connection.execute(
                sa.select(ProviderLimit.connections, ProviderLimit.per_second, ProviderLimit.messages_per_connection, ProviderLimit.mode)
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

    def identity(self, sending_as: SendingAs | None, date: dt.datetime) -> SenderIdentity:
        """Who the messages of a claim are from, dated by the database: a signature from the future, which a fast clock would make, counts as none."""
        sending = self.settings.sending
        return SenderIdentity(
            token_key=self.token_key,
            return_path_domain=sending_as.return_path_domain if sending_as else sending.return_path_domain,
            public_url=sending_as.public_url if sending_as else sending.public_url,
            date=date,
            campaign_key=self.campaign_key,
            brand=self.brand,
            sender_id=sending.sender_id,
            signer=sending_as.signer if sending_as else None,
        )


def journal_of(folders: ServerFolders, kind: str) -> Journal:
    """The journal of a server of this kind."""
    if kind == "catcher":
        from mail_pipelines.dispatch.catcher import log

        return Journal(folders.journal, log.parse)
    if kind == "exim":
        from mail_pipelines.dispatch.exim import log as exim_log

        return Journal(folders.journal, exim_log.parse, exim_log.continues, exim_log.scan)
    raise DispatchError(f"servers of kind {kind!r} are not supported; expected catcher or exim")
