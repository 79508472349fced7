"""What recipients did with a campaign's mail: opens, clicks, unsubscribes, complaints, and over time.

What belongs here: counting `engagement_events` of one campaign in SQL, by the index (campaign_id, kind), together with the sums that older ones are kept
as. What does not: deciding whether an event was a machine's (that is done when it is recorded), what became of messages (`statistics`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from mail_pipelines.campaigns import progress
from mail_pipelines.campaigns.campaign import Campaign
from mail_pipelines.database.epochs import epoch_second
from mail_pipelines.database.models import EngagementEvent, EngagementHour, EngagementSum, Link, State

if TYPE_CHECKING:
    import pandas as pd

KINDS = ("open", "click", "unsubscribe", "complaint")
HOURLY = ("opens", "machine_opens", "clicks", "machine_clicks", "unsubscribes", "complaints")
_HOUR = 3600


@dataclass(frozen=True)
class Engagement:
    """Reactions to one campaign. Events of machines (prefetching mailbox providers, link scanners) are counted apart from people's.

    * `opens`, `clicks`: events of people; `openers`, `clickers`, `unsubscribers`, `complainers`: contacts, each once
    * `hourly`: hour (UTC, only hours with an event) and the columns `HOURLY`, which count events; unsubscribes and complaints of
      machines (a mailbox provider speaks for its user) count like the others
    * `links`: url, clicks, clickers, machine_clicks; most clicked first
    """

    delivered: int
    opens: int
    openers: int
    machine_opens: int
    clicks: int
    clickers: int
    machine_clicks: int
    unsubscribers: int
    complainers: int
    hourly: pd.DataFrame
    links: pd.DataFrame

    def numbers(self) -> dict[str, int | float]:
        """The plain numbers by name, with rates of the delivered messages (0.0 if there are none)."""
        rates = {
            "open_rate": self.openers,
            "click_rate": self.clickers,
            "unsubscribe_rate": self.unsubscribers,
            "complaint_rate": self.complainers,
        }
        counts = {name: value for name, value in vars(self).items() if isinstance(value, int)}
        return counts | {name: round(count / self.delivered, 5) if self.delivered else 0.0 for name, count in rates.items()}


def read(connection: Connection, campaign: Campaign) -> Engagement:
    """The campaign's engagement as recorded until now."""
    events, people = _totals(connection, campaign.id)
    return Engagement(
        delivered=progress.by_state(connection, campaign.id)[State.DELIVERED],
        opens=events["open", False],
        openers=people["open", False],
        machine_opens=events["open", True],
        clicks=events["click", False],
        clickers=people["click", False],
        machine_clicks=events["click", True],
        unsubscribers=_contacts(connection, campaign.id, "unsubscribe"),
        complainers=_contacts(connection, campaign.id, "complaint"),
        hourly=_hourly(connection, campaign.id),
        links=_links(connection, campaign.id),
    )


def _acts(campaign_id: int, *kinds: str) -> sa.Subquery:
    """Who did what how often: a row with count 1 for each event, and the sums. Read by one statement, so that none is moved in between."""
    event, kept = EngagementEvent, EngagementSum
    events = sa.select(event.kind, event.machine, event.contact_id, event.link_id, sa.literal(1).label("count"))
    sums = sa.select(kept.kind, kept.machine, kept.contact_id, kept.link_id, kept.count)
    return sa.union_all(
        events.where(event.campaign_id == campaign_id, event.kind.in_(kinds)), sums.where(kept.campaign_id == campaign_id, kept.kind.in_(kinds))
    ).subquery()


def _totals(connection: Connection, campaign_id: int) -> tuple[dict[tuple[str, bool], int], dict[tuple[str, bool], int]]:
    """Opens and clicks by (kind, machine): events, and contacts."""
    acts = _acts(campaign_id, "open", "click").c
    by = (acts.kind, acts.machine)
    query = sa.select(*by, sa.func.sum(acts.count), sa.func.count(acts.contact_id.distinct())).group_by(*by)
    events = {(kind, machine): 0 for kind in ("open", "click") for machine in (False, True)}
    people = dict(events)
    for kind, machine, event_count, contact_count in connection.execute(query).tuples():
        events[kind, machine], people[kind, machine] = int(event_count), contact_count
    return events, people


def _contacts(connection: Connection, campaign_id: int, kind: str) -> int:
    return connection.execute(sa.select(sa.func.count(_acts(campaign_id, kind).c.contact_id.distinct()))).scalar_one()


def _hourly(connection: Connection, campaign_id: int) -> pd.DataFrame:
    import pandas as pd

    second = epoch_second(connection, EngagementEvent.occurred_at)
    hour = (second - second % _HOUR).label("hour")
    kept = EngagementHour
    events = sa.select(hour, EngagementEvent.kind, EngagementEvent.machine, sa.literal(1).label("count")).where(
        EngagementEvent.campaign_id == campaign_id, EngagementEvent.kind.in_(KINDS)
    )
    sums = sa.select(kept.hour, kept.kind, kept.machine, kept.count).where(kept.campaign_id == campaign_id, kept.kind.in_(KINDS))
    acts = sa.union_all(events, sums).subquery().c
    columns: list[sa.ColumnElement[Any]] = [
        _sum_where(acts.count, acts.kind == "open", acts.machine.is_(False)),
        _sum_where(acts.count, acts.kind == "open", acts.machine),
        _sum_where(acts.count, acts.kind == "click", acts.machine.is_(False)),
        _sum_where(acts.count, acts.kind == "click", acts.machine),
        _sum_where(acts.count, acts.kind == "unsubscribe"),
        _sum_where(acts.count, acts.kind == "complaint"),
    ]
    query = sa.select(acts.hour, *columns).group_by(acts.hour).order_by(acts.hour)
    frame = pd.DataFrame(connection.execute(query).all(), columns=["hour", *HOURLY]).astype("int64")
    return frame.assign(hour=pd.to_datetime(frame["hour"], unit="s", utc=True))


def _links(connection: Connection, campaign_id: int) -> pd.DataFrame:
    import pandas as pd

    acts = _acts(campaign_id, "click").c
    person = acts.machine.is_(False)
    by_link = (
        sa.select(
            acts.link_id,
            _sum_where(acts.count, person).label("clicks"),
            sa.func.count(sa.case((person, acts.contact_id)).distinct()).label("clickers"),
            _sum_where(acts.count, acts.machine).label("machine_clicks"),
        )
        .group_by(acts.link_id)
        .subquery()
    )
    query = (
        sa.select(Link.url, by_link.c.clicks, by_link.c.clickers, by_link.c.machine_clicks)
        .join(by_link, by_link.c.link_id == Link.id)
        .order_by(by_link.c.clicks.desc(), by_link.c.clickers.desc(), Link.id)
    )
    columns = ["url", "clicks", "clickers", "machine_clicks"]
    return pd.DataFrame(connection.execute(query).all(), columns=columns).astype(dict.fromkeys(columns[1:], "int64"))


def _sum_where(count: sa.ColumnElement[int], *conditions: Any) -> sa.ColumnElement[Any]:
    return sa.func.sum(sa.case((sa.and_(*conditions), count), else_=0))
