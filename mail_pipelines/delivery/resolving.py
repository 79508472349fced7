"""Ending rows in doubt: later evidence or a decision by hand turns `unknown` into what became of the message.

What belongs here: the guarded, set-based change of the ledger with its counters, events and suppressions. What does not: where the
evidence comes from (`dispatch.audit` reads journals), and who decides (`campaigns.resolving`).
"""

from __future__ import annotations

import datetime as dt
import operator
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from mail_pipelines.contacts.sets import insert_if_absent
from mail_pipelines.database.models import Campaign, Delivery, DeliveryEvent, State
from mail_pipelines.database.types import enhanced_number
from mail_pipelines.delivery import counters
from mail_pipelines.delivery.events import RESOLVED, event_id, mask_addresses
from mail_pipelines.delivery.evidence import ARCHIVED
from mail_pipelines.delivery.recording import Result, suppress_bounced, write_events
from mail_pipelines.delivery.transitions import may_move


@dataclass(frozen=True)
class Source:
    """Where a resolution comes from: `name` is kept as the event's reason (at most 24 characters), `words` as its text."""

    name: str
    words: str = ""
    # Tells decisions about the same message apart. Evidence has none: reading it twice is one event.
    number: str = ""


def resolve(connection: Connection, campaign_id: int, server_id: int, results: Sequence[Result], source: Source, now: dt.datetime) -> Counter[State]:
    """Move rows that are unknown, under the attempt the results name, to what is known now; returns how many went where.

    At most a few thousand results, each of another contact. Rows in another state or of another attempt are left alone, so doing it twice
    changes nothing. A deferral raises the attempt, as it does when it is recorded at once. Everything counts for `server_id`.
    """
    return _end(connection, campaign_id, server_id, results, source, now, (State.UNKNOWN,), operator.eq)


def recover(connection: Connection, campaign_id: int, server_id: int, results: Sequence[Result], source: Source, at: dt.datetime) -> Counter[State]:
    """The same for a ledger that has forgotten offers: rows that wait or are unknown get the end of an offer of their attempt or a later one.

    `at` is when the offers were made.
    """
    return _end(connection, campaign_id, server_id, results, source, at, (State.PENDING, State.DEFERRED, State.UNKNOWN), operator.le)


def _end(
    connection: Connection,
    campaign_id: int,
    server_id: int,
    results: Sequence[Result],
    source: Source,
    now: dt.datetime,
    states: Collection[State],
    fits: Callable[[int, int], bool],
) -> Counter[State]:
    """Give rows in one of `states` their ends, where the row's attempt `fits` that of its result."""
    wanted = {result.contact_id: result for result in results}
    columns = (Delivery.contact_id, Delivery.state, Delivery.attempt, Delivery.shard, Delivery.provider)
    ours = (Delivery.campaign_id == campaign_id, Delivery.contact_id.in_(sorted(wanted)), Delivery.state.in_(sorted(map(int, states))))
    found = connection.execute(sa.select(*columns).where(*ours).order_by(Delivery.contact_id).with_for_update())
    rows = [row for row in found if fits(row.attempt, wanted[row.contact_id].attempt)]
    groups: defaultdict[tuple[State, Result], list[int]] = defaultdict(list)
    moves: Counter[counters.Place] = Counter()
    for row in rows:
        result = wanted[row.contact_id]
        groups[State(row.state), replace(result, contact_id=0, text="", suppress=False)].append(row.contact_id)
        moves[row.shard, row.provider, State(row.state), ""] -= 1
        moves[row.shard, row.provider, result.state, result.reason] += 1
    for (before, end), contact_ids in groups.items():
        if not may_move(before, end.state):
            raise ValueError(f"a row that is {before.name.lower()} cannot become {end.state.name.lower()}")
        values: dict[str, Any] = {"state": int(end.state), "code": end.code, "enhanced": end.enhanced, "reason": end.reason or None}
        if end.state is State.DEFERRED:
            values |= {"sort_key": end.due, "attempt": end.attempt + end.asked, "claim_id": None}
        else:
            values |= {"sort_key": int(now.timestamp()), "attempt": end.attempt}
        if before is not State.UNKNOWN:
            values |= {"server_id": server_id}
        _update(connection, campaign_id, before, contact_ids, values)
    ended = [wanted[row.contact_id] for row in rows]
    counters.add(connection, campaign_id, server_id, moves, now)
    write_events(connection, campaign_id, server_id, ended, now)
    note(connection, campaign_id, server_id, [(result.contact_id, result.attempt) for result in ended], source, now)
    suppress_bounced(connection, campaign_id, [row.contact_id for row in rows if wanted[row.contact_id].suppress], now)
    return Counter(result.state for result in ended)


