"""How far a host's clock is from the database's, which is the one that counts (docs/decisions/0044).

What belongs here: reading both at once, and what to say of a clock that is off. What does not: who looks (the heartbeat, `doctor`).
"""

from __future__ import annotations

import datetime as dt
import time
from typing import NamedTuple

from sqlalchemy.engine import Connection

from mail_pipelines.database.engine import database_now

# What is further off is named. NTP keeps hosts within milliseconds, and a round trip to a far database takes less than a second.
MOST_SECONDS = 30.0
REMEDY = "let NTP set it (`timedatectl` tells whether it does); if many servers are off alike, it is the clock of the database's host"


class Reading(NamedTuple):
    """The database's time, and how many seconds this host's clock is ahead of it (negative: behind)."""

    now: dt.datetime
    ahead_seconds: float


def read(connection: Connection) -> Reading:
    """Both clocks, to within half of a round trip."""
    before = time.time()
    now = database_now(connection)
    return Reading(now, (before + time.time()) / 2 - now.timestamp())


def words(ahead_seconds: float) -> str:
    """The distance in words, whether it matters or not."""
    return f"{abs(ahead_seconds):,.0f} s {'behind' if ahead_seconds < 0 else 'ahead of'} the database's"


def error(whose: str, ahead_seconds: float) -> str:
    """What to say of the clock of `whose`; empty if it is near enough."""
    return f"the clock of {whose} is {words(ahead_seconds)}" if abs(ahead_seconds) > MOST_SECONDS else ""
