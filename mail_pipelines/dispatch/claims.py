"""Claims: leasing a few seconds' worth of ledger rows of one provider to one sender, in one short transaction.

The transaction checks everything that could make a message wrong at this moment: the campaign is sending, the server is
the one it says, the database has not gone back in time, limits and grant leave room, and the recipient still exists,
is not suppressed and has the address that was frozen.
"""

from __future__ import annotations

import datetime as dt
import functools
import secrets
import time
from collections import Counter, defaultdict
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine

from mail_pipelines.contacts import consent
from mail_pipelines.database.engine import transact
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
from mail_pipelines.database.types import utc_now
from mail_pipelines.database.upsert import add_to
from mail_pipelines.delivery import counters
from mail_pipelines.delivery.events import resent_among
from mail_pipelines.delivery.recording import SLOT_SECONDS, ClaimRef, slot_at, windows_at
from mail_pipelines.dispatch.files import DispatchError
from mail_pipelines.dispatch.journal import Position

# The statements are built once: building one costs more than running it, and a claim runs a dozen, many times a second.
_CAMPAIGN = (
    sa.select(
        Campaign.state,
        Campaign.held_reason,
        Campaign.version_id,
        Campaign.expire_at,
        Campaign.brand_id,
        Campaign.unsubscribe,
        Campaign.unsubscribe_list_id,
    )
    .where(Campaign.id == sa.bindparam("campaign_id"))
    .with_for_update(read=True)
)
_SENDER = (
    sa.select(
        Server.state,
        Server.incarnation,
        LedgerGeneration.generation,
        sa.or_(sa.bindparam("newest_claim", type_=sa.BigInteger).is_(None), sa.exists().where(Claim.id == sa.bindparam("newest_claim"))).label("remembered"),
        utc_now().label("now"),
        ProviderLimit.provider.label("limits_of"),
        ProviderLimit.per_hour,
        ProviderLimit.per_day,
    )
    .join_from(Server, LedgerGeneration, LedgerGeneration.id == 1)
    .outerjoin(ProviderLimit, sa.and_(ProviderLimit.server_id.in_((0, Server.id)), ProviderLimit.provider.in_((sa.bindparam("provider"), "*"))))
    .where(Server.id == sa.bindparam("server_id"))
    # The limits that fit best: the server's own before those of all, the provider's before those of any.
    .order_by(ProviderLimit.server_id.desc(), ProviderLimit.provider.desc())
    .limit(1)
)
_OUR_GRANT = (
    Allotment.campaign_id == sa.bindparam("campaign"),
    Allotment.server_id == sa.bindparam("server"),
    Allotment.provider == sa.bindparam("to"),
    Allotment.slot_start == sa.bindparam("slot"),
)
_GRANT = sa.select(Allotment.granted, Allotment.used).where(*_OUR_GRANT).with_for_update()
_SPEND = sa.update(Allotment).where(*_OUR_GRANT).values(used=Allotment.used + sa.bindparam("spent"))
_USED = (
    sa.select(ProviderUsage.window_seconds, ProviderUsage.window_start, ProviderUsage.used)
    .where(
        ProviderUsage.server_id == sa.bindparam("server_id"),
        ProviderUsage.provider == sa.bindparam("provider"),
        ProviderUsage.window_seconds.in_(sa.bindparam("lengths", expanding=True)),
        ProviderUsage.window_start.in_(sa.bindparam("starts", expanding=True)),
    )
    .with_for_update()
)


def _due(state: State, condition: sa.ColumnElement[bool]) -> Any:
    return (
        sa.select(Delivery.contact_id)
        .where(
            Delivery.campaign_id == sa.bindparam("campaign_id"),
            Delivery.shard == sa.bindparam("shard"),
            Delivery.provider == sa.bindparam("provider"),
            Delivery.state == int(state),
            condition,
        )
        .order_by(Delivery.sort_key)
        .limit(sa.bindparam("most"))
        .with_for_update(skip_locked=True)
    )