def note(connection: Connection, campaign_id: int, server_id: int, messages: Sequence[tuple[int, int]], source: Source, now: dt.datetime) -> None:
    """Remember for each message (contact, attempt) what ended its doubt."""
    rows = [
        {
            "month": now.year * 100 + now.month,
            "id": event_id(campaign_id, contact_id, attempt, RESOLVED + source.number),
            "occurred_at": now,
            "server_id": server_id,
            "campaign_id": campaign_id,
            "contact_id": contact_id,
            "attempt": attempt,
            "kind": RESOLVED,
            "reason": source.name,
            "text": mask_addresses(source.words)[:500] or None,
        }
        for contact_id, attempt in messages
    ]
    if rows:
        connection.execute(insert_if_absent(DeliveryEvent), rows)


def complete(connection: Connection, campaign_id: int, server_id: int, results: Sequence[Result], now: dt.datetime) -> int:
    """Give bounces that were recorded by our own server's words those of the destination: code, reason, event, suppression. Returns how many.

    At most a few thousand results, all bounces. Rows that say the same already, or are no bounce of this attempt, are left alone; so is an archived ledger.
    """
    state = connection.execute(sa.select(Campaign.state).where(Campaign.id == campaign_id).with_for_update(read=True)).scalar_one_or_none()
    if state == ARCHIVED:
        return 0
    wanted = {result.contact_id: result for result in results}
    columns = (Delivery.contact_id, Delivery.attempt, Delivery.provider, Delivery.code, Delivery.enhanced, Delivery.reason)
    bounced = (Delivery.campaign_id == campaign_id, Delivery.contact_id.in_(sorted(wanted)), Delivery.state == int(State.BOUNCED))
    found = connection.execute(sa.select(*columns).where(*bounced).with_for_update())
    rows = [row for row in found if row.attempt == wanted[row.contact_id].attempt and _codes(row) != _codes(wanted[row.contact_id])]
    if not rows:
        return 0
    groups: defaultdict[tuple[int | None, str | None, str], list[int]] = defaultdict(list)
    reasons: Counter[tuple[str, str]] = Counter()
    for row in rows:
        result = wanted[row.contact_id]
        groups[result.code, result.enhanced, result.reason].append(row.contact_id)
        reasons[row.provider, row.reason or ""] -= 1
        reasons[row.provider, result.reason] += 1
    for (code, enhanced, reason), contact_ids in groups.items():
        _update(connection, campaign_id, State.BOUNCED, contact_ids, {"code": code, "enhanced": enhanced, "reason": reason or None})
    counters.change_reasons(connection, campaign_id, server_id, State.BOUNCED, reasons, now)
    ours = (DeliveryEvent.campaign_id == campaign_id, DeliveryEvent.contact_id.in_([row.contact_id for row in rows]), DeliveryEvent.kind == "bounced")
    connection.execute(sa.delete(DeliveryEvent).where(*ours))
    write_events(connection, campaign_id, server_id, [wanted[row.contact_id] for row in rows], now)
    suppress_bounced(connection, campaign_id, [row.contact_id for row in rows if wanted[row.contact_id].suppress], now)
    return len(rows)


def _codes(row: Any) -> tuple[int, int]:
    """Both codes as the ledger can hold them."""
    return row.code or 0, enhanced_number(row.enhanced)


def _update(connection: Connection, campaign_id: int, state: State, contact_ids: Collection[int], values: Mapping[str, Any]) -> None:
    ours = (Delivery.campaign_id == campaign_id, Delivery.contact_id.in_(sorted(contact_ids)), Delivery.state == int(state))
    connection.execute(sa.update(Delivery).where(*ours).values(**values))
