"""Claims: leasing a few seconds' worth of ledger rows of one provider to one sender, in one short transaction.

The transaction checks everything that could make a message wrong at this moment: the campaign is sending, the server is
the one it says, the database has not gone back in time, limits and grant leave room, and the recipient still exists,
is not suppressed and has the address that was frozen.
"""

from __future__ import annotations

import datetime as dt
import secrets
import time
from collections import Counter
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine

from mail_pipelines.contacts import consent
from mail_pipelines.database.engine import database_now, transact
from mail_pipelines.database.models import (
    Allotment,
    Campaign,
    Claim,
    Contact,
    Delivery,
    LedgerGeneration,
    ProviderLimit,
    ProviderUsage,
    Server,
    State,
    Subscription,
)
from mail_pipelines.database.upsert import add_to
from mail_pipelines.delivery import counters
from mail_pipelines.delivery.recording import ClaimRef, slot_at, windows_at
from mail_pipelines.dispatch.files import DispatchError
from mail_pipelines.dispatch.journal import Position


class WrongServer(DispatchError):
    """This process may not speak for the server: other incarnation, not active, or a database of another time."""


@dataclass(frozen=True)
class Sender:
    """Who claims: a session on a server. `newest_claim` is the last claim this server remembers, if any."""

    server_id: int
    server_key: str
    incarnation: str
    boot_id: str
    run_id: str


@dataclass(frozen=True)
class Memory:
    """What a server remembers of the database: its generation and the newest claim opened in it."""

    generation: str
    newest_claim: int | None = None


@dataclass(frozen=True)
class Row:
    """One recipient of a claim, with address and merge fields as they are now."""

    contact_id: int
    attempt: int
    email: str
    values: dict[str, Any]


@dataclass(frozen=True)
class OpenClaim:
    """A claim that was opened; `rows` may be sent until `lease_until` (database time)."""

    ref: ClaimRef
    rows: tuple[Row, ...]
    version_id: int
    lease_until: dt.datetime
    position: Position
    # The same moment on this process's monotonic clock, taken before the database was asked.
    opened: float


@dataclass(frozen=True)
class NothingClaimed:
    """No row may be sent now, and why. `retry_at` (epoch seconds): when that may change, if it is known.

    `ends_session` tells a reason that concerns the whole campaign from one that concerns one provider.
    """

    reason: str
    retry_at: float | None = None
    ends_session: bool = False


def new_id() -> int:
    """A random 63-bit claim id: unlike a counter it is never given twice, even after a restore."""
    return secrets.randbits(63)


def open_claim(
    engine: Engine,
    sender: Sender,
    memory: Memory,
    *,
    claim_id: int,
    campaign_id: int,
    shard: int,
    provider: str,
    limit: int,
    position: Position,
    lease_seconds: float,
) -> OpenClaim | NothingClaimed:
    """Lease up to `limit` rows of a shard and provider.

    Raises `WrongServer` if this process must not send at all.
    """

    def work(connection: Connection) -> OpenClaim | NothingClaimed:
        asked = time.monotonic()
        now = database_now(connection)
        _check_sender(connection, sender, memory)
        campaign = connection.execute(
            sa.select(
                Campaign.state,
                Campaign.held_reason,
                Campaign.version_id,
                Campaign.expire_at,
                Campaign.brand_id,
                Campaign.unsubscribe,
                Campaign.unsubscribe_list_id,
            )
            .where(Campaign.id == campaign_id)
            .with_for_update(read=True)
        ).one_or_none()
        if campaign is None:
            return NothingClaimed("the campaign does not exist", ends_session=True)
        if campaign.state != "sending":
            return NothingClaimed(f"the campaign is {campaign.state}", ends_session=True)
        if campaign.held_reason:
            return NothingClaimed(f"the campaign is held: {campaign.held_reason}", ends_session=True)
        if campaign.expire_at is not None and campaign.expire_at <= now:
            return NothingClaimed("the campaign has expired", ends_session=True)
        room = _room(connection, sender.server_id, campaign_id, provider, now)
        if isinstance(room, NothingClaimed):
            return room
        found = _lock_rows(connection, campaign_id, shard, provider, min(limit, room), now)
        if not found:
            return NothingClaimed("nothing is due")
        moves: Counter[counters.Place] = Counter()
        sendable = _check_recipients(connection, campaign, campaign_id, shard, provider, found, now, moves)
        if sendable:
            connection.execute(
                sa.update(Delivery)
                .where(Delivery.campaign_id == campaign_id, Delivery.contact_id.in_([row.contact_id for row in sendable]))
                .values(state=int(State.CLAIMED), claim_id=claim_id, server_id=sender.server_id, version_id=campaign.version_id)
            )
            debit = {"server_id": sender.server_id, "provider": provider}
            add_to(
                connection,
                ProviderUsage,
                [debit | {"window_seconds": length, "window_start": start, "used": len(sendable)} for length, start in windows_at(now)],
                column="used",
            )
            connection.execute(
                sa.update(Allotment)
                .where(
                    Allotment.campaign_id == campaign_id,
                    Allotment.server_id == sender.server_id,
                    Allotment.provider == provider,
                    Allotment.slot_start == slot_at(now),
                )
                .values(used=Allotment.used + len(sendable))
            )
        lease_until = now + dt.timedelta(seconds=lease_seconds)
        # A claim of which nothing is left to send is written closed: it proves to its server that the database remembers it.
        connection.execute(
            sa.insert(Claim).values(
                id=claim_id,
                campaign_id=campaign_id,
                shard=shard,
                provider=provider,
                server_id=sender.server_id,
                run_id=sender.run_id,
                size=len(sendable),
                state="open" if sendable else "closed",
                incarnation=sender.incarnation,
                boot_id=sender.boot_id,
                journal_inode=position.inode,
                journal_offset=position.offset,
                opened_at=now,
                lease_until=lease_until,
                closed_at=None if sendable else now,
            )
        )
        counters.add(connection, campaign_id, sender.server_id, moves, now)
        ref = ClaimRef(claim_id, campaign_id, shard, provider, sender.server_id, now)
        return OpenClaim(ref, tuple(sendable), campaign.version_id, lease_until, position, asked)

    return transact(engine, work)


