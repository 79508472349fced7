"""What became of a campaign's messages: totals, rates, tables by provider, server and reason, outcomes by minute, speed.

What belongs here: reading counters, minutes and claims, and arranging them. The ledger is never scanned. What does not: whether
the numbers are right (`checks`), what recipients did with their mail (`engagement`), pictures (`plots`).
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from mail_pipelines.campaigns import progress
from mail_pipelines.campaigns.campaign import Campaign
from mail_pipelines.campaigns.progress import Totals
from mail_pipelines.database.models import CampaignMinute, Claim, Server, State
from mail_pipelines.delivery.classes import bad_address_classes
from mail_pipelines.delivery.counters import CENTRE, LATE_BOUNCE
from mail_pipelines.delivery.evidence import Kind

if TYPE_CHECKING:
    import pandas as pd

# What a destination's reply makes of an offer, in the order of tables and plots.
OFFERED = (State.DELIVERED, State.BOUNCED, State.DEFERRED)


@dataclass(frozen=True)
class Rates:
    """Shares from 0 to 1; 0.0 where there is nothing to share.

    `delivered`: of the audience. `bounced`, and `hard_bounced` (the address is bad): of delivered and bounced. `deferred`: of all
    offers, of which a recipient gets several if it is deferred.
    """

    delivered: float
    bounced: float
    hard_bounced: float
    deferred: float


@dataclass(frozen=True)
class Activity:
    """When servers had messages of the campaign in hand, to the second, by the claims they closed.

    `sending_seconds` counts the seconds in which at least one server had a claim, `overlap` is the share of them in which at
    least two had. Waiting for a grant, a pause or a retry is not counted.
    """

    first_at: dt.datetime
    last_at: dt.datetime
    sending_seconds: int
    overlap: float


@dataclass(frozen=True)
class Statistics:
    """Everything about one campaign's delivery. Frames have a plain index; minutes are UTC.

    * `by_state`: state, recipients, share (of the audience)
    * `by_provider`: provider, audience and the parts of `Totals`
    * `by_server`: server, delivered, bounced, deferred (offers put off), offers, first_minute, last_minute
    * `by_reason`: outcome, reason, count (of offers for deferred, of recipients else), share (of the outcome)
    * `per_minute`: minute, server, delivered, bounced, deferred; only minutes with an offer

    `late_bounced` were accepted and bounced later: they are among the delivered. `complained` and `unsubscribed` are those by mail.
    `activity` is None before the first claim is closed, and again when upkeep has dropped the claims of a campaign long over.
    `first_minute` and `last_minute` are those of offers.
    """

    totals: Totals
    matched: int
    excluded: dict[str, int]
    rates: Rates
    offers: int
    hard_bounced: int
    late_bounced: int
    complained: int
    unsubscribed: int
    first_minute: dt.datetime | None
    last_minute: dt.datetime | None
    activity: Activity | None
    by_state: pd.DataFrame
    by_provider: pd.DataFrame
    by_server: pd.DataFrame
    by_reason: pd.DataFrame
    per_minute: pd.DataFrame

    @property
    def peak_per_minute(self) -> int:
        """The most offers in one minute."""
        return int(self.per_minute.groupby("minute")[_names(OFFERED)].sum().sum(axis=1).max()) if len(self.per_minute) else 0

    @property
    def per_second(self) -> float | None:
        """Offers per second of sending."""
        return self.offers / self.activity.sending_seconds if self.activity else None

    def numbers(self) -> dict[str, int | float | str]:
        """The plain numbers by name, for display; those not known are left out."""
        found: dict[str, int | float | str | None] = {
            "matched": self.matched,
            "excluded": sum(self.excluded.values()),
            **asdict(self.totals),
            "hard_bounced": self.hard_bounced,
            "late_bounced": self.late_bounced,
            "complained": self.complained,
            "unsubscribed": self.unsubscribed,
            "offers": self.offers,
            **{f"{name}_rate": round(rate, 5) for name, rate in asdict(self.rates).items()},
            "peak_per_minute": self.peak_per_minute,
            "first_minute": self.first_minute.isoformat() if self.first_minute else None,
            "last_minute": self.last_minute.isoformat() if self.last_minute else None,
            "sending_seconds": self.activity.sending_seconds if self.activity else None,
            "overlap": round(self.activity.overlap, 4) if self.activity else None,
            "per_second": round(self.per_second, 2) if self.per_second else None,
        }
        return {name: value for name, value in found.items() if value is not None}


def read(connection: Connection, campaign: Campaign) -> Statistics:
    """The campaign's statistics as its counters say now; all zero for one that was never frozen."""
    totals = progress.totals(connection, campaign)
    counts = campaign.audience_counts or {"matched": 0, "excluded": {}}
    outcomes = _outcomes(connection, campaign.id)
    offered = outcomes[outcomes["state"].isin(_names(OFFERED))]
    hard = hard_bounces(connection, campaign.id)
    refused = totals.delivered + totals.bounced
    facts = progress.facts(connection, campaign.id)
    deferrals = int(offered.loc[offered["state"] == "deferred", "count"].sum())
    offers = int(offered["count"].sum())
    return Statistics(
        totals=totals,
        matched=counts["matched"],
        excluded=counts["excluded"],
        rates=Rates(
            delivered=_share(totals.delivered, totals.audience),
            bounced=_share(totals.bounced, refused),
            hard_bounced=_share(hard, refused),
            deferred=_share(deferrals, offers),
        ),
        offers=offers,
        hard_bounced=hard,
        late_bounced=facts.get(LATE_BOUNCE, 0),
        complained=facts.get(Kind.COMPLAINT, 0),
        unsubscribed=facts.get(Kind.UNSUBSCRIBE, 0),
        first_minute=offered["minute"].min().to_pydatetime() if len(offered) else None,
        last_minute=offered["minute"].max().to_pydatetime() if len(offered) else None,
        activity=_activity(connection, campaign.id),
        by_state=_by_state(totals),
        by_provider=_by_provider(connection, campaign.id),
        by_server=_by_server(offered),
        by_reason=_by_reason(outcomes),
        per_minute=_spread(offered, ["minute", "server"]),
    )


