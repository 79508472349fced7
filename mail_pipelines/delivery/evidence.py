"""What becomes known of a message after it was offered: bounces, complaints, unsubscribing by mail, late lines of a journal.

What belongs here: the one state machine of a recipient, as pure functions, and the set-based writing of what follows. What does not: reading
mail or journals (they make `Evidence`), and answers to a claim's offers (`recording`).

Evidence is kept once for each recipient, attempt and kind, as a delivery event. State and counts follow from the *set* of what is kept,
whatever its order and however often it comes:

- What SMTP answered stays. A bounce of a message that was accepted is a fact beside the state.
- A row whose outcome nobody knows gets it from evidence of its own attempt: that it arrived, or else that it bounced. The former is
  stronger, since a person has acted on the message, and may correct the latter.
- Evidence of an older attempt is kept and changes nothing. What a person asks for is done, whichever copy it came from.
- What is proved by a token under the key of one server counts only about rows that this server was the last to claim, or has reported on; and, of a server
  whose log a recovery could not read whole, about rows that are or were in doubt, since nobody knows what it has mailed.
- The row of an archived campaign changes no more, wherever it is: its state follows from it and the evidence kept since, and only counters move.
"""

from __future__ import annotations

import datetime as dt
import enum
import logging
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from mail_pipelines.contacts import consent
from mail_pipelines.contacts.consent import Scope
from mail_pipelines.contacts.sets import insert_if_absent
from mail_pipelines.database.models import Campaign, Delivery, DeliveryEvent, EngagementEvent, RecoveryServer, State
from mail_pipelines.delivery import counters, events, suppression
from mail_pipelines.delivery.classes import classify
from mail_pipelines.delivery.events import BOUNCED, RESENT, RESOLVED, event_id, mask_addresses
from mail_pipelines.delivery.ledger_archive import LedgerArchive, LedgerArchiveError, Manifest
from mail_pipelines.delivery.recording import suppress_bounced
from mail_pipelines.delivery.transitions import may_move

# So many pieces of evidence are applied in one transaction.
BATCH = 500
# The state of a campaign whose ledger changes no more.
ARCHIVED = "archived"
_log = logging.getLogger(__name__)


class Kind(enum.StrEnum):
    """What is proved, as the kind of a delivery event."""

    # A line of the server's journal that was found after its claim was settled.
    LATE_DELIVERY = "late_delivery"
    LATE_REFUSAL = events.LATE_REFUSAL
    # A delivery status notification, or another mail that says the same.
    DELIVERY_REPORT = "delivery_report"
    BOUNCE_REPORT = events.BOUNCE_REPORT
    COMPLAINT = "complained"
    UNSUBSCRIBE = "unsubscribed"

    @property
    def is_request(self) -> bool:
        """Whether a person asks for something by it."""
        return self in (Kind.COMPLAINT, Kind.UNSUBSCRIBE)


ARRIVED = frozenset({Kind.LATE_DELIVERY, Kind.DELIVERY_REPORT, Kind.COMPLAINT, Kind.UNSUBSCRIBE})
FAILED = frozenset({Kind.LATE_REFUSAL, Kind.BOUNCE_REPORT})
# Nobody knows of these rows whether their attempt arrived. A waiting row has a message out only if that is sent again.
_OPEN = frozenset({State.UNKNOWN, State.PENDING, State.DEFERRED})
_IN_DOUBT = frozenset({State.UNKNOWN, State.UNRESOLVED})
# Parts in a recovery (`dispatch.recovery.standing`) of servers that may have mailed what nobody has read.
_UNCOVERED = ("incomplete", "lost")
_KINDS = frozenset(kind.value for kind in Kind)
_ENGAGEMENT = {Kind.COMPLAINT: "complaint", Kind.UNSUBSCRIBE: "unsubscribe"}


