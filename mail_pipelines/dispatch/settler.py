"""The resident settler: beside the beats of a server it settles what sessions have left behind, without waiting for the next session.

What belongs here: the loop. What does not: the rules by which a claim is settled (`settlement`), late lines (`audit.LateLines`), breakers
(`capacity.breakers`). A session still settles before it sends, so nothing depends on this loop but the time it takes.
"""

from __future__ import annotations

import asyncio
import datetime as dt
import logging
from collections import Counter
from dataclasses import dataclass, field

from sqlalchemy.engine import Engine

from mail_pipelines.capacity import breakers
from mail_pipelines.config import Settings
from mail_pipelines.database.engine import DatabaseUnreachable, database_now, reading
from mail_pipelines.database.models import State
from mail_pipelines.dispatch import last_error, settlement
from mail_pipelines.dispatch.audit import LateLines
from mail_pipelines.dispatch.claims import Sender
from mail_pipelines.dispatch.files import DispatchError, ServerFolders, boot_id
from mail_pipelines.dispatch.recovery.reading import take_part
from mail_pipelines.dispatch.servers import ServerInfo
from mail_pipelines.dispatch.session import journal_of

# Between two rounds: what a pause of a claim's rows, a late line or a block by a provider may take to act.
INTERVAL_SECONDS = 5.0
_log = logging.getLogger(__name__)


@dataclass
class Tally:
    """What a settler has done since its process began. `finished_at` is when it last ended a round (epoch seconds, by the database's clock)."""

    finished_at: float | None = None
    failures: int = 0
    claims: int = 0
    rows: Counter[State] = field(default_factory=Counter)


class Settler:
    """The settler of one server, in a process that speaks for it."""

    def __init__(self, engine: Engine, settings: Settings, server: ServerInfo) -> None:
        self._engine = engine
        self._settings = settings
        self._folders = ServerFolders.of(settings.server, server.key)
        self._journal = journal_of(self._folders, server.kind)
        self._sender = Sender(server.id, server.key, self._folders.incarnation(), boot_id(), "settler")
        self._server = server
        self._late: LateLines | None = None
        self.tally = Tally()

    async def for_ever(self) -> None:
        """A round every few seconds. Without database or journal there is nothing to do, and the next round tries again."""
        while True:
            try:
                await asyncio.to_thread(self.round, dt.datetime.now(dt.UTC))
                self.tally.finished_at = await asyncio.to_thread(self._database_second)
            except (DatabaseUnreachable, DispatchError) as error:
                _log.warning("settler of %s: %s", self._server.key, error)
                last_error.keep(self._folders, "settler", error)
                self.tally.failures += 1
            await asyncio.sleep(INTERVAL_SECONDS)

    def _database_second(self) -> float:
        with reading(self._engine) as connection:
            return database_now(connection).timestamp()

    def round(self, now: dt.datetime) -> None:
        """Take part in a recovery, settle abandoned claims, end doubts by late lines, and judge the breakers. `now` is this host's time."""
        if not take_part(self._engine, self._settings, self._server, self._sender, self._journal):
            return
        done = settlement.settle_all(
            self._engine, self._sender, self._folders, self._journal, self._settings.sending, self._settings.token_key(), wait_seconds=0
        )
        self.tally.claims += done.claims
        self.tally.rows.update(done.rows)
        if done.claims:
            _log.info("settler of %s: %d claims, %s", self._server.key, done.claims, {state.name.lower(): count for state, count in done.rows.items()})
        if self._late is None:
            self._late = LateLines(self._engine, self._settings, self._server, self._journal, self._folders)
        if ended := self._late.look(now):
            _log.info("settler of %s: late lines, %s", self._server.key, {state.name.lower(): count for state, count in ended.items()})
        if self._settings.this_server is None:
            # Grants are the centre's, which judges by the same numbers.
            breakers.judge(self._engine)
