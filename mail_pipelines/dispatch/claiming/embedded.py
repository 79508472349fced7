"""The claim on SQLite, step by step: what the procedure `claim_rows` does on MySQL/MariaDB.

No row is locked here, since a write transaction of SQLite has the database to itself.
"""

from __future__ import annotations

import datetime as dt
import functools
from collections import Counter
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from mail_pipelines.contacts import consent
from mail_pipelines.database.models import (
    SENDING_STATES,
    Allotment,
    Campaign,
    Claim,
    Contact,
    Delivery,
    DomainHealth,
    Hold,
    LedgerGeneration,
    ProviderLimit,
    ProviderUsage,
    Server,
    State,
    Subscription,
)
from mail_pipelines.database.types import utc_now
from mail_pipelines.database.upsert import add_to
from mail_pipelines.delivery import counters
from mail_pipelines.delivery.domain_health import rules
from mail_pipelines.delivery.recording import slot_at, windows_at
from mail_pipelines.dispatch import greylisting, holds, windows
from mail_pipelines.dispatch.claiming import best_ranks, hindrances
from mail_pipelines.dispatch.claiming.hindrances import CLOSED, DEAD, MOVED, Hindered
from mail_pipelines.dispatch.claiming.refusals import Refusal, Verdict
from mail_pipelines.dispatch.claiming.terms import Request, Row, Taken

# The statements are built once: building one costs more than running it, and a claim runs a dozen, many times a second.
_SENDER = (
    sa.select(
        Server.state,
        Server.incarnation,
        LedgerGeneration.generation,
        sa.or_(sa.bindparam("newest_claim", type_=sa.BigInteger).is_(None), sa.exists().where(Claim.id == sa.bindparam("newest_claim"))).label("knows_claim"),
        Server.heartbeat_at,
    )
    .join_from(Server, LedgerGeneration, LedgerGeneration.id == 1)
    .where(Server.id == sa.bindparam("server_id"))
)
_CAMPAIGN = (
    sa.select(
        Campaign.state,
        Campaign.version_id,
        sa.exists().where(Hold.released_at.is_(None)).label("any_held"),
        sa.or_(Campaign.pool_id == Server.pool_id, Campaign.overflow_pool_id == Server.pool_id).label("our_pool"),
        Campaign.expire_at,
        Campaign.brand_id,
        Campaign.unsubscribe,
        Campaign.unsubscribe_list_id,
        Campaign.send_window.is_not(None).label("windowed"),
    )
    .join_from(Campaign, Server, Server.id == sa.bindparam("server_id"))
    .where(Campaign.id == sa.bindparam("campaign_id"))
)
_OUR_GRANT = (
    Allotment.campaign_id == sa.bindparam("campaign"),
    Allotment.server_id == sa.bindparam("server"),
    Allotment.provider == sa.bindparam("to"),
    Allotment.slot_start == sa.bindparam("slot"),
)
_GRANT = sa.select(Allotment.granted - Allotment.used).where(*_OUR_GRANT)
_SPEND = sa.update(Allotment).where(*_OUR_GRANT).values(used=Allotment.used + sa.bindparam("spent"))
_LIMITS = (
    sa.select(ProviderLimit.per_hour, ProviderLimit.per_day)
    .where(ProviderLimit.server_id.in_((0, sa.bindparam("server_id"))), ProviderLimit.provider.in_((sa.bindparam("provider"), "*")))
    # Those that fit best: the server's own before those of all, the provider's before those of any.
    .order_by(ProviderLimit.server_id.desc(), ProviderLimit.provider.desc())
    .limit(1)
)
_USED = sa.select(ProviderUsage.used).where(
    ProviderUsage.server_id == sa.bindparam("server_id"),
    ProviderUsage.provider == sa.bindparam("provider"),
    ProviderUsage.window_seconds == sa.bindparam("length"),
    ProviderUsage.window_start == sa.bindparam("start"),
)