@dataclass(frozen=True)
class Evidence:
    """One proof about one offer of a message. `at` is when it came; `code`, `enhanced` and `text` are the destination's words, if it is a refusal.

    `signed_by` is the server whose key the token was under, which is the only proof; 0 for the installation's, and for what a server's own log says.
    """

    kind: Kind
    campaign_id: int
    contact_id: int
    attempt: int
    at: dt.datetime
    code: int | None = None
    enhanced: str | None = None
    text: str = ""
    signed_by: int = 0


class Effect(enum.StrEnum):
    """What applying a piece of evidence did."""

    NEW = "new"
    KNOWN = "known"
    # Of an older attempt: kept, and no more.
    OLDER = "older"
    # The message is in a server's hand: to be applied again when that has recorded its outcome.
    TOO_EARLY = "too_early"
    # The ledger has no such row or attempt.
    UNMATCHED = "unmatched"
    # Its token was made by a server that has nothing to do with the row: nothing is done.
    FORGED = "forged"
    # The row is in an archive that is away: to be applied again. What a person asks for is done for the contact that has the number now.
    ARCHIVE_AWAY = "archive_away"


@dataclass(frozen=True)
class Known:
    """A ledger row and the kinds of events kept about it: `answered` is a refusal by SMTP, of its own attempt."""

    state: State
    attempt: int
    answered: bool
    kept: frozenset[tuple[int, Kind]]

    def proofs(self) -> set[Kind]:
        """What is known of the row's own attempt."""
        return {kind for attempt, kind in self.kept if attempt == self.attempt}


def settled(row: Known) -> State:
    """The state that follows from all that is kept about a row."""
    if row.state not in _OPEN and not (row.state is State.BOUNCED and not row.answered):
        return row.state
    proofs = row.proofs()
    if proofs & ARRIVED:
        return State.DELIVERED
    return State.BOUNCED if proofs & FAILED else row.state


def known(state: int, attempt: int, events: Collection[tuple[int, str]], *, is_archived: bool) -> Known:
    """What the state of a row and the events (attempt, kind) about it say. The row of an archived campaign does not show what was kept since."""
    kept = frozenset((number, Kind(kind)) for number, kind in events if kind in _KINDS)
    row = Known(State(state), attempt, (attempt, BOUNCED) in events, kept)
    return replace(row, state=settled(row)) if is_archived else row


def facts(row: Known) -> set[str]:
    """What the row counts for beside its state, each once for a recipient."""
    found = {kind.value for _, kind in row.kept if kind.is_request}
    return found | {counters.LATE_BOUNCE} if row.state is State.DELIVERED and Kind.BOUNCE_REPORT in row.proofs() else found


def apply(connection: Connection, pieces: Sequence[Evidence], now: dt.datetime, archive: LedgerArchive) -> list[Effect]:
    """Apply evidence, at most `BATCH` pieces, in one transaction: events, states, counters and suppressions; the effects in the same order.

    `archive` has the rows of archived campaigns. Doing it again changes nothing. Requests are carried out again, since a person may have subscribed in
    between.
    """
    campaigns = _campaigns(connection, {piece.campaign_id for piece in pieces})
    effects: list[Effect] = [Effect.UNMATCHED] * len(pieces)
    for campaign_id in sorted(campaigns):
        numbers = [number for number, piece in enumerate(pieces) if piece.campaign_id == campaign_id]
        found = _apply_to_campaign(connection, campaigns[campaign_id], [pieces[number] for number in numbers], now, archive)
        for number, effect in zip(numbers, found, strict=True):
            effects[number] = effect
    return effects


@dataclass(frozen=True)
class _Scopes:
    campaign_id: int
    complaint: Scope
    unsubscribe: Scope
    is_archived: bool
    archive: Manifest | None