def _check_sender(connection: Connection, sender: Sender, memory: Memory) -> None:
    remembered = sa.exists().where(Claim.id == memory.newest_claim) if memory.newest_claim is not None else sa.true()
    found = connection.execute(
        sa.select(Server.state, Server.incarnation, LedgerGeneration.generation, remembered.label("remembered"))
        .join_from(Server, LedgerGeneration, LedgerGeneration.id == 1)
        .where(Server.id == sender.server_id)
    ).one_or_none()
    if found is None:
        raise WrongServer(f"server {sender.server_key} is not registered: run `mail-pipelines server list`")
    if found.incarnation != sender.incarnation:
        raise WrongServer(f"server {sender.server_key} is known under another incarnation: a clone, or its log folder was replaced")
    if found.state != "active":
        raise WrongServer(f"server {sender.server_key} is {found.state}, not active")
    if found.generation != memory.generation or not found.remembered:
        raise WrongServer(
            f"the database went back in time: server {sender.server_key} remembers a later state of it, so rows it has mailed may look unsent. "
            "Nothing is sent until an operator has restored the ledger from the servers' journals"
        )


def _room(connection: Connection, server_id: int, campaign_id: int, provider: str, now: dt.datetime) -> int | NothingClaimed:
    """How many messages grant and limits still allow, with the rows locked in key order."""
    slot = slot_at(now)
    grant = connection.execute(
        sa.select(Allotment.granted, Allotment.used)
        .where(Allotment.campaign_id == campaign_id, Allotment.server_id == server_id, Allotment.provider == provider, Allotment.slot_start == slot)
        .with_for_update()
    ).one_or_none()
    next_slot = slot + 900
    if grant is None or grant.granted <= grant.used:
        when = dt.datetime.fromtimestamp(next_slot, dt.UTC).strftime("%H:%M UTC")
        return NothingClaimed(f"no grant before {when}", retry_at=next_slot)
    room: int = grant.granted - grant.used
    limit = connection.execute(
        sa.select(ProviderLimit.per_hour, ProviderLimit.per_day)
        .where(ProviderLimit.server_id.in_((0, server_id)), ProviderLimit.provider.in_((provider, "*")))
        .order_by(ProviderLimit.server_id.desc(), ProviderLimit.provider.desc())
        .limit(1)
    ).one_or_none()
    if limit is None:
        return NothingClaimed(f"no limits are set for {provider}: run `mail-pipelines server limits`")
    caps = {3600: limit.per_hour, 86400: limit.per_day}
    windows = [(length, start) for length, start in windows_at(now) if caps.get(length) is not None]
    if windows:
        # The rows must exist to be locked: two campaigns that meet in a new window would both see an empty one.
        usage = {"server_id": server_id, "provider": provider, "used": 0}
        add_to(connection, ProviderUsage, [usage | {"window_seconds": length, "window_start": start} for length, start in windows], column="used")
        used = {
            row.window_seconds: row.used
            for row in connection.execute(
                sa.select(ProviderUsage.window_seconds, ProviderUsage.used)
                .where(
                    ProviderUsage.server_id == server_id,
                    ProviderUsage.provider == provider,
                    sa.tuple_(ProviderUsage.window_seconds, ProviderUsage.window_start).in_(windows),
                )
                .with_for_update()
            )
        }
        for length, start in windows:
            left = caps[length] - used.get(length, 0)
            if left <= 0:
                return NothingClaimed(f"the limit of {caps[length]} in {length} s is used up", retry_at=start + length)
            room = min(room, left)
    return room


