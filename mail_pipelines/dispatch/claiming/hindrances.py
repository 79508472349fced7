"""Rows that were due but may not be mailed as they are, on SQLite: they end, go back to the queue of another provider, or wait for their domain or window.

They run in the claim's own transaction, on rows that it has found, and read nothing of contacts: what they need came with the rows. The stored
procedure `claim_rows` does the same.
"""

from __future__ import annotations

import datetime as dt
from collections import Counter, defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from mail_pipelines.database.models import Delivery, State
from mail_pipelines.delivery import counters
from mail_pipelines.delivery.domain_health import NO_CONNECTION
from mail_pipelines.delivery.events import resent_among
from mail_pipelines.dispatch import windows
from mail_pipelines.dispatch.claiming.terms import Request

# The contact has another address than the one that was frozen; its domain does not answer; its send window is closed. Every other hindrance is the
# reason with which the row ends.
MOVED = "moved"
DEAD = "dead"
CLOSED = "window"
# The rows of a dead domain fall due within so many seconds after it does: no claim is then full of them, nor the domain flooded.
SPREAD_SECONDS = 60


@dataclass(frozen=True)
class Hindered:
    """A row that was due but may not be mailed as it is, and why.

    `address_hash` and `provider` are the contact's present ones if it moved; `due` (epoch seconds) is when its domain is tried again, if that is dead,
    or when it is due after its window's `opening`: zone, epoch second and reason.
    """

    contact_id: int
    source: State
    reason: str
    address_hash: bytes | None = None
    provider: str | None = None
    due: int | None = None
    opening: tuple[str, int, str] | None = None


def end(connection: Connection, request: Request, hindered: Sequence[Hindered], now: dt.datetime) -> None:
    """Move each row where it belongs, and count it there."""
    if not hindered:
        return
    moves: Counter[counters.Place] = Counter()
    refused: defaultdict[str, list[Hindered]] = defaultdict(list)
    for row in hindered:
        refused[row.reason].append(row)
    moved = refused.pop(MOVED, [])
    _postpone(connection, request, refused.pop(DEAD, []), moves)
    _put_off(connection, request, refused.pop(CLOSED, []), moves)
    if duplicates := _readdress(connection, request, moved, moves):
        refused["duplicate_address"] = duplicates
    for reason, rows in refused.items():
        _refuse(connection, request, rows, reason, now, moves)
    counters.add(connection, request.campaign_id, request.sender.server_id, moves, now)


def _readdress(connection: Connection, request: Request, rows: Sequence[Hindered], moves: Counter[counters.Place]) -> list[Hindered]:
    """Put rows under the new address into the queue of its provider; returns those whose address has a row of its own."""
    if not rows:
        return []
    present = sa.select(Delivery.address_hash).where(Delivery.campaign_id == request.campaign_id, Delivery.address_hash.in_([row.address_hash for row in rows]))
    used: set[bytes | None] = set(connection.execute(present).scalars())
    duplicates: list[Hindered] = []
    ours: list[Hindered] = []
    for row in rows:
        (duplicates if row.address_hash in used else ours).append(row)
        used.add(row.address_hash)
    for row in ours:
        moves[request.shard, request.provider, row.source, ""] -= 1
        moves[request.shard, str(row.provider), row.source, ""] += 1
    if ours:
        hashes = sa.case({row.contact_id: row.address_hash for row in ours}, value=Delivery.contact_id)
        providers = sa.case({row.contact_id: row.provider for row in ours}, value=Delivery.contact_id)
        # What the old address was answered says nothing about the new one, above all not that it is greylisted.
        answer = {"code": None, "enhanced": None, "reason": None}
        _update(connection, request, [row.contact_id for row in ours], address_hash=hashes, provider=providers, **answer)
    return duplicates


def _postpone(connection: Connection, request: Request, rows: Sequence[Hindered], moves: Counter[counters.Place]) -> None:
    """Defer rows whose domain does not answer until it is tried again. They were not offered, so this is no outcome and no attempt."""
    by_due: defaultdict[int, list[Hindered]] = defaultdict(list)
    for row in rows:
        assert row.due is not None
        by_due[row.due].append(row)
        moves[request.shard, request.provider, row.source, ""] -= 1
        moves[request.shard, request.provider, State.DEFERRED, ""] += 1
    for due, waiting in sorted(by_due.items()):
        spread = due + Delivery.contact_id % SPREAD_SECONDS
        values = {"state": int(State.DEFERRED), "sort_key": spread, "code": None, "enhanced": None, "reason": NO_CONNECTION}
        _update(connection, request, [row.contact_id for row in waiting], **values)


def _put_off(connection: Connection, request: Request, rows: Sequence[Hindered], moves: Counter[counters.Place]) -> None:
    """Defer rows until their window opens, and count them there. They were not offered, so this is no outcome and no attempt."""
    by_end: defaultdict[tuple[int, str], list[Hindered]] = defaultdict(list)
    waiting: Counter[windows.Place] = Counter()
    for row in rows:
        assert row.due is not None
        assert row.opening is not None
        zone, opening, reason = row.opening
        by_end[row.due, reason].append(row)
        waiting[request.provider, zone, opening] += 1
        moves[request.shard, request.provider, row.source, ""] -= 1
        moves[request.shard, request.provider, State.DEFERRED, ""] += 1
    for (due, reason), late in sorted(by_end.items()):
        values = {"state": int(State.DEFERRED), "sort_key": due, "code": None, "enhanced": None, "reason": reason}
        _update(connection, request, [row.contact_id for row in late], **values)
    windows.count(connection, request.campaign_id, waiting)


def _refuse(connection: Connection, request: Request, rows: Sequence[Hindered], reason: str, now: dt.datetime, moves: Counter[counters.Place]) -> None:
    """End rows that must not be mailed: suppressed, or unresolved where an earlier copy may have arrived."""
    twice = resent_among(connection, request.campaign_id, [row.contact_id for row in rows])
    for target, ended in (
        (State.UNRESOLVED, [row for row in rows if row.contact_id in twice]),
        (State.SUPPRESSED, [row for row in rows if row.contact_id not in twice]),
    ):
        if ended:
            for row in ended:
                moves[request.shard, request.provider, row.source, ""] -= 1
                moves[request.shard, request.provider, target, reason] += 1
            _update(connection, request, [row.contact_id for row in ended], state=int(target), reason=reason, sort_key=int(now.timestamp()))


def _update(connection: Connection, request: Request, contact_ids: Collection[int], **values: Any) -> None:
    ours = (Delivery.campaign_id == request.campaign_id, Delivery.contact_id.in_(sorted(contact_ids)))
    connection.execute(sa.update(Delivery).where(*ours).values(**values))
