"""Writing the results of a claim into the ledger: guarded, set-based, in one transaction with counters, events and suppressions.

Nothing here reads a journal or talks SMTP: it gets the end state of every row of a claim and writes them all, or none.
"""

from __future__ import annotations

import datetime as dt
import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from mail_pipelines.contacts import consent
from mail_pipelines.contacts.sets import insert_if_absent
from mail_pipelines.database.engine import is_mysql
from mail_pipelines.database.models import Allotment, Campaign, Claim, Delivery, DeliveryEvent, ProviderUsage, State
from mail_pipelines.database.procedures.calling import call
from mail_pipelines.database.types import utc_now
from mail_pipelines.delivery import counters
from mail_pipelines.delivery.classes import GREYLISTED
from mail_pipelines.delivery.events import BOUNCED, DEFERRED, event_id, mask_addresses, resent_among
from mail_pipelines.delivery.transitions import may_move
from mail_pipelines.errors import MailPipelinesError

# Windows in which what a server sends to a provider is counted (s).
USAGE_WINDOWS = (900, 3600, 86400)
SLOT_SECONDS = 900

# The statements are built once: building one costs more than running it.
_CLOSE = sa.update(Claim).where(Claim.id == sa.bindparam("claim"), Claim.state == sa.bindparam("before")).values(state="closed", closed_at=sa.bindparam("now"))
_CAMPAIGN_STATE = sa.select(Campaign.state, utc_now().label("now")).where(Campaign.id == sa.bindparam("campaign")).with_for_update(read=True)
_OURS = (
    Delivery.campaign_id == sa.bindparam("campaign"),
    Delivery.contact_id.in_(sa.bindparam("contacts", expanding=True)),
    Delivery.claim_id == sa.bindparam("claim"),
    Delivery.state == int(State.CLAIMED),
)
_OUR_ROWS = sa.update(Delivery).where(*_OURS)
# A released row that was deferred before is due at once; its sort key was left alone by the claim. A greylisting is no attempt, but its row goes on waiting
# for its server, which only a deferred one does.
_WAS_DEFERRED = sa.or_(Delivery.attempt > 0, Delivery.reason == GREYLISTED)
_RELEASE = _OUR_ROWS.values(claim_id=None, state=sa.case((_WAS_DEFERRED, int(State.DEFERRED)), else_=int(State.PENDING)))
_ONLY_GREYLISTED = sa.select(sa.func.count()).where(*_OURS, Delivery.attempt == 0, Delivery.reason == GREYLISTED)
_END = _OUR_ROWS.values(
    claim_id=sa.bindparam("kept_claim"),
    state=sa.bindparam("to"),
    code=sa.bindparam("reply"),
    enhanced=sa.bindparam("extended"),
    reason=sa.bindparam("why"),
    sort_key=sa.bindparam("key"),
    attempt=Delivery.attempt + sa.bindparam("more"),
)


class LedgerConflict(MailPipelinesError):
    """The ledger is not as this claim left it: somebody else has settled it. The sender must stop."""


@dataclass(frozen=True)
class Result:
    """The end of one row of a claim. `due` (epoch seconds) belongs to a deferral; a released row is PENDING and keeps its place.

    `asked` is false for a deferral that is no attempt (no answer of the destination, or greylisting): the next offer is the same message.
    """

    contact_id: int
    attempt: int
    state: State
    code: int | None = None
    enhanced: str | None = None
    reason: str = ""
    due: int | None = None
    text: str = ""
    suppress: bool = False
    asked: bool = True


@dataclass(frozen=True)
class ClaimRef:
    """What recording needs to know of a claim."""

    id: int
    campaign_id: int
    shard: int
    provider: str
    server_id: int
    opened_at: dt.datetime