def hard_bounces(connection: Connection, campaign_id: int) -> int:
    """Recipients bounced because their address is bad, by the classes of the replies."""
    count = sa.select(sa.func.coalesce(sa.func.sum(CampaignMinute.count), 0)).where(
        CampaignMinute.campaign_id == campaign_id,
        CampaignMinute.state == int(State.BOUNCED),
        CampaignMinute.reason.in_(sorted(bad_address_classes())),
    )
    return int(connection.execute(count).scalar_one())


def _share(part: int, whole: int) -> float:
    return part / whole if whole else 0.0


def _names(states: Iterable[State]) -> list[str]:
    return [state.name.lower() for state in states]


def _outcomes(connection: Connection, campaign_id: int) -> pd.DataFrame:
    """minute, server (its key), state (its name), reason, count: providers summed up."""
    import pandas as pd

    by = (CampaignMinute.minute, CampaignMinute.server_id, CampaignMinute.state, CampaignMinute.reason)
    query = sa.select(*by, sa.func.sum(CampaignMinute.count)).where(CampaignMinute.campaign_id == campaign_id).group_by(*by).order_by(*by)
    frame = pd.DataFrame(connection.execute(query).all(), columns=["minute", "server", "state", "reason", "count"])
    keys = dict(connection.execute(sa.select(Server.id, Server.key)).tuples().all()) | {CENTRE: "centre"}
    return pd.DataFrame(
        {
            "minute": pd.to_datetime(frame["minute"].astype("int64") * 60, unit="s", utc=True),
            "server": frame["server"].map(lambda server_id: keys.get(server_id, f"server {server_id}")).astype("str"),
            "state": frame["state"].map(lambda state: State(state).name.lower()).astype("str"),
            "reason": frame["reason"].astype("str"),
            "count": frame["count"].astype("int64"),
        }
    )


def _by_state(totals: Totals) -> pd.DataFrame:
    import pandas as pd

    rows = [(name, count, _share(count, totals.audience)) for name, count in totals.parts().items()]
    return pd.DataFrame(rows, columns=["state", "recipients", "share"])