def _lock_rows(connection: Connection, campaign_id: int, shard: int, provider: str, limit: int, now: dt.datetime) -> list[Any]:
    """Due deferred rows first, then pending ones, most engaged first; rows that others hold are skipped."""
    second = int(now.timestamp())
    rows: list[Any] = []
    for state, due in (
        (State.DEFERRED, Delivery.sort_key <= second),
        (State.PENDING, sa.or_(Delivery.not_before.is_(None), Delivery.not_before <= second)),
    ):
        if len(rows) < limit:
            rows += connection.execute(
                sa.select(Delivery.contact_id, Delivery.attempt, Delivery.address_hash, Delivery.state)
                .where(Delivery.campaign_id == campaign_id, Delivery.shard == shard, Delivery.provider == provider, Delivery.state == int(state), due)
                .order_by(Delivery.sort_key)
                .limit(limit - len(rows))
                .with_for_update(skip_locked=True)
            ).all()
    return rows


def _check_recipients(
    connection: Connection,
    campaign: Any,
    campaign_id: int,
    shard: int,
    provider: str,
    found: list[Any],
    now: dt.datetime,
    moves: Counter[counters.Place],
) -> list[Row]:
    """The rows that may be mailed; the others are moved where they belong: suppressed, or back to their queue under a new address."""
    scopes = consent.campaign_scopes(campaign.brand_id, campaign.unsubscribe_list_id)
    left_list: sa.ColumnElement[bool] = sa.false()
    if campaign.unsubscribe == "list":
        left_list = sa.exists().where(
            Subscription.contact_id == Contact.id, Subscription.list_id == campaign.unsubscribe_list_id, Subscription.subscribed.is_(False)
        )
    contacts = {
        contact.id: contact
        for contact in connection.execute(
            sa.select(
                Contact.id,
                Contact.email,
                Contact.address_hash,
                Contact.provider,
                Contact.attributes,
                consent.suppressed_clause(Contact.address_hash, Contact.domain, scopes).label("suppressed"),
                left_list.label("left_list"),
            ).where(Contact.id.in_([row.contact_id for row in found]))
        )
    }
    sendable: list[Row] = []
    refused: dict[str, list[int]] = {}
    moved: list[Any] = []
    for row in found:
        source = State(row.state)
        contact = contacts.get(row.contact_id)
        reason = "erased" if contact is None else "suppressed" if contact.suppressed else "unsubscribed" if contact.left_list else None
        if reason is not None:
            refused.setdefault(reason, []).append(row.contact_id)
            moves[shard, provider, source, ""] -= 1
            moves[shard, provider, State.SUPPRESSED, reason] += 1
            continue
        assert contact is not None
        if contact.address_hash != row.address_hash:
            moved.append(row)
            continue
        sendable.append(Row(contact.id, row.attempt, contact.email, contact.attributes))
        moves[shard, provider, source, ""] -= 1
        moves[shard, provider, State.CLAIMED, ""] += 1
    for reason, contact_ids in refused.items():
        _update_rows(connection, campaign_id, contact_ids, state=int(State.SUPPRESSED), reason=reason, sort_key=int(now.timestamp()))
    if moved:
        _readdress(connection, campaign_id, shard, provider, moved, contacts, now, moves)
    return sendable


def _readdress(
    connection: Connection,
    campaign_id: int,
    shard: int,
    provider: str,
    moved: list[Any],
    contacts: dict[int, Any],
    now: dt.datetime,
    moves: Counter[counters.Place],
) -> None:
    """Rows whose contact has another address since the freeze: back into the queue of the new provider, unless that address has its own row."""
    new_hashes = [contacts[row.contact_id].address_hash for row in moved]
    taken = set(
        connection.execute(sa.select(Delivery.address_hash).where(Delivery.campaign_id == campaign_id, Delivery.address_hash.in_(new_hashes))).scalars()
    )
    duplicates = []
    for row in moved:
        contact = contacts[row.contact_id]
        source = State(row.state)
        moves[shard, provider, source, ""] -= 1
        if contact.address_hash in taken:
            duplicates.append(row.contact_id)
            moves[shard, provider, State.SUPPRESSED, "duplicate_address"] += 1
            continue
        taken.add(contact.address_hash)
        moves[shard, contact.provider, source, ""] += 1
        _update_rows(connection, campaign_id, [row.contact_id], address_hash=contact.address_hash, provider=contact.provider)
    if duplicates:
        _update_rows(connection, campaign_id, duplicates, state=int(State.SUPPRESSED), reason="duplicate_address", sort_key=int(now.timestamp()))


def _update_rows(connection: Connection, campaign_id: int, contact_ids: list[int], **values: Any) -> None:
    connection.execute(sa.update(Delivery).where(Delivery.campaign_id == campaign_id, Delivery.contact_id.in_(contact_ids)).values(**values))