# Deferred rows that are due first, then pending ones; rows that others hold are skipped.
_ROWS = {
    State.DEFERRED: _due(State.DEFERRED, Delivery.sort_key <= sa.bindparam("second")),
    State.PENDING: _due(State.PENDING, sa.or_(Delivery.not_before.is_(None), Delivery.not_before <= sa.bindparam("second"))),
}
_TAKE = (
    sa.update(Delivery)
    .where(Delivery.campaign_id == sa.bindparam("campaign"), Delivery.contact_id.in_(sa.bindparam("contacts", expanding=True)))
    .values(state=int(State.CLAIMED), claim_id=sa.bindparam("claim"), server_id=sa.bindparam("server"), version_id=sa.bindparam("version"))
)
_OPEN = sa.insert(Claim)
_MOVED = "moved"


@functools.lru_cache(maxsize=256)
def _recipients(brand_id: int, list_id: int | None, of_list: bool) -> Any:
    """Contacts as they are now with their row of the ledger, and why a campaign of this brand (and list) may not mail them as they are.

    The database compares, so that as little as possible has to travel and to be parsed for each recipient. The outer join makes it begin
    with the contacts: MariaDB would begin with the ledger and read the whole campaign (29 ms instead of 1).
    """
    left_list: sa.ColumnElement[bool] = sa.false()
    if of_list:
        left_list = sa.exists().where(Subscription.contact_id == Contact.id, Subscription.list_id == list_id, Subscription.subscribed.is_(False))
    hindrance = sa.case(
        (consent.suppressed_clause(Contact.address_hash, Contact.domain, consent.campaign_scopes(brand_id, list_id)), "suppressed"),
        (left_list, "unsubscribed"),
        (Contact.address_hash != Delivery.address_hash, _MOVED),
    )
    return (
        sa.select(Contact.id, Delivery.attempt, Contact.email, Contact.attributes, hindrance.label("hindrance"))
        .outerjoin_from(Contact, Delivery, sa.and_(Delivery.campaign_id == sa.bindparam("campaign"), Delivery.contact_id == Contact.id))
        .where(Contact.id.in_(sa.bindparam("contacts", expanding=True)))
    )


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
        state = _check_sender(connection, sender, memory, provider)
        now = state.now
        campaign = connection.execute(_CAMPAIGN, {"campaign_id": campaign_id}).one_or_none()
        if campaign is None:
            return NothingClaimed("the campaign does not exist", ends_session=True)
        if campaign.state != "sending":
            return NothingClaimed(f"the campaign is {campaign.state}", ends_session=True)
        if campaign.held_reason:
            return NothingClaimed(f"the campaign is held: {campaign.held_reason}", ends_session=True)
        if campaign.expire_at is not None and campaign.expire_at <= now:
            return NothingClaimed("the campaign has expired", ends_session=True)
        room = _room(connection, state, sender.server_id, campaign_id, provider)
        if isinstance(room, NothingClaimed):
            return room
        taken = _lock_rows(connection, campaign_id, shard, provider, min(limit, room), now)
        if not taken.states:
            return NothingClaimed("nothing is due")
        sendable = _check_recipients(connection, campaign, taken)
        if sendable:
            take = {"campaign": campaign_id, "contacts": [row.contact_id for row in sendable], "claim": claim_id}
            connection.execute(_TAKE, take | {"server": sender.server_id, "version": campaign.version_id})
            debit = {"server_id": sender.server_id, "provider": provider, "used": len(sendable)}
            add_to(connection, ProviderUsage, [debit | {"window_seconds": length, "window_start": start} for length, start in windows_at(now)], column="used")
            spend = {"campaign": campaign_id, "server": sender.server_id, "to": provider, "slot": slot_at(now), "spent": len(sendable)}
            connection.execute(_SPEND, spend)
        lease_until = now + dt.timedelta(seconds=lease_seconds)
        # A claim of which nothing is left to send is written closed: it proves to its server that the database remembers it.
        connection.execute(
            _OPEN,
            {
                "id": claim_id,
                "campaign_id": campaign_id,
                "shard": shard,
                "provider": provider,
                "server_id": sender.server_id,
                "run_id": sender.run_id,
                "size": len(sendable),
                "state": "open" if sendable else "closed",
                "incarnation": sender.incarnation,
                "boot_id": sender.boot_id,
                "journal_inode": position.inode,
                "journal_offset": position.offset,
                "opened_at": now,
                "lease_until": lease_until,
                "closed_at": None if sendable else now,
            },
        )
        counters.add(connection, campaign_id, sender.server_id, taken.moves, now)
        ref = ClaimRef(claim_id, campaign_id, shard, provider, sender.server_id, now)
        return OpenClaim(ref, tuple(sendable), campaign.version_id, lease_until, position, asked)

    return transact(engine, work)


