"""Errands: deferred rows of other campaigns that a session sends between its own, since nobody else comes for them (docs/decisions/0048).

What belongs here: when a session does one, and how. What does not: which rows need it (`giving_way.errand_for`).
"""

from __future__ import annotations

import asyncio
import math
import time
from dataclasses import replace
from typing import TYPE_CHECKING

from mail_pipelines.database.engine import reading
from mail_pipelines.dispatch import giving_way, last_error
from mail_pipelines.errors import MailPipelinesError

if TYPE_CHECKING:
    from mail_pipelines.dispatch.session import Session

# An errand takes no longer, and waits so long for what falls due meanwhile.
ERRAND_SECONDS, LINGER_SECONDS = 60.0, 5.0
# Between two errands of a session; and after one in vain.
_PAUSE_SECONDS, _VAIN_PAUSE_SECONDS = 20.0, 300.0


class Errands:
    """The errands of one session. `wanted` is the one that it has ended its lanes for."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self.wanted: giving_way.Errand | None = None
        # When it may do the next one (monotonic seconds); one that is an errand does none.
        self._not_before = math.inf if session.is_errand else 0.0

    def look(self, waits: bool) -> giving_way.Errand | None:
        """Whether there is something to send for another campaign, for a session that has claims or only `waits`. It is `wanted` from now on."""
        session, slots = self._session, self._session.settings.server.slots
        if time.monotonic() < self._not_before or (waits and not session.slots_are_taken()):
            return None
        with reading(session.engine) as connection:
            self.wanted = giving_way.errand_for(connection, session.server, session.run_id, session.campaign_id, slots=slots, waits=waits)
        return self.wanted

    def do(self, errand: giving_way.Errand, until: float) -> None:
        """Send what is due of that campaign. A fault of it is not this session's."""
        session, self.wanted = self._session, None
        other = replace(session, campaign_id=errand.campaign_id, campaign_key=errand.campaign, shard=errand.shard, progress=lambda _: None, is_errand=True)
        other.signing = session.signing
        try:
            asyncio.run(other.send(min(until, time.monotonic() + ERRAND_SECONDS)))
        except (MailPipelinesError, ValueError, LookupError) as error:
            last_error.keep(session.folders, f"errand of session {session.run_id} for campaign {errand.campaign}", error)
            pause = math.inf
        else:
            session.memory = other.memory
            pause = _PAUSE_SECONDS if other.report.claims else _VAIN_PAUSE_SECONDS
        session.report.errands += other.report.claimed
        # A signal that came meanwhile is the session's.
        session.report.interrupted = other.report.interrupted
        self._not_before = time.monotonic() + pause