def _campaigns(connection: Connection, campaign_ids: Collection[int]) -> dict[int, _Scopes]:
    """The campaigns, held in their state; an archived one by nobody else at the same time, since its rows cannot be locked."""
    columns = (Campaign.id, Campaign.brand_id, Campaign.unsubscribe, Campaign.unsubscribe_list_id, Campaign.state, Campaign.archive)
    query = sa.select(*columns).where(Campaign.id.in_(campaign_ids)).order_by(Campaign.id)
    rows = connection.execute(query.with_for_update(read=True)).all()
    if archived := [row.id for row in rows if row.state == ARCHIVED]:
        connection.execute(sa.select(Campaign.id).where(Campaign.id.in_(archived)).order_by(Campaign.id).with_for_update()).all()
    found = {}
    for row in rows:
        by_kind = {"all": consent.ALL, "brand": Scope("brand", row.brand_id)}
        unsubscribe = Scope("list", row.unsubscribe_list_id) if row.unsubscribe == "list" else by_kind[row.unsubscribe]
        found[row.id] = _Scopes(row.id, by_kind[suppression.complaint_scope()], unsubscribe, row.state == ARCHIVED, row.archive)
    return found


@dataclass
class _Change:
    """What becomes of one row: its columns as `_read` selects them, what was known, and what is new. `servers`: those whose it is or may be."""

    row: Any
    before: Known
    new: list[Evidence]
    servers: frozenset[int]

    def after(self) -> Known:
        kept = self.before.kept | {(piece.attempt, piece.kind) for piece in self.new}
        known = Known(self.before.state, self.before.attempt, self.before.answered, kept)
        return Known(settled(known), known.attempt, known.answered, kept)

    def answer(self) -> Evidence | None:
        """The new piece, if any, with the destination's words for the state that follows."""
        kinds = FAILED if self.after().state is State.BOUNCED else {Kind.LATE_DELIVERY}
        return next((piece for piece in self.new if piece.kind in kinds and piece.attempt == self.before.attempt), None)


def _apply_to_campaign(connection: Connection, scopes: _Scopes, pieces: Sequence[Evidence], now: dt.datetime, archive: LedgerArchive) -> list[Effect]:
    try:
        uncovered = _uncovered_among(connection, {piece.signed_by for piece in pieces if piece.signed_by})
        changes = _read(connection, scopes, sorted({piece.contact_id for piece in pieces}), archive, uncovered)
    except LedgerArchiveError as error:
        _log.warning("evidence about campaign %d waits: %s", scopes.campaign_id, error)
        # What a server has signed can be held against its rows only when they are here again.
        _grant(connection, scopes, [piece for piece in pieces if not piece.signed_by], {}, now)
        return [Effect.ARCHIVE_AWAY] * len(pieces)
    effects = [_place(changes.get(piece.contact_id), piece) for piece in pieces]
    genuine = [piece for piece, effect in zip(pieces, effects, strict=True) if effect is not Effect.FORGED]
    _write_events(connection, changes.values(), now)
    _move(connection, scopes, changes.values(), now)
    _count_facts(connection, scopes.campaign_id, changes.values())
    _suppress(connection, scopes.campaign_id, changes, now)
    _grant(connection, scopes, genuine, changes, now)
    return effects


def _uncovered_among(connection: Connection, server_ids: Collection[int]) -> frozenset[int]:
    """Those of some servers that may have mailed rows that a recovery has left in doubt."""
    if not server_ids:
        return frozenset()
    query = sa.select(RecoveryServer.server_id).where(RecoveryServer.server_id.in_(sorted(server_ids)), RecoveryServer.part.in_(_UNCOVERED))
    return frozenset(connection.execute(query).scalars())