def _check_sender(connection: Connection, sender: Sender, memory: Memory, provider: str) -> Any:
    """The server's row with its limits for the provider and the database's time; raises `WrongServer` if this process must not speak for it."""
    place = {"server_id": sender.server_id, "newest_claim": memory.newest_claim, "provider": provider}
    found = connection.execute(_SENDER, place).one_or_none()
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
    return found


def _room(connection: Connection, limits: Any, server_id: int, campaign_id: int, provider: str) -> int | NothingClaimed:
    """How many messages grant and limits still allow, with the rows locked in key order."""
    now: dt.datetime = limits.now
    slot = slot_at(now)
    grant = connection.execute(_GRANT, {"campaign": campaign_id, "server": server_id, "to": provider, "slot": slot}).one_or_none()
    next_slot = slot + SLOT_SECONDS
    if grant is None or grant.granted <= grant.used:
        when = dt.datetime.fromtimestamp(next_slot, dt.UTC).strftime("%H:%M UTC")
        return NothingClaimed(f"no grant before {when}", retry_at=next_slot)
    room: int = grant.granted - grant.used
    place = {"server_id": server_id, "provider": provider}
    if limits.limits_of is None:
        return NothingClaimed(f"no limits are set for {provider}: run `mail-pipelines server limits`")
    caps = {3600: limits.per_hour, 86400: limits.per_day}
    windows = [(length, start) for length, start in windows_at(now) if caps.get(length) is not None]
    if windows:
        # The rows must exist to be locked: two campaigns that meet in a new window would both see an empty one.
        add_to(connection, ProviderUsage, [place | {"window_seconds": length, "window_start": start, "used": 0} for length, start in windows], column="used")
        lengths, starts = (list(values) for values in zip(*windows, strict=True))
        rows = connection.execute(_USED, place | {"lengths": lengths, "starts": starts})
        used = {(row.window_seconds, row.window_start): row.used for row in rows}
        for length, start in windows:
            left = caps[length] - used[length, start]
            if left <= 0:
                return NothingClaimed(f"the limit of {caps[length]} in {length} s is used up", retry_at=start + length)
            room = min(room, left)
    return room


@dataclass
class _Taken:
    """Rows that this transaction has locked: where each comes from, and the moves to count."""

    campaign_id: int
    shard: int
    provider: str
    now: dt.datetime
    # In the order in which they are to be sent.
    states: dict[int, State] = field(default_factory=dict)
    moves: Counter[counters.Place] = field(default_factory=Counter)

    def count(self, contact_ids: Collection[int], target: State | None, reason: str = "", provider: str | None = None) -> None:
        """Note that rows go to `target` (None: they keep their state), of `provider` if that changes."""
        for source, rows in Counter(map(self.states.__getitem__, contact_ids)).items():
            self.moves[self.shard, self.provider, source, ""] -= rows
            self.moves[self.shard, provider or self.provider, source if target is None else target, reason] += rows


