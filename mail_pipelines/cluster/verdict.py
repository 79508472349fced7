"""Whether ledger, statistics and destinations agree, to the message: for each server and campaign, and in all.

What belongs here: the comparison and how it is shown. What does not: how the destinations count (`destinations`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import sqlalchemy as sa
from rich.table import Table
from sqlalchemy.engine import Connection

from mail_pipelines.campaigns import store
from mail_pipelines.campaigns.campaign import Campaign
from mail_pipelines.cluster.destinations import Arrived
from mail_pipelines.database.models import Delivery, Server, State
from mail_pipelines.delivery import checks, statistics

_OUTCOMES = ("delivered", "bounced", "deferred")


@dataclass(frozen=True)
class Row:
    """One campaign on one server. The ledger knows how each recipient ended, the statistics and the destinations count each deferral too."""

    server: str
    campaign: str
    ledger: Mapping[str, int]
    statistics: Mapping[str, int]
    destinations: Mapping[str, int]

    @property
    def agrees(self) -> bool:
        ended = {name: self.ledger[name] for name in ("delivered", "bounced")}
        return dict(self.statistics) == dict(self.destinations) == {**ended, "deferred": self.statistics["deferred"]} and not self.ledger["unknown"]


@dataclass(frozen=True)
class Sent:
    """One campaign in all. `first_at` and `last_at` (epoch seconds) are those of arrivals."""

    campaign: str
    priority: str
    audience: int
    first_at: int
    last_at: int


@dataclass(frozen=True)
class Verdict:
    """`duplicates` are messages beyond the first to a recipient; `lost` were delivered according to the ledger and did not arrive.

    Of the seconds in which anything arrived (`seconds`), all servers sent in `together`, and both campaigns were sent in `both`. `disagreements`
    say in words what is not as promised; there should be none.
    """

    recipients: int
    rows: tuple[Row, ...]
    campaigns: tuple[Sent, ...]
    duplicates: int
    lost: int
    unknown: int
    seconds: int
    together: int
    both: int
    per_second: float
    disagreements: tuple[str, ...]

    @property
    def ended_first(self) -> Sent:
        return min(self.campaigns, key=lambda sent: sent.last_at)

    def to_document(self) -> dict[str, Any]:
        return asdict(self) | {"ended_first": self.ended_first.campaign}


def judge(connection: Connection, keys: tuple[str, ...], arrived: Mapping[str, Mapping[int, Arrived]]) -> Verdict:
    """`arrived`: by server and campaign id."""
    campaigns = [store.load(connection, key) for key in keys]
    rows: list[Row] = []
    sent: list[Sent] = []
    disagreements: list[str] = []
    duplicates = lost = 0
    for campaign in campaigns:
        behind = {server: found.get(campaign.id, Arrived()) for server, found in arrived.items()}
        rows += _rows(connection, campaign, behind)
        copies = sum((one.copies for one in behind.values()), Counter[int]())
        duplicates += copies.total() - len(copies)
        lost += len(_delivered(connection, campaign.id) - copies.keys())
        seconds = set[int]().union(*(one.seconds for one in behind.values()))
        audience = statistics.read(connection, campaign).totals.check().audience
        sent.append(Sent(campaign.key, campaign.definition.priority.name.lower(), audience, min(seconds, default=0), max(seconds, default=0)))
        findings = {check.name: check.find(connection, campaign) for check in checks.CHECKS}
        disagreements += [
            f"{campaign.key}: {name}: {finding.description}"
            for name, finding in findings.items()
            if not finding.passed and finding.severity is checks.Severity.ERROR
        ]
    by_server = [set[int]().union(*(one.seconds for one in found.values())) for found in arrived.values()]
    of_any, of_all = set[int]().union(*by_server), set[int].intersection(*by_server)
    of_each = [set[int]().union(*(found[campaign.id].seconds for found in arrived.values() if campaign.id in found)) for campaign in campaigns]
    unknown = sum(row.ledger["unknown"] for row in rows)
    disagreements += [f"{row.campaign} on {row.server}: ledger, statistics and destinations differ" for row in rows if not row.agrees]
    numbers = {"duplicates": duplicates, "lost": lost, "unknown": unknown}
    disagreements += [f"{count:,} {name}" for name, count in numbers.items() if count]
    if not of_all:
        disagreements.append("there is no second in which all servers sent")
    messages = sum(row.destinations["delivered"] for row in rows)
    return Verdict(
        recipients=sum(one.audience for one in sent),
        rows=tuple(rows),
        campaigns=tuple(sent),
        **numbers,
        seconds=len(of_any),
        together=len(of_all),
        both=len(set[int].intersection(*of_each)),
        per_second=round(messages / len(of_any), 1) if of_any else 0.0,
        disagreements=tuple(disagreements),
    )


def _rows(connection: Connection, campaign: Campaign, behind: Mapping[str, Arrived]) -> list[Row]:
    ledger = _ledger(connection, campaign.id)
    counted = {str(row["server"]): row for row in statistics.read(connection, campaign).by_server.to_dict("records")}
    return [
        Row(
            server,
            campaign.key,
            {name: ledger[server, state] for name, state in (("delivered", State.DELIVERED), ("bounced", State.BOUNCED), ("unknown", State.UNKNOWN))},
            {name: int(counted.get(server, {}).get(name, 0)) for name in _OUTCOMES},
            one.outcomes(),
        )
        for server, one in behind.items()
    ]


def _ledger(connection: Connection, campaign_id: int) -> Counter[tuple[str, State]]:
    """Rows by the server that had them last, and state. A campaign that is over is read as a whole, which nothing else may do."""
    query = sa.select(Server.key, Delivery.state, sa.func.count()).join(Server, Server.id == Delivery.server_id).where(Delivery.campaign_id == campaign_id)
    return Counter({(key, State(state)): count for key, state, count in connection.execute(query.group_by(Server.key, Delivery.state))})


def _delivered(connection: Connection, campaign_id: int) -> set[int]:
    query = sa.select(Delivery.contact_id).where(Delivery.campaign_id == campaign_id, Delivery.state == int(State.DELIVERED))
    return set(connection.execute(query).scalars())


def table(verdict: Verdict) -> Table:
    """Ledger, statistics and destinations side by side."""
    shown = Table("campaign", "server", "outcome", "ledger", "statistics", "destinations", "agree", title="By server and campaign")
    for column in shown.columns[3:6]:
        column.justify = "right"
    for row in verdict.rows:
        for name in _OUTCOMES:
            ledger = f"{row.ledger[name]:,}" if name in row.ledger else ""
            agree = "yes" if row.agrees else "no"
            shown.add_row(row.campaign, row.server, name, ledger, f"{row.statistics[name]:,}", f"{row.destinations[name]:,}", agree)
    return shown


def lines(verdict: Verdict) -> list[str]:
    """The verdict in words."""
    said = [
        f"{verdict.recipients:,} recipients; {verdict.duplicates:,} duplicates, {verdict.lost:,} lost, {verdict.unknown:,} unknown",
        f"{verdict.per_second:,.0f} messages arrived a second in {verdict.seconds:,} s; all servers sent in {verdict.together:,} of them",
    ]
    if len(verdict.campaigns) > 1:
        first = verdict.ended_first
        said += [f"all campaigns were sent in {verdict.both:,} of them; {first.campaign} (priority {first.priority}) ended first"]
    return said + [f"DISAGREEMENT: {words}" for words in verdict.disagreements]