def _by_provider(connection: Connection, campaign_id: int) -> pd.DataFrame:
    import pandas as pd

    counts: dict[str, dict[State, int]] = {}
    for (provider, state), count in progress.by_provider(connection, campaign_id).items():
        counts.setdefault(provider, dict.fromkeys(State, 0))[state] = count
    rows = [{"provider": provider} | asdict(progress.of_states(states, sum(states.values()))) for provider, states in counts.items()]
    frame = pd.DataFrame(rows, columns=["provider", *Totals.__dataclass_fields__])
    return frame.sort_values(["audience", "provider"], ascending=[False, True], ignore_index=True)


def _spread(offered: pd.DataFrame, by: list[str]) -> pd.DataFrame:
    """Offers by the columns `by`, with one column for each of what came of them."""
    table = offered.pivot_table(index=by, columns="state", values="count", aggfunc="sum", fill_value=0)
    return table.reindex(columns=_names(OFFERED), fill_value=0).rename_axis(columns=None).astype("int64").reset_index()


def _by_server(offered: pd.DataFrame) -> pd.DataFrame:
    frame = _spread(offered, ["server"])
    frame["offers"] = frame[_names(OFFERED)].sum(axis=1)
    spans = offered.groupby("server")["minute"].agg(first_minute="min", last_minute="max")
    return frame.merge(spans, left_on="server", right_index=True)


def _by_reason(outcomes: pd.DataFrame) -> pd.DataFrame:
    sums = outcomes.groupby(["state", "reason"], as_index=False)["count"].sum()
    sums["share"] = sums["count"] / sums.groupby("state")["count"].transform("sum")
    given: pd.DataFrame = sums[sums["reason"] != ""].rename(columns={"state": "outcome"})
    return given.sort_values(["outcome", "count", "reason"], ascending=[True, False, True], ignore_index=True)


def _activity(connection: Connection, campaign_id: int) -> Activity | None:
    # The claim of a killed sender is closed when it is settled; its sending ended with the lease at the latest.
    end = sa.case((Claim.closed_at > Claim.lease_until, Claim.lease_until), else_=Claim.closed_at)
    query = (
        sa.select(Claim.server_id, Claim.opened_at, end)
        .where(Claim.campaign_id == campaign_id, Claim.state == "closed", Claim.size > 0)
        .order_by(Claim.server_id, Claim.opened_at)
    )
    spans = _merged((server_id, int(opened.timestamp()), int(closed.timestamp()) + 1) for server_id, opened, closed in connection.execute(query).tuples())
    if not spans:
        return None
    at_least_one, at_least_two = _covered(spans)
    return Activity(
        first_at=dt.datetime.fromtimestamp(min(begin for begin, _ in spans), dt.UTC),
        last_at=dt.datetime.fromtimestamp(max(end for _, end in spans), dt.UTC),
        sending_seconds=at_least_one,
        overlap=_share(at_least_two, at_least_one),
    )


def _merged(claims: Iterable[tuple[int, int, int]]) -> list[tuple[int, int]]:
    """The spans of seconds (begin, end excluded) in which a server was sending, one list for all servers.

    Claims (server, begin, end) come by server and begin. Those of one server that touch become one span.
    """
    spans: list[tuple[int, int]] = []
    last_server = None
    for server, begin, end in claims:
        if server == last_server and begin <= spans[-1][1]:
            spans[-1] = (spans[-1][0], max(spans[-1][1], end))
        else:
            spans.append((begin, end))
        last_server = server
    return spans


def _covered(spans: list[tuple[int, int]]) -> tuple[int, int]:
    """How many seconds at least one span covers, and at least two."""
    changes = sorted([(begin, 1) for begin, _ in spans] + [(end, -1) for _, end in spans])
    at_least_one = at_least_two = depth = 0
    before = changes[0][0]
    for second, change in changes:
        at_least_one += (second - before) * (depth >= 1)
        at_least_two += (second - before) * (depth >= 2)
        depth, before = depth + change, second
    return at_least_one, at_least_two