def _lock_rows(connection: Connection, campaign_id: int, shard: int, provider: str, limit: int, now: dt.datetime) -> _Taken:
    """The next rows, most engaged first among the pending."""
    taken = _Taken(campaign_id, shard, provider, now)
    queue = {"campaign_id": campaign_id, "shard": shard, "provider": provider, "second": int(now.timestamp())}
    for state, statement in _ROWS.items():
        if len(taken.states) < limit:
            found = connection.execute(statement, queue | {"most": limit - len(taken.states)}).scalars()
            taken.states.update(dict.fromkeys(found, state))
    return taken


def _check_recipients(connection: Connection, campaign: Any, taken: _Taken) -> list[Row]:
    """The rows that may be mailed; the others are moved where they belong: suppressed, or back to their queue under a new address."""
    statement = _recipients(campaign.brand_id, campaign.unsubscribe_list_id, campaign.unsubscribe == "list")
    rows = connection.execute(statement, {"campaign": taken.campaign_id, "contacts": list(taken.states)})
    found = {contact_id: (attempt, email, attributes, hindrance) for contact_id, attempt, email, attributes, hindrance in rows}
    sendable: list[Row] = []
    hindered: defaultdict[str, list[int]] = defaultdict(list)
    for contact_id in taken.states:
        attempt, email, attributes, hindrance = found.get(contact_id, (0, "", None, "erased"))
        if hindrance is None:
            sendable.append(Row(contact_id, attempt, email, attributes))
        else:
            hindered[hindrance].append(contact_id)
    taken.count([row.contact_id for row in sendable], State.CLAIMED)
    if moved := hindered.pop(_MOVED, None):
        _readdress(connection, taken, moved)
    for reason, contact_ids in hindered.items():
        _refuse(connection, taken, contact_ids, reason)
    return sendable


def _readdress(connection: Connection, taken: _Taken, contact_ids: list[int]) -> None:
    """Rows whose contact has another address since the freeze: back into the queue of the new provider, unless that address has its own row."""
    contacts = connection.execute(sa.select(Contact.id, Contact.address_hash, Contact.provider).where(Contact.id.in_(contact_ids)).order_by(Contact.id)).all()
    hashes = [contact.address_hash for contact in contacts]
    present = sa.select(Delivery.address_hash).where(Delivery.campaign_id == taken.campaign_id, Delivery.address_hash.in_(hashes))
    used = set(connection.execute(present).scalars())
    duplicates = []
    # A contact erased at this moment is not among them: its row stays in the queue, and the next claim ends it.
    for contact in contacts:
        if contact.address_hash in used:
            duplicates.append(contact.id)
            continue
        used.add(contact.address_hash)
        taken.count([contact.id], None, provider=contact.provider)
        _update_rows(connection, taken.campaign_id, [contact.id], address_hash=contact.address_hash, provider=contact.provider)
    if duplicates:
        _refuse(connection, taken, duplicates, "duplicate_address")


def _refuse(connection: Connection, taken: _Taken, contact_ids: list[int], reason: str) -> None:
    """End rows that must not be mailed: suppressed, or unresolved where an earlier copy may have arrived."""
    twice = resent_among(connection, taken.campaign_id, contact_ids)
    for end, ended in ((State.UNRESOLVED, twice), (State.SUPPRESSED, set(contact_ids) - twice)):
        if ended:
            taken.count(ended, end, reason)
            _update_rows(connection, taken.campaign_id, sorted(ended), state=int(end), reason=reason, sort_key=int(taken.now.timestamp()))


def _update_rows(connection: Connection, campaign_id: int, contact_ids: list[int], **values: Any) -> None:
    connection.execute(sa.update(Delivery).where(Delivery.campaign_id == campaign_id, Delivery.contact_id.in_(contact_ids)).values(**values))
