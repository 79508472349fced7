"""Planning: read demand and supply, make the near plan and the far one, put the near one into force, keep both for display.

A plan comes into force with one row, and only if no other has since it began to read: its number (`epoch`) is the next after the one it saw. Then its grants
are written, in portions.
"""

from __future__ import annotations

import datetime as dt
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine

from mail_pipelines.capacity import allotments, demand, far, forecast, grants, idle, in_force, outlook, supply, verdicts
from mail_pipelines.capacity.demand import Demand, Job
from mail_pipelines.capacity.far import FarOrder, InFlight, Outlook, far_plan
from mail_pipelines.capacity.fleet import Fleet
from mail_pipelines.capacity.grants import Grant, Place
from mail_pipelines.capacity.horizon import DAY, HOUR, HOURS
from mail_pipelines.capacity.idle import Idleness
from mail_pipelines.capacity.lines import Line
from mail_pipelines.capacity.near import NearPlan, near_plan
from mail_pipelines.capacity.new_servers import NO_SOURCES, HostSources, new_server
from mail_pipelines.capacity.warm_up_rules import rules
from mail_pipelines.config import Settings
from mail_pipelines.database.engine import database_now, reading, transact
from mail_pipelines.database.models import Campaign, CampaignMinute, State

# The current slot and the next are frozen, so that the one after has to be planned before it is.
_GRANTED_SLOTS = 3


@dataclass(frozen=True)
class Situation:
    """All that a plan is made from, read at one moment. `present` are the grants of the slots that the plan will grant."""

    now: dt.datetime
    epoch: int
    fleet: Fleet
    jobs: list[Job]
    demands: list[Demand]
    lines: list[Line]
    present: Mapping[Place, Grant]
    nearly_out: frozenset[tuple[int, str]]
    outlooks: list[Outlook]
    in_flight: list[InFlight]
    # Of the plan in force.
    ordered: list[FarOrder]
    planned_before: list[tuple[int, int]]
    idleness: Idleness
    lead_seconds: float
    sources: HostSources

    def plan(self, more: Sequence[Line] = ()) -> NearPlan:
        """The plan for this situation, with `more` lines than there are."""
        return near_plan(self.jobs, self.demands, [*self.lines, *more], int(self.now.timestamp()), self._previous())

    def more_servers(self, count: int, pool_ids: Sequence[int], providers: Sequence[str], _begin: int = 0) -> list[Line]:
        """The lines of more servers that are there and warm."""
        return supply.more_servers(self.fleet, count, pool_ids, providers)

    def ordered_servers(self, curve: str) -> Callable[[int, Sequence[int], Sequence[str], int], list[Line]]:
        """The same of servers that are ordered now and are warmed up by this curve, or are warm (""): from the day on which they have something to send."""
        caps = rules().curve(curve).caps if curve else ()
        now = int(self.now.timestamp())
        opens_at = int(now + self.lead_seconds) if self.lead_seconds else 0

        def more(count: int, pool_ids: Sequence[int], providers: Sequence[str], begin: int) -> list[Line]:
            idle_days = max(begin, opens_at) // DAY - now // DAY
            return supply.more_servers(self.fleet, count, pool_ids, providers, (*caps[:1] * max(0, idle_days), *caps), opens_at)

        return more

    def new_servers_at(self) -> dt.datetime:
        """When servers that are ordered now send what matters: as soon as they are made where the next source's do so at once, or on their first whole day."""
        if self.sources.next is not None and self.sources.next.helps_at_once:
            return self.now + dt.timedelta(seconds=self.lead_seconds)
        return dt.datetime.combine(new_server().first_day(self.now.date()), dt.time(), dt.UTC)

    def _previous(self) -> Mapping[tuple[int, str, int], int]:
        """What the plan in force has still to send: (campaign, provider, start of slot) → messages.

        A campaign that was to be out within these slots (`nearly_out`) also has there what has come back to it since, of claims that were not sent: or a rest
        of some rows, for which there is room, would be planned half an hour later, and servers ordered for it.
        """
        previous: Counter[tuple[int, str, int]] = Counter()
        for (campaign_id, _, provider, start), grant in self.present.items():
            if grant.planned:
                previous[campaign_id, provider, start] += max(0, grant.planned - grant.used)
        *_, last = grants.slots_at(self.now, _GRANTED_SLOTS)
        rows: Counter[tuple[int, str]] = Counter()
        for wanted in self.demands:
            if wanted.opens_at(int(self.now.timestamp())) < last:
                rows[wanted.job.id, wanted.provider] += wanted.rows
        for campaign_id, provider in {place[:2] for place in previous}:
            mine = [place for place in previous if place[:2] == (campaign_id, provider)]
            back = rows[campaign_id, provider] - sum(previous[place] for place in mine)
            if back > 0 and (campaign_id, provider) in self.nearly_out and not previous.get((campaign_id, provider, last)):
                for place in mine:
                    previous[place] += back
        return previous


@dataclass(frozen=True)
class Made:
    """A plan that was made. `changed` is the number of grants it changed; None if another plan came into force meanwhile, and this one did not."""

    plan: NearPlan
    document: Mapping[str, Any]
    changed: int | None


