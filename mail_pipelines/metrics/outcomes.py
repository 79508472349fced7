"""How many messages came to which end, as counters that only rise.

The database has outcomes by minute (`campaign_minutes`), which end with their campaign. What is told is the growth of the last minutes since they were
first looked at, so that each look reads little, two looks count nothing twice, and a campaign that is over takes nothing away.
"""

from __future__ import annotations

import datetime as dt
from collections import Counter
from collections.abc import Mapping

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from mail_pipelines.database.models import Campaign, CampaignMinute, State

# Longer than Prometheus may not have asked, and than a transaction may take.
WINDOW = dt.timedelta(minutes=10)
# Outcomes of a campaign still come in so long after its end: unknown rows wait for three days.
_AFTER_END = dt.timedelta(days=4)
# Server (0: the centre), provider, state.
Place = tuple[int, str, int]
Minutes = dict[tuple[int, Place], int]


class Outcomes:
    """Totals since the first look."""

    def __init__(self) -> None:
        self.totals: Counter[Place] = Counter()
        self._seen: Minutes | None = None

    def look(self, connection: Connection, now: dt.datetime) -> None:
        self.advance(_recent(connection, now))

    def advance(self, found: Mapping[tuple[int, Place], int]) -> None:
        """Add what has grown. An outcome that was corrected is counted again under its new name and not taken back under the old one."""
        for key, count in found.items() if self._seen is not None else ():
            # Present even at zero, so that the first message is a rise.
            self.totals[key[1]] += max(0, count - (self._seen or {}).get(key, 0))
        if self._seen is None:
            self.totals.update({place: 0 for _, place in found})
        self._seen = dict(found)


def _recent(connection: Connection, now: dt.datetime) -> Minutes:
    """The outcomes of the last minutes, by minute."""
    live = sa.or_(Campaign.state.in_(("sending", "paused")), Campaign.finished_at >= now - _AFTER_END)
    campaigns = connection.execute(sa.select(Campaign.id).where(live)).scalars().all()
    if not campaigns:
        return {}
    by = (CampaignMinute.minute, CampaignMinute.server_id, CampaignMinute.provider, CampaignMinute.state)
    rows = connection.execute(
        sa.select(*by, sa.func.sum(CampaignMinute.count))
        .where(CampaignMinute.campaign_id.in_(campaigns), CampaignMinute.minute >= int((now - WINDOW).timestamp()) // 60)
        .group_by(*by)
    )
    return {(minute, (server_id, provider, state)): int(count) for minute, server_id, provider, state, count in rows}


def name(state: int) -> str:
    return State(state).name.lower()