def record(connection: Connection, claim: ClaimRef, results: Sequence[Result], *, claim_state: str) -> Counter[State]:
    """Close a claim that is in `claim_state` (open, or settling) with the results of all its rows; returns how many went where.

    Raises `LedgerConflict`, and so changes nothing, unless the claim and every row are still as claimed.
    """
    campaign_state, now = connection.execute(_CAMPAIGN_STATE, {"campaign": claim.campaign_id}).one()
    closed = connection.execute(_CLOSE, {"claim": claim.id, "before": claim_state, "now": now})
    if closed.rowcount != 1:
        raise LedgerConflict(f"claim {claim.id} is no longer {claim_state}: another process has settled it")
    if campaign_state == "cancelled":
        results = _after_cancel(connection, claim, results)
    released = [result for result in results if result.state is State.PENDING]

    groups: defaultdict[_End, list[int]] = defaultdict(list)
    for result in results:
        groups[_End(result.state, result.code, result.enhanced, result.reason, result.due, result.asked)].append(result.contact_id)
    for end, contact_ids in sorted(groups.items(), key=lambda item: item[1][0]):
        changed = _move(connection, claim, end, sorted(contact_ids), now)
        if changed != len(contact_ids):
            raise LedgerConflict(f"claim {claim.id}: {changed} of {len(contact_ids)} rows were still claimed")
    ends: Counter[State] = Counter()
    moves: Counter[counters.Place] = Counter({(claim.shard, claim.provider, State.CLAIMED, ""): -len(results)})
    for end, contact_ids in groups.items():
        ends[end.state] += len(contact_ids)
        moves[claim.shard, claim.provider, end.state, end.reason] += len(contact_ids)
    if ends[State.PENDING]:
        # Those deferred before go back to being that (`_release` has counted those that were only greylisted). A release is no outcome: without a reason it
        # does not count in the minute as a deferral does.
        deferred = sum(result.attempt > 0 for result in released)
        moves[claim.shard, claim.provider, State.PENDING, ""] -= deferred
        moves[claim.shard, claim.provider, State.DEFERRED, ""] += deferred
    counters.add(connection, claim.campaign_id, claim.server_id, moves, now)
    write_events(connection, claim.campaign_id, claim.server_id, results, now)
    hard = [result.contact_id for result in results if result.suppress]
    suppress_bounced(connection, claim.campaign_id, hard, now)
    return ends


class _End(NamedTuple):
    """What rows that are moved together have in common."""

    state: State
    code: int | None
    enhanced: str | None
    reason: str
    due: int | None
    asked: bool


def _move(connection: Connection, claim: ClaimRef, end: _End, contact_ids: list[int], now: dt.datetime) -> int:
    """Move rows of the claim to one end; returns how many were still the claim's."""
    state = end.state
    if not may_move(State.CLAIMED, state):
        raise ValueError(f"a claimed row cannot become {state.name.lower()}")
    rows = {"campaign": claim.campaign_id, "contacts": contact_ids, "claim": claim.id}
    if state is State.PENDING:
        return _release(connection, claim, contact_ids, now)
    values = {
        "kept_claim": None if state in (State.DEFERRED, State.CANCELLED) else claim.id,
        "to": int(state),
        "reply": end.code,
        "extended": end.enhanced,
        "why": end.reason or None,
        "key": end.due if state is State.DEFERRED else int(now.timestamp()),
        # An explicit refusal ends an attempt; silence does not, so that a retry carries the same Message-ID.
        "more": 1 if state is State.DEFERRED and end.asked else 0,
    }
    return connection.execute(_END, rows | values).rowcount


def _after_cancel(connection: Connection, claim: ClaimRef, results: Sequence[Result]) -> list[Result]:
    """Nothing goes back to a queue of a cancelled campaign. Who was sent it again is not cancelled: the first copy may have arrived."""
    waiting = {result.contact_id for result in results if result.state in (State.PENDING, State.DEFERRED)}
    twice = resent_among(connection, claim.campaign_id, waiting)
    return [
        replace(
            result,
            state=State.UNRESOLVED if result.contact_id in twice else State.CANCELLED,
            reason="campaign_cancelled",
            due=None,
            text="",
        )
        if result.contact_id in waiting
        else result
        for result in results
    ]


def windows_at(moment: dt.datetime) -> list[tuple[int, int]]:
    """The usage windows that contain a moment: (length in s, start in epoch seconds)."""
    second = int(moment.timestamp())
    return [(length, second - second % length) for length in USAGE_WINDOWS]


