"""The causes there are, as one table of small functions: each reads counters and small tables, never the ledger.

What belongs here: what is worth an alert, its words, and the command to type. What does not: when and how it is told (`telling`), and causes that only
Dagster knows (`sensors.alerts`).
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from mail_pipelines.alerts import external, shortages
from mail_pipelines.alerts.cause import Cause
from mail_pipelines.campaigns import lifecycle, overdue
from mail_pipelines.campaigns.campaign import Campaign
from mail_pipelines.capacity import breakers, domain_breakers, health, told, verdicts
from mail_pipelines.capacity.health_rules import Standing, rules
from mail_pipelines.config import Settings
from mail_pipelines.database.engine import database_now
from mail_pipelines.database.models import SENDING_STATES, State
from mail_pipelines.database.models import Campaign as CampaignRow
from mail_pipelines.dispatch import clock, holds, servers
from mail_pipelines.dispatch.recovery import standing
from mail_pipelines.dispatch.registry import ServerState
from mail_pipelines.dispatch.servers import ServerInfo
from mail_pipelines.provisioning import listing, proposals
from mail_pipelines.provisioning import store as provisions
from mail_pipelines.provisioning.states import State as Making
from mail_pipelines.reputation import standing as reputation
from mail_pipelines.reputation.readings import configured
from mail_pipelines.runbook import Chapter

# A beat may be late once.
SILENT_FOR = dt.timedelta(minutes=1)
# Sending stops below `journal.MIN_FREE_MB`; this is early enough to make room.
LOG_DISK_MB = 2_000
# A breaker opens for minutes by itself. So often in a row, or for so long, is the operator's matter.
BREAKER_TRIPS, BREAKER_FOR = 3, dt.timedelta(hours=2)
RECOVERY_FOR = dt.timedelta(minutes=30)
HELD_FOR = dt.timedelta(hours=12)
# By then bounces have come, and rows of campaigns with `on_unknown: resend` were sent again.
UNKNOWN_FOR = overdue.RESEND_AFTER
# Of a server that could not be made an operator is told for so long; and of one that waits for the DNS when a publisher would have been quicker.
FAILED_FOR, WAITING_FOR = dt.timedelta(days=1), dt.timedelta(minutes=10)
_ON_DUTY = (*SENDING_STATES, ServerState.DRAINING.value)


@dataclass
class Look:
    """One look at the installation: what several causes ask about is read once."""

    connection: Connection
    settings: Settings
    now: dt.datetime
    fleet: list[ServerInfo] = field(init=False)
    campaigns: list[Campaign] = field(init=False)

    def __post_init__(self) -> None:
        self.fleet = servers.all_servers(self.connection)
        self.campaigns = lifecycle.running(self.connection)


def collect(connection: Connection, settings: Settings) -> list[Cause]:
    """All causes that the central database knows now."""
    look = Look(connection, settings, database_now(connection))
    return [cause for found in CAUSES for cause in found(look)]


def _silent(look: Look) -> Iterator[Cause]:
    for server in look.fleet:
        # One that has never spoken was only registered so far.
        if server.state in _ON_DUTY and server.heartbeat_at is not None and server.is_silent(look.now, look.settings.server.heartbeat_seconds):
            text = f"server {server.key} is silent since {server.heartbeat_at:%Y-%m-%d %H:%M} UTC"
            yield Cause("server-silent", server.key, text, f"mail-pipelines server show {server.key}", SILENT_FOR)


def _lost(look: Look) -> Iterator[Cause]:
    for server in look.fleet:
        if server.state == ServerState.LOST:
            text = f"server {server.key} was declared lost; what it had in hand is unknown. Activate it when its host is back, or retire it"
            yield Cause("server-lost", server.key, text, f"mail-pipelines server retire {server.key} --lost")


def _failed(look: Look) -> Iterator[Cause]:
    for one in provisions.all_provisions(look.connection, since=look.now - FAILED_FOR):
        if one.state is Making.FAILED:
            left = "" if one.ended_at is not None else "; its parts are not all removed yet"
            yield Cause("server-failed", one.key, f"server {one.key} could not be made: {one.reason}{left}", "mail-pipelines server provisions --all")


def _waiting_dns(look: Look) -> Iterator[Cause]:
    for one in provisions.making(look.connection):
        if one.state is Making.WAITING_DNS and one.records:
            text = f"server {one.key} waits for {len(one.records)} DNS records: publish them, it goes on by itself"
            yield Cause("server-dns", one.key, text, "mail-pipelines server provisions", WAITING_FOR)


def _proposed(look: Look) -> Iterator[Cause]:
    for one in proposals.undecided(look.connection):
        what = f"{one.servers} more server{'s' if one.servers > 1 else ''}{f' of pool {one.pool}' if one.pool else ''} for {one.cost_per_month:.2f} a month"
        effect = f" ({one.effect})" if one.effect else ""
        yield Cause("proposal", str(one.id), f"proposal {one.id}: {what}: {one.why}{effect}", f"mail-pipelines server provision --proposal {one.id}")


def _idle(look: Look) -> Iterator[Cause]:
    for key, verdict in verdicts.standing(look.connection, look.now).items():
        if verdict.due and look.settings.provisioning.mode == "propose":
            text = f"server {key} is not needed, and costs {verdict.saves_per_month:.2f} a month: {verdict.why}"
            yield Cause("server-idle", key, text, f"mail-pipelines server remove {key}")


def _set_aside(look: Look) -> Iterator[Cause]:
    for source, reason in provisions.set_aside(look.connection).items():
        yield Cause("source", source, f"host source {source} is set aside: {reason}", f"mail-pipelines server sources --use-again {source}")


def _clock(look: Look) -> Iterator[Cause]:
    for server in look.fleet:
        if server.state in _ON_DUTY and server.clock_error:
            yield Cause("clock", server.key, f"{server.clock_error}: {clock.REMEDY}", f"mail-pipelines server show {server.key}", SILENT_FOR)


def _log_disk(look: Look) -> Iterator[Cause]:
    for server in look.fleet:
        free_mb = (server.health or {}).get("free_mb", LOG_DISK_MB)
        if server.state in _ON_DUTY and free_mb < LOG_DISK_MB:
            text = server.shortage or f"the log disk of {server.key} has {free_mb:,} MB free: make room before it stops sending"
            text = f"{text}; {Chapter.DISK_FULL.place}"
            yield Cause("log-disk", server.key, text, f"mail-pipelines server show {server.key}", SILENT_FOR)


def _breakers(look: Look) -> Iterator[Cause]:
    keys = {server.id: server.key for server in look.fleet if server.state in _ON_DUTY}
    for breaker in breakers.all_breakers(look.connection):
        key = keys.get(breaker.server_id)
        if key is None or breaker.state == breakers.CLOSED:
            continue
        long = breaker.changed_at is not None and look.now - breaker.changed_at >= BREAKER_FOR
        if long or breaker.trips >= BREAKER_TRIPS:
            text = f"server {key} has stopped sending to {breaker.provider} ({breaker.reason}), {breaker.trips} times in a row; {Chapter.BLOCKED.place}"
            yield Cause("breaker", f"{key}:{breaker.provider}", text, f"mail-pipelines server retry {key} {breaker.provider}")


def _stopped_domains(look: Look) -> Iterator[Cause]:
    for breaker in domain_breakers.all_breakers(look.connection):
        if breaker.state != domain_breakers.CLOSED:
            text = f"{breaker}. Look at whom its campaigns are sent to"
            yield Cause("domain-stopped", f"{breaker.domain}:{breaker.provider}", text, f"mail-pipelines reputation retry {breaker.domain}")


def _reputation(look: Look) -> Iterator[Cause]:
    """What a stopped domain is told for is not told twice."""
    stopped = {one.domain for one in domain_breakers.all_breakers(look.connection) if one.state != domain_breakers.CLOSED}
    asked = configured(look.settings.reputation)
    for one in told.bad(look.connection, look.now):
        if one.signal.by in asked and one.reading.subject not in stopped:
            yield Cause("reputation", f"{one.reading.subject}:{one.signal.of}", one.words("back"), "mail-pipelines reputation show")
    for source in asked:
        if words := reputation.stale(look.connection, source, look.now):
            yield Cause("reputation-stale", source, words, f"mail-pipelines reputation sync {source}")


def _listed(look: Look) -> Iterator[Cause]:
    found = listing.listings(look.connection)
    for server in look.fleet:
        if server.state in _ON_DUTY and (known := found.get(server.key)) and known.listed:
            text = f"server {server.key}: {'; '.join(known.listed)}; {Chapter.LISTED.place}"
            yield Cause("block-list", server.key, text, f"mail-pipelines server verify {server.key}")


def _drained(look: Look) -> Iterator[Cause]:
    for key, record in health.drained(look.connection, (ServerState.DRAINING, ServerState.PAUSED)).items():
        text = f"server {key} was drained at {record.at:%Y-%m-%d %H:%M} UTC: {record.why}. Take it back when the cause is gone, or remove or retire it"
        yield Cause("server-drained", key, text, f"mail-pipelines server activate {key}")


def _suspect(look: Look) -> Iterator[Cause]:
    """While the whole fleet is refused nobody is drained, and that has an alert of its own."""
    for key, record in {} if health.trouble(look.connection) else health.records(look.connection).items():
        if record.standing is Standing.SUSPECT and look.now - record.at >= 2 * rules().confirm:
            text = f"server {key} is refused, and sends on, for its pool can spare no further one: {record.why}"
            yield Cause("server-refused", key, text, f"mail-pipelines server drain {key}")


def _fleet_refused(look: Look) -> Iterator[Cause]:
    if words := health.trouble(look.connection):
        yield Cause("fleet-refused", "", f"{words}. Look at what the campaigns send, and hold them", "mail-pipelines campaign list")


def _recovery(look: Look) -> Iterator[Cause]:
    recovery = standing.newest(look.connection)
    if recovery is not None and recovery.is_open:
        text = f"a recovery waits for the logs of servers; nothing is sent; {Chapter.RESTORED.place}"
        yield Cause("recovery", "", text, "mail-pipelines recover", RECOVERY_FOR)


def _holds(look: Look) -> Iterator[Cause]:
    for hold in holds.in_force(look.connection).holds:
        if look.now - hold.created_at >= HELD_FOR:
            text = f"{hold.what} is held since {hold.created_at:%Y-%m-%d %H:%M} UTC: {hold.reason}"
            yield Cause("hold", f"{hold.scope.kind}:{hold.name}", text, _release(hold))


def _release(hold: holds.Hold) -> str:
    return "mail-pipelines release" if hold.scope.kind is holds.Kind.EVERYTHING else f"mail-pipelines release --{hold.scope.kind} {hold.name}"


def _late(look: Look) -> Iterator[Cause]:
    running = CampaignRow.id.in_([campaign.id for campaign in look.campaigns])
    query = sa.select(CampaignRow.id, CampaignRow.finish_by).where(running, CampaignRow.finish_by <= look.now)
    finish_by = {number: by for number, by in look.connection.execute(query).tuples() if by is not None}
    late = [campaign for campaign in look.campaigns if campaign.id in finish_by]
    for campaign, rows in _with_rows(look.connection, late):
        waiting = sum(count for state, count in rows.items() if state is not State.UNKNOWN)
        if waiting > 0:
            text = f"campaign {campaign.key} was to be finished by {finish_by[campaign.id]:%Y-%m-%d %H:%M} UTC and has {waiting:,} recipients to go"
            yield Cause("campaign-late", campaign.key, text, f"mail-pipelines campaign show {campaign.key}")


def _unknown(look: Look) -> Iterator[Cause]:
    for campaign, rows in _with_rows(look.connection, look.campaigns):
        if count := rows.get(State.UNKNOWN, 0):
            hours = UNKNOWN_FOR.seconds // 3600
            text = f"campaign {campaign.key} has {count:,} recipients of whom nobody knows whether they were mailed, for more than {hours} hours"
            yield Cause("unknown", campaign.key, text, f"mail-pipelines unknown list --campaign {campaign.key}", UNKNOWN_FOR)


def _shortages(look: Look) -> Iterator[Cause]:
    yield from shortages.causes(look.connection, look.settings.provisioning, look.now)


def _external(look: Look) -> Iterator[Cause]:
    yield from external.causes(look.connection, look.settings.home, look.now)


def _with_rows(connection: Connection, campaigns: list[Campaign]) -> Iterator[tuple[Campaign, overdue.OpenRows]]:
    rows = overdue.open_rows(connection, campaigns)
    yield from ((campaign, rows[campaign.id]) for campaign in campaigns)


CAUSES: tuple[Callable[[Look], Iterator[Cause]], ...] = (
    _recovery,
    _silent,
    _lost,
    _failed,
    _waiting_dns,
    _set_aside,
    _proposed,
    _idle,
    _clock,
    _log_disk,
    _listed,
    _drained,
    _suspect,
    _fleet_refused,
    _breakers,
    _stopped_domains,
    _reputation,
    _holds,
    _late,
    _shortages,
    _unknown,
    _external,
)
