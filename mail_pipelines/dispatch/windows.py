"""Send windows as claims see them: the spans in which a campaign may be sent in each time zone, and until when a row outside of them is put off.

A row that may not be offered now is deferred until its window opens, which is no attempt. Within an opening rows fall due in the order of engagement:
each so many seconds after it as its rank says. The spans are computed when the audience is made (`campaigns.send_window`), since databases know no
zones; whoever asks compares seconds. The stored procedure `claim_rows` states the same rules.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from mail_pipelines.database.models import State, WindowRows, WindowSpan
from mail_pipelines.database.upsert import add_to

# Reasons of deferred rows: their window opens when they are due; it does not open again before the campaign's end, and they will expire.
WAITS, NEVER = "window", "no_window"
# Contacts without a time zone, or with one that nobody knows, go by the campaign's own.
OWN = ""
# Ranks (days since the last engagement) up to this are told apart; everybody else falls due so many seconds after the opening.
SPREAD_SECONDS = 91
# Of `segments.ranks`: places of one rank.
_PLACES_A_RANK = 65_536
# When it opens and closes, in epoch seconds.
Span = tuple[int, int]
# Provider, zone and opening.
Place = tuple[str, str, int]


@dataclass(frozen=True)
class Windows:
    """The spans of a campaign by zone, in order. The last of each zone has no length: it is the campaign's end, at which what still waits expires."""

    spans: Mapping[str, Sequence[Span]]

    def zone(self, name: str | None) -> str:
        """The zone that counts for a contact with this one."""
        return name if name is not None and name in self.spans else OWN

    def opened(self, zone: str, second: int) -> int:
        """When the newest span began that had begun at `second`; 0 if none had."""
        spans = self.spans.get(zone, ())
        number = bisect_right(spans, second, key=lambda span: span[0])
        return spans[number - 1][0] if number else 0

    def next_opening(self, zone: str, second: int, until: int) -> int | None:
        """None if it is open from `second` until `until`; else when it opens next."""
        spans = self.spans.get(zone, ())
        number = bisect_right(spans, second, key=lambda span: span[0])
        if number and spans[number - 1][1] > until:
            return None
        return spans[number][0] if number < len(spans) else until

    def reason(self, zone: str, opening: int) -> str:
        spans = self.spans.get(zone, ())
        return NEVER if spans and opening >= spans[-1][0] else WAITS

    def due(self, zone: str, opening: int, state: State, sort_key: int, reason: str | None) -> int:
        """When a row that is put off until an opening falls due: in the order of engagement, retries first."""
        after = 0
        if state is State.PENDING:
            after = sort_key // _PLACES_A_RANK
        elif reason == WAITS:
            after = sort_key - self.opened(zone, sort_key)
        return opening + min(max(after, 0), SPREAD_SECONDS)


def read(connection: Connection, campaign_id: int, zones: Collection[str] | None = None) -> Windows:
    """The spans of a campaign, of all zones or of these and its own."""
    query = sa.select(WindowSpan.time_zone, WindowSpan.opens_at, WindowSpan.closes_at).where(WindowSpan.campaign_id == campaign_id)
    if zones is not None:
        query = query.where(WindowSpan.time_zone.in_(sorted({OWN, *zones})))
    found: defaultdict[str, list[Span]] = defaultdict(list)
    for zone, opens, closes in connection.execute(query.order_by(WindowSpan.time_zone, WindowSpan.opens_at)).tuples():
        found[zone].append((opens, closes))
    return Windows(dict(found))


def count(connection: Connection, campaign_id: int, places: Mapping[Place, int]) -> None:
    """Add rows that were put off until an opening, or were there in it from the beginning."""
    rows = [
        {"campaign_id": campaign_id, "provider": provider, "time_zone": zone, "opens_at": opening, "count": number}
        for (provider, zone, opening), number in sorted(places.items())
    ]
    add_to(connection, WindowRows, rows, column="count")


def waiting(connection: Connection, campaign_ids: Iterable[int], second: int) -> dict[tuple[int, str], dict[tuple[str, int], int]]:
    """By campaign and provider how many rows wait for which zone to open: (zone, opening) → rows.

    Exact for openings after `second`, since nothing is claimed of them before, as long as the campaign is neither cancelled nor expired.
    """
    columns = (WindowRows.campaign_id, WindowRows.provider, WindowRows.time_zone, WindowRows.opens_at, WindowRows.count)
    found: defaultdict[tuple[int, str], dict[tuple[str, int], int]] = defaultdict(dict)
    query = sa.select(*columns).where(WindowRows.campaign_id.in_(list(campaign_ids)), WindowRows.opens_at > second)
    for campaign_id, provider, zone, opening, rows in connection.execute(query).tuples():
        found[campaign_id, provider][zone, opening] = rows
    return dict(found)