def slot_at(moment: dt.datetime) -> int:
    """The start (epoch seconds) of the allotment slot that contains a moment."""
    second = int(moment.timestamp())
    return second - second % SLOT_SECONDS


def _release(connection: Connection, claim: ClaimRef, contact_ids: list[int], now: dt.datetime) -> int:
    """Give rows that were not offered back to their queue, and their debit where its windows are still open; how many were still the claim's."""
    if is_mysql(connection):
        [[[released]]] = call(connection, "release_rows", (claim.id, claim.server_id, json.dumps(contact_ids)))
        return int(released)
    rows = {"campaign": claim.campaign_id, "contacts": contact_ids, "claim": claim.id}
    greylisted = connection.execute(_ONLY_GREYLISTED, rows).scalar_one()
    released = connection.execute(_RELEASE, rows).rowcount
    moves = {(claim.shard, claim.provider, State.PENDING, ""): -greylisted, (claim.shard, claim.provider, State.DEFERRED, ""): greylisted}
    counters.add(connection, claim.campaign_id, claim.server_id, moves, now)
    _refund(connection, claim, released, now)
    return released


def suppress_bounced(connection: Connection, campaign_id: int, contact_ids: Sequence[int], now: dt.datetime) -> None:
    """Suppress the addresses of rows that are bounced now."""
    if not contact_ids:
        return
    if is_mysql(connection):
        # Of any server whose rows this account may record.
        call(connection, "suppress_bounced", (campaign_id, None, json.dumps(list(contact_ids))))
        return
    bounced = (Delivery.campaign_id == campaign_id, Delivery.contact_id.in_(contact_ids), Delivery.state == int(State.BOUNCED))
    hashes = connection.execute(sa.select(Delivery.address_hash).where(*bounced)).scalars()
    consent.suppress(connection, list(hashes), reason="bounce", now=now)


def _refund(connection: Connection, claim: ClaimRef, count: int, now: dt.datetime) -> None:
    """Give back the debit of messages that were not offered, in the windows that are still open."""
    current = set(windows_at(now))
    for length, start in windows_at(claim.opened_at):
        if (length, start) in current:
            connection.execute(
                sa.update(ProviderUsage)
                .where(
                    ProviderUsage.server_id == claim.server_id,
                    ProviderUsage.provider == claim.provider,
                    ProviderUsage.window_seconds == length,
                    ProviderUsage.window_start == start,
                )
                .values(used=ProviderUsage.used - count)
            )
    if slot_at(claim.opened_at) == slot_at(now):
        connection.execute(
            sa.update(Allotment)
            .where(
                Allotment.campaign_id == claim.campaign_id,
                Allotment.server_id == claim.server_id,
                Allotment.provider == claim.provider,
                Allotment.slot_start == slot_at(now),
            )
            .values(used=Allotment.used - count)
        )


def write_events(connection: Connection, campaign_id: int, server_id: int, results: Iterable[Result], now: dt.datetime) -> None:
    """Keep what destinations said, for every outcome but plain delivery (which the ledger row itself says)."""
    kinds = {State.BOUNCED: BOUNCED, State.DEFERRED: DEFERRED, State.UNKNOWN: "unknown"}
    rows = [
        {
            "month": now.year * 100 + now.month,
            "id": event_id(campaign_id, result.contact_id, result.attempt, kind),
            "occurred_at": now,
            "server_id": server_id,
            "campaign_id": campaign_id,
            "contact_id": result.contact_id,
            "attempt": result.attempt,
            "kind": kind,
            "code": result.code,
            "enhanced": result.enhanced,
            "reason": result.reason or None,
            "text": mask_addresses(result.text)[:500] or None,
        }
        for result in results
        # What was no attempt comes again under the same number, and may end in a deferral.
        if (kind := kinds.get(result.state) if result.asked else "unreachable" if result.code is None else result.reason) is not None
    ]
    if rows:
        connection.execute(insert_if_absent(DeliveryEvent), rows)