def _read(connection: Connection, scopes: _Scopes, contact_ids: list[int], archive: LedgerArchive, uncovered: frozenset[int]) -> dict[int, _Change]:
    """The rows, locked in key order or from the archive, with what is kept about them; of those in doubt, `uncovered` servers may have mailed any."""
    campaign_id = scopes.campaign_id
    ours = (Delivery.campaign_id == campaign_id, Delivery.contact_id.in_(contact_ids))
    columns = (
        Delivery.contact_id,
        Delivery.address_hash,
        Delivery.shard,
        Delivery.provider,
        Delivery.state,
        Delivery.attempt,
        Delivery.reason,
        Delivery.server_id,
    )
    rows: list[Any] = list(connection.execute(sa.select(*columns).where(*ours).order_by(Delivery.contact_id).with_for_update()))
    about = sa.select(DeliveryEvent.contact_id, DeliveryEvent.attempt, DeliveryEvent.kind, DeliveryEvent.server_id).where(
        DeliveryEvent.campaign_id == campaign_id, DeliveryEvent.contact_id.in_(contact_ids)
    )
    about_each: defaultdict[int, set[tuple[int, str]]] = defaultdict(set)
    servers: defaultdict[int, set[int]] = defaultdict(set)
    told: list[Any] = list(connection.execute(about))
    if scopes.archive is not None:
        # Of a ledger that is being deleted some rows are still here, with their events.
        gone = set(contact_ids) - {row.contact_id for row in rows}
        rows += archive.recipients(campaign_id, scopes.archive, gone).values()
        told += archive.events(campaign_id, scopes.archive, gone)
    for event in told:
        server_id = event.server_id or counters.CENTRE
        about_each[event.contact_id].add((event.attempt, event.kind))
        servers[event.contact_id].add(server_id)
        if event.kind == RESENT or (event.kind == RESOLVED and server_id == counters.CENTRE):
            # It was in doubt, until that was ended by a decision and not by a server's word.
            servers[event.contact_id] |= uncovered
    for row in rows:
        servers[row.contact_id] |= {row.server_id or counters.CENTRE} | (uncovered if State(row.state) in _IN_DOUBT else set())
    return {
        row.contact_id: _Change(
            row,
            known(row.state, row.attempt, about_each[row.contact_id], is_archived=scopes.is_archived),
            [],
            frozenset(servers[row.contact_id]),
        )
        for row in rows
    }


def _place(change: _Change | None, piece: Evidence) -> Effect:
    """Put a piece to what is new about its row; its effect."""
    if piece.signed_by and (change is None or piece.signed_by not in change.servers):
        return Effect.FORGED
    if change is None or piece.attempt > change.before.attempt:
        return Effect.UNMATCHED
    in_hand = change.before.state is State.CLAIMED and piece.attempt == change.before.attempt
    if in_hand and not piece.kind.is_request:
        return Effect.TOO_EARLY
    known = (piece.attempt, piece.kind) in change.before.kept or any((new.attempt, new.kind) == (piece.attempt, piece.kind) for new in change.new)
    if not known:
        change.new.append(piece)
    if in_hand:
        return Effect.TOO_EARLY
    if known:
        return Effect.KNOWN
    return Effect.OLDER if piece.attempt < change.before.attempt else Effect.NEW


def _write_events(connection: Connection, changes: Iterable[_Change], now: dt.datetime) -> None:
    rows, engagement = [], []
    for change in changes:
        asked = {kind for _, kind in change.before.kept if kind.is_request}
        for piece in change.new:
            at = min(piece.at, now)
            refusal = piece.kind in FAILED
            meaning = classify(change.row.provider, piece.code, piece.enhanced, piece.text) if refusal else None
            shared = {"month": at.year * 100 + at.month, "occurred_at": at, "campaign_id": piece.campaign_id, "contact_id": piece.contact_id}
            rows.append(
                shared
                | {
                    "id": event_id(piece.campaign_id, piece.contact_id, piece.attempt, piece.kind),
                    # From here on it is known whose the row is, or may be.
                    "server_id": piece.signed_by or None,
                    "attempt": piece.attempt,
                    "kind": piece.kind.value,
                    "code": piece.code,
                    "enhanced": piece.enhanced,
                    "reason": meaning.reason if meaning else None,
                    "text": mask_addresses(piece.text)[:500] or None,
                }
            )
            if piece.kind.is_request and piece.kind not in asked:
                asked.add(piece.kind)
                kind = _ENGAGEMENT[piece.kind]
                number = event_id(piece.campaign_id, piece.contact_id, 0, kind)
                engagement.append(shared | {"id": number, "recorded_at": now, "kind": kind, "machine": False})
    if rows:
        connection.execute(insert_if_absent(DeliveryEvent), rows)
    if engagement:
        connection.execute(insert_if_absent(EngagementEvent), engagement)


