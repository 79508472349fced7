"""What the centre tells: campaigns under way, outcomes, and each server as its heartbeats and claims show it. One short read of counters for each look."""

from __future__ import annotations

import datetime as dt
import threading
from collections.abc import Iterable, Iterator

import sqlalchemy as sa
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from sqlalchemy.engine import Connection, Engine

from mail_pipelines.capacity import breakers, domain_breakers, warm_up
from mail_pipelines.database.engine import DatabaseError, database_now, reading
from mail_pipelines.database.models import Campaign, CampaignCounter, Claim, SyncState
from mail_pipelines.dispatch import audit, holds, servers
from mail_pipelines.dispatch.recovery import standing
from mail_pipelines.dispatch.registry import ServerState
from mail_pipelines.dispatch.servers import ServerInfo
from mail_pipelines.metrics.outcomes import Outcomes, name
from mail_pipelines.reputation import readings

_UNDER_WAY = ("building", "sending", "paused")


class CentreMetrics(Collector):
    """Everything that the central database knows without being searched."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._outcomes = Outcomes()
        # One look at a time, whoever asks.
        self._lock = threading.Lock()
        with self._lock:
            # The first look is what later ones are compared with.
            list(self._look())

    def collect(self) -> Iterable[Metric]:
        with self._lock:
            return list(self._look())

    def _look(self) -> Iterator[Metric]:
        try:
            with reading(self._engine) as connection:
                now = database_now(connection)
                found = [
                    *_campaigns(connection),
                    *self._count(connection, now),
                    *_servers(connection, now),
                    *_claims(connection, now),
                    *_breakers(connection),
                    *_warm_ups(connection, now),
                    *_reputation(connection, now),
                    *_stopped(connection),
                ]
        except DatabaseError:
            yield _gauge("database_reachable", "Whether the central database answers.", 0)
            return
        yield _gauge("database_reachable", "Whether the central database answers.", 1)
        yield from found

    def _count(self, connection: Connection, now: dt.datetime) -> Iterator[Metric]:
        self._outcomes.look(connection, now)
        keys = _keys(connection)
        total = CounterMetricFamily(
            "mail_pipelines_outcomes", "Outcomes recorded since this process began; deferred is one offer's.", labels=("server", "provider", "outcome")
        )
        for (server_id, provider, state), count in sorted(self._outcomes.totals.items()):
            total.add_metric((keys.get(server_id, "centre"), provider, name(state)), count)
        yield total


def _gauge(metric: str, words: str, value: float) -> Metric:
    return GaugeMetricFamily(f"mail_pipelines_{metric}", words, value=value)


def _family(metric: str, words: str, *labels: str) -> GaugeMetricFamily:
    return GaugeMetricFamily(f"mail_pipelines_{metric}", words, labels=labels)


def _keys(connection: Connection) -> dict[int, str]:
    return {server.id: server.key for server in servers.all_servers(connection)}


def _campaigns(connection: Connection) -> Iterator[Metric]:
    columns = (Campaign.id, Campaign.key, Campaign.state, Campaign.brand_id, Campaign.pool_id, Campaign.finish_by)
    campaigns = connection.execute(sa.select(*columns).where(Campaign.state.in_(_UNDER_WAY))).all()
    states = _family("campaigns", "Campaigns under way, by state.", "state")
    for known in _UNDER_WAY:
        states.add_metric((known,), sum(campaign.state == known for campaign in campaigns))
    yield states
    rows = _family("campaign_rows", "Recipients of a campaign under way.", "campaign", "provider", "state")
    if campaigns:
        by = (CampaignCounter.campaign_id, CampaignCounter.provider, CampaignCounter.state)
        sums = sa.select(*by, sa.func.sum(CampaignCounter.count)).where(CampaignCounter.campaign_id.in_([campaign.id for campaign in campaigns])).group_by(*by)
        keys = {campaign.id: campaign.key for campaign in campaigns}
        for campaign_id, provider, state, count in connection.execute(sums):
            rows.add_metric((keys[campaign_id], provider, name(state)), int(count))
    yield rows
    in_force = holds.in_force(connection)
    sending = _family("campaign_sending", "1 where rows may be claimed: the campaign is in state sending, and nothing holds it.", "campaign")
    finish_by = _family("campaign_finish_by_timestamp_seconds", "When a campaign is to be finished.", "campaign")
    for campaign in campaigns:
        free = campaign.state == "sending" and in_force.over_campaign(campaign.id, campaign.brand_id, campaign.pool_id) is None
        sending.add_metric((campaign.key,), int(free))
        if campaign.finish_by is not None:
            finish_by.add_metric((campaign.key,), campaign.finish_by.timestamp())
    yield sending
    yield finish_by


def _fleet(connection: Connection) -> list[ServerInfo]:
    """All servers that are not gone for good."""
    return [server for server in servers.all_servers(connection) if server.state != ServerState.RETIRED]


def _servers(connection: Connection, now: dt.datetime) -> Iterator[Metric]:
    states = _family("fleet_server_state", "1 for the state a server is in.", "server", "state")
    beats = _family("fleet_heartbeat_age_seconds", "Since the last heartbeat, by the database's clock.", "server")
    settled = _family("fleet_settled_age_seconds", "Since the server's own settler ended a round, as its last heartbeat told.", "server")
    shipped = _family("fleet_log_shipped_age_seconds", "Since the end of the server's log was last in the archive.", "server")
    # Of the last heartbeat: key in it, factor, metric.
    told = {
        "free_mb": (1 << 20, _family("fleet_log_free_bytes", "Free on the disk of the server's log.", "server")),
        "queue": (1, _family("fleet_queue_messages", "Messages in the queue of the server's Exim.", "server")),
        "load": (1, _family("fleet_load", "Load of the server's host over a minute.", "server")),
        "clock_ahead": (1, _family("fleet_clock_ahead_seconds", "By how much the clock of the server's host is ahead of the database's.", "server")),
    }
    fleet = _fleet(connection)
    for server in fleet:
        health = server.health or {}
        states.add_metric((server.key, server.state), 1)
        if server.heartbeat_at is not None:
            beats.add_metric((server.key,), (now - server.heartbeat_at).total_seconds())
        for key, (factor, family) in told.items():
            if key in health:
                family.add_metric((server.key,), health[key] * factor)
        if health.get("settled"):
            settled.add_metric((server.key,), max(0.0, now.timestamp() - health["settled"]))
        if at := (health.get("shipped") or {}).get("at"):
            shipped.add_metric((server.key,), max(0.0, now.timestamp() - at))
    yield from (states, beats, settled, shipped, *(family for _, family in told.values()))
    alarms = CounterMetricFamily("mail_pipelines_fleet_alarms", "How often a mail server did what it should never do, as far as audited.", labels=("server",))
    known = {server.key for server in fleet}
    counts = sa.select(SyncState.key, SyncState.value["totals"]["alarms"].as_integer()).where(SyncState.source == audit.SOURCE)
    for key, count in connection.execute(counts):
        if key in known:
            alarms.add_metric((key,), count or 0)
    yield alarms


def _claims(connection: Connection, now: dt.datetime) -> Iterator[Metric]:
    opened = _family("fleet_open_claims", "Claims that a session works on.", "server")
    late = _family("fleet_unsettled_claims", "Claims past their lease or half settled: their rows wait for the server's settler.", "server")
    abandoned = sa.case((sa.or_(Claim.state == "settling", Claim.lease_until <= now), 1), else_=0)
    sums = sa.select(Claim.server_id, abandoned.label("late"), sa.func.count()).where(Claim.state.in_(("open", "settling"))).group_by(Claim.server_id, "late")
    counts = {(server_id, bool(is_late)): count for server_id, is_late, count in connection.execute(sums)}
    for server in _fleet(connection):
        opened.add_metric((server.key,), counts.get((server.id, False), 0))
        late.add_metric((server.key,), counts.get((server.id, True), 0))
    yield opened
    yield late


def _breakers(connection: Connection) -> Iterator[Metric]:
    family = _family(
        "fleet_breaker", "1 for the state of a server's breaker towards a provider; absent where it was never open.", "server", "provider", "state"
    )
    keys = {server.id: server.key for server in _fleet(connection)}
    for breaker in breakers.all_breakers(connection):
        if breaker.server_id in keys:
            for state in (breakers.CLOSED, breakers.OPEN, breakers.TRIAL):
                family.add_metric((keys[breaker.server_id], breaker.provider, state), int(breaker.state == state))
    yield family


def _warm_ups(connection: Connection, now: dt.datetime) -> Iterator[Metric]:
    labels = ("server", "provider")
    steps = _family("fleet_warm_up_step", "Step of a server's warm-up towards a provider; provider * stands for those that it has not sent to.", *labels)
    caps = _family("fleet_warm_up_day_cap", "Messages that the warm-up allows on this day; absent at the end of the curve.", *labels)
    used = _family("fleet_warm_up_day_used", "Messages of this day, where a warm-up limits them.", *labels)
    keys = {server.id: server.key for server in _fleet(connection)}
    for pair in warm_up.standings(connection, now):
        if pair.server_id in keys:
            place = (keys[pair.server_id], pair.provider)
            steps.add_metric(place, pair.step)
            if pair.per_day is not None:
                caps.add_metric(place, pair.per_day)
                used.add_metric(place, pair.used)
    yield from (steps, caps, used)


def _reputation(connection: Connection, now: dt.datetime) -> Iterator[Metric]:
    rates = _family("reputation_spam_rate", "Newest part of our mail of the last week that a provider's users reported as spam.", "source", "subject")
    week = readings.read(connection, int(now.timestamp()) - 7 * readings.DAY)
    for place, newest in readings.newest(week, "spam_rate").items():
        rates.add_metric(place, newest.spam_rate or 0.0)
    yield rates
    states = _family("domain_breaker", "1 for the state of a domain's breaker at a provider; absent where it was never open.", "domain", "provider", "state")
    for breaker in domain_breakers.all_breakers(connection):
        for state in (domain_breakers.CLOSED, domain_breakers.OPEN, domain_breakers.TRIAL):
            states.add_metric((breaker.domain, breaker.provider, state), int(breaker.state == state))
    yield states


def _stopped(connection: Connection) -> Iterator[Metric]:
    family = _family("holds", "Holds in force, by what they are over.", "kind")
    found = [hold.scope.kind for hold in holds.in_force(connection).holds]
    for kind in holds.Kind:
        family.add_metric((str(kind),), found.count(kind))
    yield family
    recovery = standing.newest(connection)
    yield _gauge("recovery_open", "Whether the database is being recovered, during which nothing is sent.", int(recovery is not None and recovery.is_open))
