"""Send windows of a campaign in time: when they are open, written down when its audience is made, and rows that still wait when they close, put off.

Claims put off whom they meet outside of the window; this does it for all at once, so that claims find open rows first. It moves at most 10,000 rows a
transaction and may be killed at any moment and run again.
"""

from __future__ import annotations

import datetime as dt
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Sequence

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine

from mail_pipelines.campaigns.campaign import Campaign
from mail_pipelines.campaigns.open_rows import WAITING, Slice, in_slice, slices
from mail_pipelines.contacts import sets, time_zones
from mail_pipelines.database import models
from mail_pipelines.database.bulk import CHUNK_ROWS
from mail_pipelines.database.engine import reading, transact
from mail_pipelines.database.models import Contact, Delivery, State, WindowRows, WindowSpan
from mail_pipelines.delivery import counters
from mail_pipelines.dispatch import windows
from mail_pipelines.dispatch.windows import Windows

_RUNNING = ("sending", "paused")
_SPANS_AT_ONCE = 5_000


def write_spans(engine: Engine, campaign: Campaign, now: dt.datetime) -> Windows | None:
    """Write down when the window of a campaign that is being frozen is open in which zone; None if it has none. Again it writes the same."""
    window, end = campaign.definition.window, campaign.expires_at
    if window is None or end is None:
        return None
    begin, last = int((campaign.definition.start_at or now).timestamp()), int(end.timestamp())
    # At the second of its end nothing is claimed any more, only from then on does it expire.
    spans = {name: [*window.spans(name, begin, last), (last + 1, last + 1)] for name in sorted(time_zones.names())}
    spans[windows.OWN] = spans[window.zone]
    rows = [{"campaign_id": campaign.id, "time_zone": zone, "opens_at": opens, "closes_at": closes} for zone in sorted(spans) for opens, closes in spans[zone]]

    def work(connection: Connection) -> None:
        connection.execute(sa.delete(WindowSpan).where(WindowSpan.campaign_id == campaign.id))
        for start in range(0, len(rows), _SPANS_AT_ONCE):
            connection.execute(sa.insert(WindowSpan), rows[start : start + _SPANS_AT_ONCE])

    transact(engine, work)
    return Windows(spans)


def closing(connection: Connection, now: dt.datetime, lease_seconds: float) -> bool:
    """Whether windows of running campaigns have closed whose rows have not been put off yet. As for claims, they close a lease before their time."""
    row = models.Campaign
    until = int(now.timestamp() + lease_seconds)
    closed = sa.exists().where(WindowSpan.campaign_id == row.id, *_closed(sa.func.coalesce(row.windows_kept, 0), until), _with_rows())
    return connection.execute(sa.select(row.id).where(row.state.in_(_RUNNING), row.send_window.is_not(None), closed).limit(1)).first() is not None


def _with_rows() -> sa.ColumnElement[bool]:
    """Of all zones those that recipients were in; whoever has come to another since is put off by a claim."""
    return sa.exists().where(WindowRows.campaign_id == WindowSpan.campaign_id, WindowRows.time_zone == WindowSpan.time_zone).correlate(WindowSpan)


def _closed(since: sa.ColumnElement[int] | int, until: int) -> tuple[sa.ColumnElement[bool], ...]:
    return WindowSpan.closes_at > since, WindowSpan.closes_at <= until, WindowSpan.closes_at > WindowSpan.opens_at


def put_off(engine: Engine, campaign: Campaign, now: dt.datetime, lease_seconds: float) -> int:
    """Defer what waits in zones whose window has closed since the last call until it opens again; returns how many rows were put off."""
    if campaign.definition.window is None or campaign.state.value not in _RUNNING:
        return 0
    second, until = int(now.timestamp()), int(now.timestamp() + lease_seconds)
    with reading(engine) as connection:
        kept = connection.execute(sa.select(models.Campaign.windows_kept).where(models.Campaign.id == campaign.id)).scalar_one() or 0
        query = sa.select(WindowSpan.time_zone, WindowSpan.opens_at).where(WindowSpan.campaign_id == campaign.id, *_closed(kept, until), _with_rows())
        closed = connection.execute(query).tuples().all()
        if not closed:
            return 0
        spans = windows.read(connection, campaign.id)
        openings = {zone: opening for zone, _ in closed if (opening := spans.next_opening(zone, second, until)) is not None}
        ranges = _ranges(connection, campaign.id, {opened for _, opened in closed}, max(openings.values(), default=0))
        # Pending are those whose window was open when the audience was made; what claims give back besides is for claims.
        first = campaign.started_at is None or any(opened <= campaign.started_at.timestamp() for _, opened in closed)
        parts = slices(connection, campaign.id, WAITING if first else (State.DEFERRED,))
    moved = 0
    for part in parts if openings else ():
        for late in _late(engine, campaign.id, part, spans, openings, ranges):
            moved += transact(engine, lambda connection, part=part, late=late: _move(connection, campaign.id, part, late, spans, openings, now))  # type: ignore[misc]
    transact(engine, lambda connection: connection.execute(sa.update(models.Campaign).where(models.Campaign.id == campaign.id).values(windows_kept=until)))
    return moved


