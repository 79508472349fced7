"""What a source can be told, read from our own append-only events: one feed a kind, from where the reading before ended.

Rows get their time and their number before they are committed, so one may become visible after later ones were read. Each reading therefore begins
`OVERLAP` before the one before it ended; whatever was read then is still in the outbox, and is not taken twice. What people refused stays there for good.

* Opens and clicks are read by the time of their recording.
* Refusals (`refusals`) may be older than their recording, by years if they come from another system, so they are read by number. Once in `WHOLE_EACH` all
  of them are looked at, whosever they are: somebody may have become known here or there in a way that no feed tells of.
* Bounces have no time of their own recording (the send path writes them), so they are found by campaign: where the counter of bounced rows has moved, all
  bounces of the campaign are read again.
"""

from __future__ import annotations

import dataclasses
import datetime as dt
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection
from sqlalchemy.orm import InstrumentedAttribute

from mail_pipelines.database.engine import database_now
from mail_pipelines.database.models import Campaign, CampaignCounter, Contact, ContactChange, DeliveryEvent, EngagementEvent, Link, State, Suppression
from mail_pipelines.delivery import events
from mail_pipelines.sources import outbox, refusals
from mail_pipelines.sources.declaration import Told
from mail_pipelines.sources.outbox import Event

OVERLAP = dt.timedelta(minutes=15)
WHOLE_EACH = dt.timedelta(days=1)
# So long is what was told remembered, by kind of event. A bounce that is read again later goes out once more, with the same key.
KEPT = {"open": OVERLAP, "click": OVERLAP, "bounce": dt.timedelta(days=60)}
_BOUNCES = (events.BOUNCED, events.BOUNCE_REPORT, events.LATE_REFUSAL)


@dataclass(frozen=True)
class Numbers:
    """The highest numbers there were at a time of the database: of suppressions, and of changes of contacts."""

    at: dt.datetime
    suppression: int
    change: int


@dataclass(frozen=True)
class Position:
    """Where a feed was read to: when (database time), when it was read from the beginning, and how many bounced rows each campaign had.

    All numbers up to `settled` were committed, and read. Those up to `young`, which are from a reading since, are settled when `OVERLAP` is over.
    """

    read_at: dt.datetime | None = None
    whole_at: dt.datetime | None = None
    bounced: dict[int, int] = field(default_factory=dict)
    settled: Numbers | None = None
    young: Numbers | None = None

    @property
    def is_whole(self) -> bool:
        """Whether the reading that ended here began at the beginning."""
        return self.read_at == self.whole_at


def here(connection: Connection, before: Position) -> Position:
    """Where a reading that begins now, after the one that ended `before`, will have read to; whatever comes meanwhile is for the next one."""
    now = database_now(connection)
    numbers = Numbers(now, _highest(connection, Suppression.id), _highest(connection, ContactChange.seq))
    is_whole = before.whole_at is None or now - before.whole_at >= WHOLE_EACH
    after = dataclasses.replace(before, read_at=now, whole_at=now if is_whole else before.whole_at, bounced=bounced(connection))
    if before.young is None or now - before.young.at >= OVERLAP:
        after = dataclasses.replace(after, settled=before.young or numbers, young=numbers)
    return after


def _highest(connection: Connection, number: InstrumentedAttribute[int]) -> int:
    return connection.execute(sa.select(sa.func.coalesce(sa.func.max(number), 0))).scalar_one()


Query = sa.Select[*tuple[Any, ...]]
# From where it is read on, since when something has to have happened to be told, and the key of the list whose ends alone are told, if it is one.
QueryOf = Callable[[Connection, Position, dt.datetime, str | None], Query]


@dataclass(frozen=True)
class Feed:
    """The events of one kind: the query of those to be read, and what makes an event of the five columns of its row."""

    kind: str
    query: QueryOf
    event: Callable[..., Event] = Event


def bounced(connection: Connection) -> dict[int, int]:
    """How many rows of each campaign bounced."""
    total = sa.func.sum(CampaignCounter.count).cast(sa.BigInteger)
    query = sa.select(CampaignCounter.campaign_id, total).where(CampaignCounter.state == State.BOUNCED).group_by(CampaignCounter.campaign_id)
    return {campaign_id: count for campaign_id, count in connection.execute(query).tuples() if count}


def _again(time: InstrumentedAttribute[dt.datetime], position: Position, since: dt.datetime) -> sa.ColumnElement[bool]:
    return time >= (since if position.read_at is None else max(since, position.read_at - OVERLAP))


def _engagement(kind: str) -> QueryOf:
    """What people did; what machines fetched tells nothing of anybody."""

    def query(_connection: Connection, position: Position, since: dt.datetime, _own: str | None) -> Query:
        event = EngagementEvent
        facts = outbox.facts(campaign=Campaign.key, url=Link.url)
        return (
            sa.select(event.id, event.contact_id, event.occurred_at, event.recorded_at, facts)
            .outerjoin(Campaign, Campaign.id == event.campaign_id)
            .outerjoin(Link, Link.id == event.link_id)
            .where(event.kind == kind, sa.not_(event.machine), _again(event.recorded_at, position, since))
        )

    return query


def _bounces(connection: Connection, position: Position, since: dt.datetime, _own: str | None) -> Query:
    event, at = DeliveryEvent, DeliveryEvent.occurred_at
    moved = [campaign_id for campaign_id, count in bounced(connection).items() if position.bounced.get(campaign_id) != count]
    facts = outbox.facts(campaign=Campaign.key, code=event.code, enhanced=event.enhanced, reason=event.reason, text=event.text)
    query = sa.select(event.id, event.contact_id, at, at.label("recorded_at"), facts).outerjoin(Campaign, Campaign.id == event.campaign_id)
    return query.where(event.campaign_id.in_(moved), event.kind.in_(_BOUNCES), at >= since)


def _unsubscribes(_connection: Connection, position: Position, since: dt.datetime, own: str | None) -> Query:
    people = sa.select(Contact.id).select_from(Contact)
    if position.settled is not None:
        changed = sa.select(ContactChange.contact_id).where(ContactChange.seq > position.settled.change).distinct().subquery()
        people = sa.select(Contact.id).select_from(changed).join(Contact, Contact.id == changed.c.contact_id)
        # Few have changed, which a database does not know of a subquery: it would begin with all ended subscriptions.
        people = people.prefix_with("STRAIGHT_JOIN", dialect="mysql").prefix_with("STRAIGHT_JOIN", dialect="mariadb")
    return refusals.unsubscribes(people, since, own)


def _suppressions(_connection: Connection, position: Position, since: dt.datetime, own: str | None) -> Query:
    query = refusals.suppressions(sa.select(Contact.id).select_from(Contact), since, own)
    return query if position.settled is None else query.where(Suppression.id > position.settled.suppression)


FEEDS: dict[Told, Feed] = {
    "opens": Feed("open", _engagement("open")),
    "clicks": Feed("click", _engagement("click")),
    "bounces": Feed("bounce", _bounces),
    "unsubscribes": Feed("unsubscribe", _unsubscribes, refusals.KINDS["unsubscribes"].event),
    "suppressions": Feed("suppression", _suppressions),
}
