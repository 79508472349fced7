"""How far a campaign is, read from its counters: cheap enough for every page, sensor and tick. The ledger is never scanned here."""

from __future__ import annotations

import datetime as dt
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection
from sqlalchemy.orm import InstrumentedAttribute

from mail_pipelines.campaigns.campaign import Campaign
from mail_pipelines.database.models import CampaignCounter, CampaignFact, CampaignMinute, State
from mail_pipelines.dispatch import windows
from mail_pipelines.errors import MailPipelinesError


class SumsDiffer(MailPipelinesError):
    """The counters of a campaign do not add up to its audience: a bug, or a damaged database."""


@dataclass(frozen=True)
class Totals:
    """Recipients of one campaign by what became of them; claimed rows count as pending."""

    audience: int
    delivered: int
    bounced: int
    deferred: int
    pending: int
    suppressed: int
    expired: int
    cancelled: int
    unknown: int
    unresolved: int

    def parts(self) -> dict[str, int]:
        """Everything but the audience, by name."""
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name != "audience"}

    def check(self) -> Totals:
        """These totals, if every recipient is in exactly one part; raises `SumsDiffer` with the numbers otherwise."""
        parts = self.parts()
        if sum(parts.values()) != self.audience or min(parts.values()) < 0:
            words = " + ".join(f"{count} {name}" for name, count in parts.items())
            raise SumsDiffer(f"{words} is {sum(parts.values())}, but the audience is {self.audience}: the ledger or its counters were changed by hand")
        return self

    @property
    def open(self) -> int:
        return self.pending + self.deferred + self.unknown


def by_state(connection: Connection, campaign_id: int) -> dict[State, int]:
    """Rows in each state, all states present."""
    return dict.fromkeys(State, 0) | {State(state): count for (state,), count in _sums(connection, campaign_id, CampaignCounter.state).items()}


def by_provider(connection: Connection, campaign_id: int) -> dict[tuple[str, State], int]:
    """Rows by (provider, state), only where there are any."""
    sums = _sums(connection, campaign_id, CampaignCounter.provider, CampaignCounter.state)
    return {(provider, State(state)): count for (provider, state), count in sums.items() if count}


def facts(connection: Connection, campaign_id: int) -> dict[str, int]:
    """Recipients by what they count for beside their state (`delivery.evidence.facts`), only where there are any."""
    query = sa.select(CampaignFact.kind, sa.func.sum(CampaignFact.count)).where(CampaignFact.campaign_id == campaign_id).group_by(CampaignFact.kind)
    return {kind: int(count) for kind, count in connection.execute(query).tuples()}


def totals(connection: Connection, campaign: Campaign) -> Totals:
    """The campaign's totals; `audience` is what the freeze recorded, so `Totals.check` compares two sources."""
    return of_states(by_state(connection, campaign.id), (campaign.audience_counts or {}).get("audience", 0))


def of_states(counts: Mapping[State, int], audience: int) -> Totals:
    return Totals(
        audience=audience,
        delivered=counts[State.DELIVERED],
        bounced=counts[State.BOUNCED],
        deferred=counts[State.DEFERRED],
        pending=counts[State.PENDING] + counts[State.CLAIMED],
        suppressed=counts[State.SUPPRESSED],
        expired=counts[State.EXPIRED],
        cancelled=counts[State.CANCELLED],
        unknown=counts[State.UNKNOWN],
        unresolved=counts[State.UNRESOLVED],
    )


def per_minute(connection: Connection, campaign_id: int, state: State, now: dt.datetime, minutes: int = 5) -> float:
    """Rows that reached `state` per minute, over the last `minutes` full minutes before `now`."""
    end = int(now.timestamp()) // 60
    count = sa.select(sa.func.coalesce(sa.func.sum(CampaignMinute.count), 0)).where(
        CampaignMinute.campaign_id == campaign_id, CampaignMinute.minute >= end - minutes, CampaignMinute.minute < end, CampaignMinute.state == int(state)
    )
    return float(connection.execute(count).scalar_one()) / minutes


@dataclass(frozen=True)
class Opening:
    """Recipients who wait for their send window to open in these time zones ("" for the campaign's own) at `at`. `last`: it does not, and they will expire."""

    at: dt.datetime
    recipients: int
    zones: tuple[str, ...]
    last: bool


def openings(connection: Connection, campaign: Campaign, now: dt.datetime) -> list[Opening]:
    """Of the deferred recipients of a campaign with a send window, those who wait for it, by the hour at which it opens."""
    if campaign.definition.window is None or campaign.state.is_terminal:
        return []
    rows: Counter[int] = Counter()
    zones: defaultdict[int, set[str]] = defaultdict(set)
    for waiting in windows.waiting(connection, [campaign.id], int(now.timestamp())).values():
        for (zone, opening), count in waiting.items():
            rows[opening] += count
            zones[opening].add(zone or campaign.definition.window.zone)
    end = None if campaign.expires_at is None else int(campaign.expires_at.timestamp())
    return [
        Opening(dt.datetime.fromtimestamp(opening, dt.UTC), count, tuple(sorted(zones[opening])), end is not None and opening > end)
        for opening, count in sorted(rows.items())
        if count
    ]


def _sums(connection: Connection, campaign_id: int, *by: InstrumentedAttribute[Any]) -> dict[tuple[Any, ...], int]:
    query = sa.select(*by, sa.func.sum(CampaignCounter.count)).where(CampaignCounter.campaign_id == campaign_id).group_by(*by)
    return {tuple(row[:-1]): int(row[-1]) for row in connection.execute(query)}