def _due(state: State, condition: sa.ColumnElement[bool]) -> sa.Select[int]:
    return (
        sa.select(Delivery.contact_id)
        .where(
            Delivery.campaign_id == sa.bindparam("campaign_id"),
            Delivery.shard == sa.bindparam("shard"),
            Delivery.provider == sa.bindparam("provider"),
            Delivery.state == int(state),
            Delivery.sort_key.between(sa.bindparam("first"), sa.bindparam("last")),
            condition,
        )
        .order_by(Delivery.sort_key)
        .limit(sa.bindparam("most"))
    )


_SECOND = sa.bindparam("second", type_=sa.BigInteger)
_OURS = sa.or_(~greylisting.waits_for_another(sa.bindparam("server_id", type_=sa.Integer)), Delivery.sort_key <= _SECOND - greylisting.WAIT_SECONDS)
_DEFERRED = _due(State.DEFERRED, _OURS)
_PENDING = _due(State.PENDING, sa.or_(Delivery.not_before.is_(None), Delivery.not_before <= _SECOND))
# The sort key of a deferred row is the second in which it is due; that of a pending row is its place, and each will do.
_FIRST_PLACE, _LAST_PLACE = -(2**31), 2**31 - 1
_TAKE = (
    sa.update(Delivery)
    .where(Delivery.campaign_id == sa.bindparam("campaign"), Delivery.contact_id.in_(sa.bindparam("contacts", expanding=True)))
    .values(state=int(State.CLAIMED), claim_id=sa.bindparam("claim"), server_id=sa.bindparam("server"), version_id=sa.bindparam("version"))
)
_OPEN = sa.insert(Claim)
_ASK = sa.update(DomainHealth).where(DomainHealth.domain.in_(sa.bindparam("domains", expanding=True))).values(dead_until=sa.bindparam("answer_by"))


@functools.lru_cache(maxsize=256)
def _recipients(brand_id: int, list_id: int | None, of_list: bool) -> sa.Select[Any]:
    """Contacts as they are now with their row of the ledger, and why a campaign of this brand (and list) may not mail them as they are."""
    left_list: sa.ColumnElement[bool] = sa.false()
    if of_list:
        left_list = sa.exists().where(Subscription.contact_id == Contact.id, Subscription.list_id == list_id, Subscription.subscribed.is_(False))
    hindrance = sa.case(
        (consent.suppressed_clause(Contact.address_hash, Contact.domain, consent.campaign_scopes(brand_id, list_id)), "suppressed"),
        (left_list, "unsubscribed"),
        (Contact.address_hash != Delivery.address_hash, MOVED),
        (DomainHealth.domain.is_not(None), DEAD),
    )
    columns = (Contact.id, Delivery.attempt, Contact.email, Contact.attributes, hindrance.label("hindrance"), Contact.address_hash, Contact.provider)
    place = (Contact.time_zone, Delivery.sort_key, Delivery.reason)
    return (
        sa.select(*columns, DomainHealth.domain, DomainHealth.dead_until, *place)
        .join_from(Contact, Delivery, sa.and_(Delivery.campaign_id == sa.bindparam("campaign"), Delivery.contact_id == Contact.id))
        .outerjoin(DomainHealth, DomainHealth.domain == Contact.domain)
        .where(Contact.id.in_(sa.bindparam("contacts", expanding=True)))
    )


def take(connection: Connection, request: Request) -> Taken | Refusal:
    """Take rows and write the claim, or say why not."""
    now: dt.datetime = connection.execute(sa.select(utc_now())).scalar_one()
    if refusal := _check_sender(connection, request, now):
        return refusal
    campaign: Any = connection.execute(_CAMPAIGN, {"campaign_id": request.campaign_id, "server_id": request.sender.server_id}).one_or_none()
    if refusal := _check_campaign(connection, request, campaign, now):
        return refusal
    warming = best_ranks.cap(connection, request.sender.server_id, request.provider)
    room = _room(connection, request, now, warming)
    if isinstance(room, Refusal):
        return room
    begin = best_ranks.first_place(connection, request, now) if warming is None else None
    sources = _due_rows(connection, request, min(request.limit, room), now, begin)
    if not sources:
        return Refusal(Verdict.NOTHING_DUE, now)
    rows, hindered = _check_recipients(connection, request, campaign, sources, now)
    version_id: int = campaign.version_id
    if rows:
        _claim_rows(connection, request, rows, sources, version_id, now)
    _write_claim(connection, request, len(rows), now)
    hindrances.end(connection, request, hindered, now)
    return Taken(now, version_id, tuple(rows))


