"""What recipients did with a campaign's mail: opens, clicks, unsubscribes, complaints, and over time.

What belongs here: counting `engagement_events` of one campaign in SQL, by the index (campaign_id, kind). What does not: deciding
whether an event was a machine's (that is done when it is recorded), what became of messages (`statistics`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from mail_pipelines.campaigns import progress
from mail_pipelines.campaigns.campaign import Campaign
from mail_pipelines.database.epochs import epoch_second
from mail_pipelines.database.models import EngagementEvent, Link, State

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


def _of(campaign_id: int, *kinds: str) -> sa.ColumnElement[bool]:
    return sa.and_(EngagementEvent.campaign_id == campaign_id, EngagementEvent.kind.in_(kinds))


def _totals(connection: Connection, campaign_id: int) -> tuple[dict[tuple[str, bool], int], dict[tuple[str, bool], int]]:
    """Opens and clicks by (kind, machine): events, and contacts."""
    by = (EngagementEvent.kind, EngagementEvent.machine)
    query = sa.select(*by, sa.func.count(), sa.func.count(EngagementEvent.contact_id.distinct())).where(_of(campaign_id, "open", "click")).group_by(*by)
    events = {(kind, machine): 0 for kind in ("open", "click") for machine in (False, True)}
    people = dict(events)
    for kind, machine, event_count, contact_count in connection.execute(query).tuples():
        events[kind, machine], people[kind, machine] = event_count, contact_count
    return events, people


def _contacts(connection: Connection, campaign_id: int, kind: str) -> int:
    return connection.execute(sa.select(sa.func.count(EngagementEvent.contact_id.distinct())).where(_of(campaign_id, kind))).scalar_one()


def _hourly(connection: Connection, campaign_id: int) -> pd.DataFrame:
    import pandas as pd

    second = epoch_second(connection, EngagementEvent.occurred_at)
    hour = (second - second % _HOUR).label("hour")
    columns: list[sa.ColumnElement[Any]] = [
        _sum_where(EngagementEvent.kind == "open", EngagementEvent.machine.is_(False)),
        _sum_where(EngagementEvent.kind == "open", EngagementEvent.machine),
        _sum_where(EngagementEvent.kind == "click", EngagementEvent.machine.is_(False)),
        _sum_where(EngagementEvent.kind == "click", EngagementEvent.machine),
        _sum_where(EngagementEvent.kind == "unsubscribe"),
        _sum_where(EngagementEvent.kind == "complaint"),
    ]
    # Grouped and ordered by the label: repeated expressions with parameters are not one expression to MariaDB.
    query = sa.select(hour, *columns).where(_of(campaign_id, *KINDS)).group_by(sa.text("hour")).order_by(sa.text("hour"))
    frame = pd.DataFrame(connection.execute(query).all(), columns=["hour", *HOURLY]).astype("int64")
    return frame.assign(hour=pd.to_datetime(frame["hour"], unit="s", utc=True))


def _links(connection: Connection, campaign_id: int) -> pd.DataFrame:
    import pandas as pd

    person = EngagementEvent.machine.is_(False)
    by_link = (
        sa.select(
            EngagementEvent.link_id,
            _sum_where(person).label("clicks"),
            sa.func.count(sa.case((person, EngagementEvent.contact_id)).distinct()).label("clickers"),
            _sum_where(EngagementEvent.machine).label("machine_clicks"),
        )
        .where(_of(campaign_id, "click"))
        .group_by(EngagementEvent.link_id)
        .subquery()
    )
    query = (
        sa.select(Link.url, by_link.c.clicks, by_link.c.clickers, by_link.c.machine_clicks)
        .join(by_link, by_link.c.link_id == Link.id)
        .order_by(by_link.c.clicks.desc(), by_link.c.clickers.desc(), Link.id)
    )
    columns = ["url", "clicks", "clickers", "machine_clicks"]
    return pd.DataFrame(connection.execute(query).all(), columns=columns).astype(dict.fromkeys(columns[1:], "int64"))


def _sum_where(*conditions: Any) -> sa.ColumnElement[Any]:
    return sa.func.sum(sa.case((sa.and_(*conditions), 1), else_=0))