def read(connection: Connection, settings: Settings, now: dt.datetime | None = None, sources: HostSources = NO_SOURCES) -> Situation:
    """Read from counters, limits and grants what a plan is made from; `now` is the database's time if not given. `sources` are where servers come from."""
    moment = now or database_now(connection)
    kept = in_force.read(connection)
    epoch = kept.epoch if kept else 0
    fleet = Fleet.read(connection, moment, settings.server.heartbeat_seconds)
    jobs, demands = demand.read(connection, moment, HOURS * HOUR, int(settings.sending.first_retry_seconds))
    lines = supply.read(connection, fleet, {wanted.provider for wanted in demands}, moment)
    present = grants.read(connection, grants.slots_at(moment, _GRANTED_SLOTS), epoch)
    outlooks = outlook.read(connection, fleet, moment)
    ordered = [far.from_document(order) for order in kept.document["far"]] if kept else []
    flights, idleness = outlook.in_flight(connection, sources, moment.date()), idle.read(connection, settings, fleet)
    nearly_out = kept.nearly_out if kept else frozenset()
    before = forecast.planned_before(kept.document, int(moment.timestamp())) if kept else []
    lead = outlook.lead_seconds(connection)
    return Situation(moment, epoch, fleet, jobs, demands, lines, present, nearly_out, outlooks, flights, ordered, before, idleness, lead, sources)


def make(engine: Engine, settings: Settings, now: dt.datetime | None = None, sources: HostSources = NO_SOURCES) -> Made:
    """Make a plan of the situation as it is and put it into force. Safe to run in several places at once: one plan comes into force.

    The order of the next weeks follows from the curve of the next of the `sources`, and if its servers are worth something within two days, the plan says how
    many of them help.
    """
    with reading(engine) as connection:
        situation = read(connection, settings, now, sources)
    plan = situation.plan()
    found = forecast.forecasts(plan)
    orders = list(forecast.orders(plan, situation.more_servers, situation.lines, found))
    ahead = far_plan(situation.outlooks, situation.now.date(), sources.new_server, situation.in_flight, situation.ordered)
    left = idle.judge(situation.idleness, plan, situation.fleet, situation.outlooks, situation.in_flight, ahead, sources, situation.now)
    document = {
        **forecast.document(plan, found, orders),
        "planned_before": situation.planned_before,
        "far": [far.to_document(order) for order in ahead],
        "idle": [verdicts.to_document(verdict) for verdict in left],
    }
    if sources.next is not None and sources.next.helps_at_once:
        helping = forecast.orders(plan, situation.ordered_servers(sources.next.curve), situation.lines, found)
        document["offer"] = {"curve": sources.next.curve, "orders": [asdict(order) for order in helping]}
    planned_for = {(wanted.job.id, wanted.provider) for wanted in situation.demands if not wanted.job.expected}
    document["planned_for"] = in_force.pairs_document(planned_for)
    document["nearly_out"] = in_force.pairs_document(planned_for & plan.sent_within(_GRANTED_SLOTS))
    if not transact(engine, lambda connection: in_force.follow(connection, situation.epoch, document, situation.now)):
        return Made(plan, document, None)
    slots = grants.slots_at(situation.now, _GRANTED_SLOTS)
    heartbeat_seconds, epoch = settings.server.heartbeat_seconds, situation.epoch + 1
    changed = allotments.write_plan(engine, heartbeat_seconds, situation.present, _planned(situation, plan), planned_for, slots, epoch, situation.now)
    return Made(plan, document, changed)


def _planned(situation: Situation, plan: NearPlan) -> dict[Place, int]:
    """What is planned in the first slots, which are quarters of an hour, as grants are."""
    sending = {job.id for job in situation.jobs if not job.expected}
    planned = {place: granted for place, granted in plan.grants(_GRANTED_SLOTS).items() if place[0] in sending}
    for place, grant in situation.present.items():
        if grant.used and place[0] in sending:
            # A grant is for the whole slot, the plan for what is left of it.
            planned[place] = planned.get(place, 0) + grant.used
    return planned


def sent_by_hour(connection: Connection, now: dt.datetime) -> list[tuple[int, int]]:
    """Messages that went out in this hour and each of the `forecast.PAST_HOURS` before it, delivered or refused for good: (its start in epoch seconds,
    messages).
    """
    since = now.replace(minute=0, second=0, microsecond=0) - dt.timedelta(hours=forecast.PAST_HOURS)
    live = connection.execute(sa.select(Campaign.id).where(sa.func.coalesce(Campaign.finished_at, since) >= since, Campaign.started_at.is_not(None))).scalars()
    query = sa.select(CampaignMinute.minute, sa.func.sum(CampaignMinute.count)).where(
        CampaignMinute.campaign_id.in_(live.all()),
        CampaignMinute.minute >= int(since.timestamp()) // 60,
        CampaignMinute.state.in_([int(State.DELIVERED), int(State.BOUNCED)]),
    )
    totals: Counter[int] = Counter()
    for minute, count in connection.execute(query.group_by(CampaignMinute.minute)):
        totals[minute // 60 * HOUR] += int(count)
    return sorted(totals.items())