def _check_sender(connection: Connection, request: Request, now: dt.datetime) -> Refusal | None:
    memory = request.memory
    found = connection.execute(_SENDER, {"server_id": request.sender.server_id, "newest_claim": memory.newest_claim}).one_or_none()
    if found is None:
        return Refusal(Verdict.UNREGISTERED, now)
    if found.incarnation != request.sender.incarnation:
        return Refusal(Verdict.OTHER_INCARNATION, now)
    if found.state not in SENDING_STATES:
        return Refusal(Verdict.INACTIVE, now, found.state)
    knows_beat = memory.last_beat is None or (found.heartbeat_at is not None and found.heartbeat_at >= memory.last_beat)
    if found.generation != memory.generation or not found.knows_claim or not knows_beat:
        return Refusal(Verdict.WENT_BACK, now)
    return None


def _check_campaign(connection: Connection, request: Request, campaign: Any, now: dt.datetime) -> Refusal | None:
    if campaign is None:
        return Refusal(Verdict.NO_CAMPAIGN, now)
    if campaign.state != "sending":
        return Refusal(Verdict.NOT_SENDING, now, campaign.state)
    if campaign.any_held and (hold := holds.over_claim(connection, request.campaign_id, request.sender.server_id, request.provider)):
        return Refusal(Verdict.PROVIDER_HELD if hold.scope.kind is holds.Kind.PROVIDER else Verdict.HELD, now, str(hold))
    if not campaign.our_pool:
        return Refusal(Verdict.WRONG_POOL, now)
    if campaign.expire_at is not None and campaign.expire_at <= now:
        return Refusal(Verdict.EXPIRED, now)
    return None


def _room(connection: Connection, request: Request, now: dt.datetime, warming: int | None) -> int | Refusal:
    """How many messages grant, limits and warm-up still allow."""
    place = {"server_id": request.sender.server_id, "provider": request.provider}
    grant = {"campaign": request.campaign_id, "server": request.sender.server_id, "to": request.provider, "slot": slot_at(now)}
    room: int = connection.execute(_GRANT, grant).scalar_one_or_none() or 0
    if room <= 0:
        return Refusal(Verdict.NO_GRANT, now)
    limits = connection.execute(_LIMITS, place).one_or_none()
    if limits is None:
        return Refusal(Verdict.NO_LIMITS, now)
    caps = {3600: limits.per_hour, 86400: min((cap for cap in (limits.per_day, warming) if cap is not None), default=None)}
    for length, start in windows_at(now):
        cap = caps.get(length)
        if cap is not None:
            left = cap - (connection.execute(_USED, place | {"length": length, "start": start}).scalar_one_or_none() or 0)
            if left <= 0:
                return Refusal(Verdict.USED_UP, now, cap=cap, window_seconds=length)
            room = min(room, left)
    return room


def _due_rows(connection: Connection, request: Request, most: int, now: dt.datetime, begin: int | None) -> dict[int, State]:
    """The next rows with the state of each, in the order in which they are to be sent: deferred ones that are due, then of the pending the most engaged from
    the place `begin` on, then what is left before it.
    """
    sources: dict[int, State] = {}
    second = int(now.timestamp())
    queue = {"campaign_id": request.campaign_id, "shard": request.shard, "provider": request.provider}
    queue |= {"server_id": request.sender.server_id, "second": second}
    parts = [(State.DEFERRED, _DEFERRED, _FIRST_PLACE, second), (State.PENDING, _PENDING, _FIRST_PLACE if begin is None else begin, _LAST_PLACE)]
    if begin is not None:
        parts.append((State.PENDING, _PENDING, _FIRST_PLACE, begin - 1))
    for state, statement, first, last in parts:
        if len(sources) < most:
            found = connection.execute(statement, queue | {"most": most - len(sources), "first": first, "last": last}).scalars()
            sources.update(dict.fromkeys(found, state))
    return sources