def _ranges(connection: Connection, campaign_id: int, opened: Collection[int], end: int) -> list[windows.Span]:
    """Where in the order of due seconds rows may wait whose windows `opened` then and are closed now: everywhere before `end`, but where others wait for
    their opening. Those are most rows. A recipient who has left one of these zones, or come to one, waits on where he is counted, for a claim.
    """
    others = (WindowRows.campaign_id == campaign_id, WindowRows.opens_at < end, WindowRows.opens_at.not_in(opened))
    query = sa.select(WindowRows.opens_at).where(*others).distinct()
    found, begin = [], 0
    for opening in connection.execute(query.order_by(WindowRows.opens_at)).scalars():
        found.append((begin, opening - 1))
        begin = opening + windows.SPREAD_SECONDS + 1
    return [(first, last) for first, last in [*found, (begin, end - 1)] if first <= last]


# Contact, its place in the queue, zone, and when it falls due.
_Late = tuple[int, int, str, int]


def _late(engine: Engine, campaign_id: int, part: Slice, spans: Windows, openings: dict[str, int], ranges: Sequence[windows.Span]) -> Iterator[list[_Late]]:
    """The rows of a slice that wait in these zones for something before their next opening, in portions."""
    place: tuple[int, int] | None = None
    while True:
        rows = _portion(engine, campaign_id, part, ranges, place)
        zoned = [(row, spans.zone(row.time_zone)) for row in rows]
        late = [
            (row.contact_id, row.sort_key, zone, spans.due(zone, openings[zone], part.state, row.sort_key, row.reason))
            for row, zone in zoned
            if zone in openings and (part.state is State.PENDING or row.sort_key < openings[zone])
        ]
        if late:
            yield late
        if len(rows) < CHUNK_ROWS:
            return
        place = rows[-1].sort_key, rows[-1].contact_id


def _portion(
    engine: Engine, campaign_id: int, part: Slice, ranges: Sequence[windows.Span], after: tuple[int, int] | None
) -> Sequence[sa.Row[int, int, str | None, str | None]]:
    """The next rows in the order of the index, the deferred ones of these ranges."""
    where = in_slice(campaign_id, part)
    if part.state is State.DEFERRED:
        where.append(sa.or_(*(Delivery.sort_key.between(first, last) for first, last in ranges)))
    if after is not None:
        key, contact_id = after
        where += [Delivery.sort_key >= key, sa.or_(Delivery.sort_key > key, Delivery.contact_id > contact_id)]
    order = (Delivery.sort_key, Delivery.contact_id)
    first = sa.select(Delivery.contact_id, Delivery.sort_key, Delivery.reason).where(*where).order_by(*order).limit(CHUNK_ROWS).subquery()
    query = sa.select(first, Contact.time_zone).outerjoin(Contact, Contact.id == first.c.contact_id).order_by(first.c.sort_key, first.c.contact_id)
    with reading(engine) as connection:
        return connection.execute(query).all()


def _move(connection: Connection, campaign_id: int, part: Slice, late: list[_Late], spans: Windows, openings: dict[str, int], now: dt.datetime) -> int:
    """Defer those of the rows that wait where they waited and that nobody is claiming; count them where they were and where they are.

    One with another place was put off by a claim meanwhile, and is counted.
    """
    ours = (Delivery.campaign_id == campaign_id, Delivery.state == int(part.state), Delivery.provider == part.provider)
    free: set[tuple[int, int]] = set()
    for ids in sets.slices(contact_id for contact_id, *_ in late):
        locked = sa.select(Delivery.contact_id, Delivery.sort_key).where(*ours, Delivery.contact_id.in_(ids)).with_for_update(skip_locked=True)
        free.update(connection.execute(locked).tuples())
    by_end: defaultdict[tuple[int, str], list[int]] = defaultdict(list)
    waiting: Counter[windows.Place] = Counter()
    for contact_id, place, zone, due in late:
        if (contact_id, place) in free:
            by_end[due, spans.reason(zone, openings[zone])].append(contact_id)
            waiting[part.provider, zone, openings[zone]] += 1
    for (due, reason), contact_ids in sorted(by_end.items()):
        values = {"state": int(State.DEFERRED), "sort_key": due, "code": None, "enhanced": None, "reason": reason}
        for ids in sets.slices(contact_ids):
            connection.execute(sa.update(Delivery).where(Delivery.campaign_id == campaign_id, Delivery.contact_id.in_(ids)).values(values))
    moved = waiting.total()
    moves: Counter[counters.Place] = Counter({(part.shard, part.provider, part.state, ""): -moved})
    moves[part.shard, part.provider, State.DEFERRED, ""] += moved
    counters.add(connection, campaign_id, counters.CENTRE, moves, now)
    windows.count(connection, campaign_id, waiting)
    return moved