def _move(connection: Connection, scopes: _Scopes, changes: Iterable[_Change], now: dt.datetime) -> None:
    """Give rows the states that follow, with their counters."""
    campaign_id, second = scopes.campaign_id, int(now.timestamp())
    moves: defaultdict[int, Counter[counters.Place]] = defaultdict(Counter)
    groups: defaultdict[tuple[State, State, int | None, str | None, str], list[int]] = defaultdict(list)
    for change in changes:
        before, after = change.before.state, change.after().state
        if before is after:
            continue
        if not may_move(before, after):
            raise ValueError(f"a row that is {before.name.lower()} cannot become {after.name.lower()}")
        piece = change.answer()
        reason = classify(change.row.provider, piece.code, piece.enhanced, piece.text).reason if piece and after is State.BOUNCED else ""
        groups[before, after, piece.code if piece else None, piece.enhanced if piece else None, reason].append(change.row.contact_id)
        its_moves = moves[change.row.server_id or counters.CENTRE]
        its_moves[change.row.shard, change.row.provider, before, (change.row.reason or "") if before.is_final else ""] -= 1
        its_moves[change.row.shard, change.row.provider, after, reason] += 1
    for (before, after, code, enhanced, reason), contact_ids in groups.items():
        values = {"state": int(after), "code": code, "enhanced": enhanced, "reason": reason or None}
        if before in (State.PENDING, State.DEFERRED):
            # Of the others it is known when they were sent, within seconds.
            values["sort_key"] = second
        ours = (Delivery.campaign_id == campaign_id, Delivery.contact_id.in_(contact_ids), Delivery.state == int(before))
        if not scopes.is_archived:
            connection.execute(sa.update(Delivery).where(*ours).values(values))
    for server_id, its_moves in sorted(moves.items()):
        counters.add(connection, campaign_id, server_id, its_moves, now)


def _count_facts(connection: Connection, campaign_id: int, changes: Iterable[_Change]) -> None:
    counts: Counter[tuple[str, str]] = Counter()
    for change in changes:
        counts.update((change.row.provider, fact) for fact in facts(change.after()) - facts(change.before))
    counters.add_facts(connection, campaign_id, counts)


def _suppress(connection: Connection, campaign_id: int, changes: Mapping[int, _Change], now: dt.datetime) -> None:
    """Suppress addresses that a refusal of the row's own attempt proves to be bad."""
    bounced, bad = [], []
    for contact_id, change in changes.items():
        refusals = [piece for piece in change.new if piece.kind in FAILED and piece.attempt == change.before.attempt]
        if any(suppression.is_at_once(classify(change.row.provider, piece.code, piece.enhanced, piece.text).action) for piece in refusals):
            if change.after().state is State.BOUNCED:
                bounced.append(contact_id)
            else:
                bad.append(change.row.address_hash)
    suppress_bounced(connection, campaign_id, bounced, now)
    if bad:
        consent.suppress(connection, bad, reason="bounce", now=now)


def _grant(connection: Connection, scopes: _Scopes, pieces: Iterable[Evidence], changes: Mapping[int, _Change], now: dt.datetime) -> None:
    """Do what people ask for: the contact as it is now, and the address that was mailed, which may be another one or nobody's any more."""
    for kind, reason, scope in ((Kind.UNSUBSCRIBE, "unsubscribe", scopes.unsubscribe), (Kind.COMPLAINT, "complaint", scopes.complaint)):
        contact_ids = sorted({piece.contact_id for piece in pieces if piece.kind is kind})
        if contact_ids:
            consent.unsubscribe(connection, contact_ids, scope=scope.kind, scope_id=scope.id, now=now)
            hashes = [changes[contact_id].row.address_hash for contact_id in contact_ids if contact_id in changes]
            consent.suppress(connection, hashes, reason=reason, scope_kind=scope.kind, scope_id=scope.id, now=now)