def _check_recipients(connection: Connection, request: Request, campaign: Any, sources: dict[int, State], now: dt.datetime) -> tuple[list[Row], list[Hindered]]:
    """The rows that may be mailed, and the others. Of a dead domain that is due, the first may: it asks, and the others wait for the answer.

    Whose window is closed, or would close before the lease ends, is put off. A row that moves is judged in its new queue.
    """
    statement = _recipients(campaign.brand_id, campaign.unsubscribe_list_id, campaign.unsubscribe == "list")
    found = {row.id: row for row in connection.execute(statement, {"campaign": request.campaign_id, "contacts": list(sources)})}
    rows: list[Row] = []
    hindered: list[Hindered] = []
    asked: set[str] = set()
    answer_by = now + rules().first_wait
    second, until = int(now.timestamp()), int((now + dt.timedelta(seconds=request.lease_seconds)).timestamp())
    spans = windows.read(connection, request.campaign_id, {row.time_zone for row in found.values() if row.time_zone}) if campaign.windowed else None
    for contact_id, source in sources.items():
        row = found.get(contact_id)
        if row is None:
            hindered.append(Hindered(contact_id, source, "erased"))
        elif row.hindrance == MOVED:
            hindered.append(Hindered(contact_id, source, MOVED, row.address_hash, row.provider))
        elif row.hindrance in (None, DEAD) and spans and (opening := spans.next_opening(zone := spans.zone(row.time_zone), second, until)) is not None:
            due = spans.due(zone, opening, source, row.sort_key, row.reason)
            hindered.append(Hindered(contact_id, source, CLOSED, due=due, opening=(zone, opening, spans.reason(zone, opening))))
        elif row.hindrance == DEAD and row.dead_until <= now and row.domain not in asked:
            asked.add(row.domain)
            rows.append(Row(contact_id, row.attempt, row.email, row.attributes, asks=True))
        elif row.hindrance == DEAD:
            hindered.append(Hindered(contact_id, source, DEAD, due=int((answer_by if row.domain in asked else row.dead_until).timestamp())))
        elif row.hindrance:
            hindered.append(Hindered(contact_id, source, row.hindrance))
        else:
            rows.append(Row(contact_id, row.attempt, row.email, row.attributes))
    if asked:
        connection.execute(_ASK, {"domains": sorted(asked), "answer_by": answer_by})
    return rows, hindered


def _claim_rows(connection: Connection, request: Request, rows: list[Row], sources: dict[int, State], version_id: int, now: dt.datetime) -> None:
    """Move rows to the claim; debit windows and grant; count."""
    server_id, size = request.sender.server_id, len(rows)
    take = {"campaign": request.campaign_id, "contacts": [row.contact_id for row in rows], "claim": request.claim_id}
    connection.execute(_TAKE, take | {"server": server_id, "version": version_id})
    debit = {"server_id": server_id, "provider": request.provider, "used": size}
    add_to(connection, ProviderUsage, [debit | {"window_seconds": length, "window_start": start} for length, start in windows_at(now)], column="used")
    connection.execute(_SPEND, {"campaign": request.campaign_id, "server": server_id, "to": request.provider, "slot": slot_at(now), "spent": size})
    moves: Counter[counters.Place] = Counter({(request.shard, request.provider, State.CLAIMED, ""): size})
    for source, count in Counter(sources[row.contact_id] for row in rows).items():
        moves[request.shard, request.provider, source, ""] -= count
    counters.add(connection, request.campaign_id, server_id, moves, now)


def _write_claim(connection: Connection, request: Request, size: int, now: dt.datetime) -> None:
    """A claim of which nothing is left to send is written closed: it proves to its server that the database remembers it."""
    connection.execute(
        _OPEN,
        {
            "id": request.claim_id,
            "campaign_id": request.campaign_id,
            "shard": request.shard,
            "provider": request.provider,
            "server_id": request.sender.server_id,
            "run_id": request.sender.run_id,
            "size": size,
            "state": "open" if size else "closed",
            "incarnation": request.sender.incarnation,
            "boot_id": request.sender.boot_id,
            "journal_inode": request.position.inode,
            "journal_offset": request.position.offset,
            "opened_at": now,
            "lease_until": now + dt.timedelta(seconds=request.lease_seconds),
            "closed_at": None if size else now,
        },
    )
