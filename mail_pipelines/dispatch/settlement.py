"""Turning a claim's journal into the end of each of its rows: for a sender's own claim at its end, and for one whose sender is gone.

The rule (one table for both):

  an outcome in the journal                                  → that outcome
  INTENT without outcome, its mail server process gone       → unknown
  neither, and the journal provably covers the claim         → released: pending again, debit refunded
  anything else                                              → unknown

A journal that names messages of the claim by tokens under another key, since the server's was changed, covers nothing.

It may be used only once the claim's permit is withdrawn, and only on the server whose journal it is.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Set
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine

from mail_pipelines.config import SendingSettings
from mail_pipelines.database.engine import database_now, reading, transact
from mail_pipelines.database.models import Claim, Delivery, State
from mail_pipelines.delivery.classes import classify
from mail_pipelines.delivery.recording import ClaimRef, LedgerConflict, Result, record
from mail_pipelines.delivery.suppression import is_at_once
from mail_pipelines.dispatch import greylisting, permit
from mail_pipelines.dispatch.claims import Sender
from mail_pipelines.dispatch.files import DispatchError, ServerFolders
from mail_pipelines.dispatch.journal import Evidence, Journal, Kind, Outcome, Position, process_alive
from mail_pipelines.messages.tokens import DeliveryToken, TokenError, read_delivery, sign_delivery

_POLL_SECONDS = 0.05
# How long a settler waits for the mail server to finish messages that are at their destinations: its own longest wait for a reply, and some more.
IN_FLIGHT_SECONDS = 75.0


@dataclass(frozen=True)
class Offered:
    """A row of a claim: which message, the token by which the journal names it, and whether the sender heard a reply to its body.

    After a reply the line is written. The reply itself is no proof: a mail server that cannot write its line says 421 for a message that the
    destination has taken, and may say 250 for one that it has only received.
    """

    contact_id: int
    attempt: int
    token: str
    answered: bool = False


def token_of(ref: ClaimRef, contact_id: int, attempt: int, token_key: bytes) -> str:
    """The token by which the journal names the message of a row of this claim."""
    return sign_delivery(DeliveryToken(ref.campaign_id, contact_id, attempt), token_key)


def speaks_another_key(evidence: Evidence, tokens: Set[str], token_key: bytes) -> bool:
    """Whether the journal names offers of the claim by tokens of another key: then it may name those of `tokens` so, too, and their absence proves nothing."""
    return any(not _is_under(token, token_key) for token in evidence.offered - tokens)


def _is_under(token: str, token_key: bytes) -> bool:
    try:
        read_delivery(token, token_key)
    except TokenError:
        return False
    return True


def conclude(rows: Iterable[Offered], evidence: Evidence, ref: ClaimRef, settings: SendingSettings, now: float, *, same_life: bool = True) -> list[Result]:
    """The end of each row, by the table above. `now` is the database's second; `same_life` is false if server, boot or log are not those of the claim."""
    results = []
    for row in rows:
        outcome = evidence.outcomes.get(row.token)
        if outcome is not None and outcome.kind is not Kind.VOID:
            results.append(result_of(row, outcome, ref.provider, settings, now))
        elif outcome is not None or (row.token not in evidence.intents and evidence.covered and same_life):
            results.append(Result(row.contact_id, row.attempt, State.PENDING))
        else:
            results.append(Result(row.contact_id, row.attempt, State.UNKNOWN, reason="no_outcome"))
    return results


def result_of(row: Offered | DeliveryToken, outcome: Outcome, provider: str, settings: SendingSettings, now: float) -> Result:
    """The end of a row by an outcome that is not void. A deferral is due some time after `now` (epoch seconds by the database's clock)."""
    if outcome.kind is Kind.DELIVERED:
        return Result(row.contact_id, row.attempt, State.DELIVERED, outcome.code, outcome.enhanced)
    if outcome.kind is Kind.UNKNOWN:
        return Result(row.contact_id, row.attempt, State.UNKNOWN, reason="no_reply", text=outcome.text)
    if outcome.kind is Kind.UNREACHABLE:
        due = int(now) + settings.first_retry_seconds
        return Result(row.contact_id, row.attempt, State.DEFERRED, reason="no_connection", due=due, text=outcome.text, asked=False)
    meaning = classify(provider, outcome.code, outcome.enhanced, outcome.text)
    if outcome.kind is Kind.BOUNCED:
        return Result(
            row.contact_id,
            row.attempt,
            State.BOUNCED,
            outcome.code,
            outcome.enhanced,
            meaning.reason,
            text=outcome.text,
            suppress=is_at_once(meaning.action),
        )
    due = int(now) + retry_seconds(row.attempt, settings)
    # Under the next attempt the message would come from another envelope sender, and many greylist whoever is new by that, too.
    asked = meaning.reason != greylisting.REASON
    return Result(row.contact_id, row.attempt, State.DEFERRED, outcome.code, outcome.enhanced, meaning.reason, due=due, text=outcome.text, asked=asked)


def retry_seconds(attempt: int, settings: SendingSettings) -> int:
    """The wait after a deferral of this attempt (0 is the first), in seconds: doubling, up to the longest."""
    return min(settings.first_retry_seconds << min(attempt, 20), settings.last_retry_seconds)


def in_flight(evidence: Evidence, tokens: Mapping[str, object] | set[str]) -> bool:
    """Whether the mail server may still write the outcome of one of these messages."""
    return any(token in tokens and process_alive(pid) for token, pid in evidence.intents.items())


# --- claims of others -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Settled:
    """What settling did: claims closed, rows by state, and claims that must wait (a message is still in flight)."""

    claims: int
    rows: Mapping[State, int]
    waiting: int


def abandoned(connection: Connection, server_id: int, is_held: Callable[[int], bool]) -> list[int]:
    """Ids of the claims of a server that nobody works on: half settled, past their lease, or without a living holder of the permit."""
    now = database_now(connection)
    claims = connection.execute(
        sa.select(Claim.id, Claim.state, Claim.lease_until).where(Claim.server_id == server_id, Claim.state.in_(("open", "settling"))).order_by(Claim.opened_at)
    ).all()
    return [claim.id for claim in claims if claim.state == "settling" or claim.lease_until <= now or not is_held(claim.id)]


def settle_all(
    engine: Engine,
    sender: Sender,
    folders: ServerFolders,
    journal: Journal,
    settings: SendingSettings,
    token_key: bytes,
    *,
    wait_seconds: float = IN_FLIGHT_SECONDS,
) -> Settled:
    """Settle every abandoned claim of this server. Several processes may do so at once: a claim is settled by one of them."""
    with reading(engine) as connection:
        claims = abandoned(connection, sender.server_id, lambda claim_id: permit.is_held(folders.permits, claim_id))
    rows: dict[State, int] = {}
    closed = waiting = 0
    for claim_id in claims:
        try:
            done = settle(engine, claim_id, sender, folders, journal, settings, token_key, wait_seconds=wait_seconds)
        except (LedgerConflict, DispatchError):
            waiting += 1
            continue
        if done is None:
            waiting += 1
            continue
        closed += 1
        for state, count in done.items():
            rows[state] = rows.get(state, 0) + count
    return Settled(closed, rows, waiting)


def settle(
    engine: Engine,
    claim_id: int,
    sender: Sender,
    folders: ServerFolders,
    journal: Journal,
    settings: SendingSettings,
    token_key: bytes,
    *,
    wait_seconds: float = IN_FLIGHT_SECONDS,
) -> Mapping[State, int] | None:
    """Settle one abandoned claim; None if a message of it is still in flight after `wait_seconds`, so that it has to be tried again."""

    def begin(connection: Connection) -> Any:
        connection.execute(sa.update(Claim).where(Claim.id == claim_id, Claim.server_id == sender.server_id, Claim.state == "open").values(state="settling"))
        return connection.execute(
            sa.select(*Claim.__table__.c).where(Claim.id == claim_id, Claim.server_id == sender.server_id, Claim.state == "settling")
        ).one_or_none()

    # The gate first: it needs no database, and a sender that was stopped inside a transaction would hold SQLite's write lock for ever.
    permit.revoke(folders.permits, claim_id)
    claim = transact(engine, begin)
    if claim is None:
        return {}
    ref = ClaimRef(claim.id, claim.campaign_id, claim.shard, claim.provider, claim.server_id, claim.opened_at)
    rows = [Offered(contact_id, attempt, token_of(ref, contact_id, attempt, token_key)) for contact_id, attempt in _claimed_rows(engine, ref)]
    tokens = {row.token for row in rows}
    position = Position(claim.journal_inode, claim.journal_offset)
    end = time.monotonic() + wait_seconds
    while in_flight(evidence := journal.evidence(position, claim_id), tokens):
        if time.monotonic() > end:
            return None
        time.sleep(_POLL_SECONDS)
    # A process may end between its last line and the look at it: what it wrote is read once more.
    evidence = journal.evidence(position, claim_id)
    same_life = claim.incarnation == sender.incarnation and claim.boot_id == sender.boot_id and not speaks_another_key(evidence, tokens, token_key)
    with reading(engine) as connection:
        second = database_now(connection).timestamp()
    results = conclude(rows, evidence, ref, settings, second, same_life=same_life)
    return transact(engine, lambda connection: record(connection, ref, results, claim_state="settling"))


def give_up(engine: Engine, server_id: int) -> int:
    """Close all open claims of a server that will not come back; their rows become unknown, never pending. Returns how many rows.

    Only for a server declared lost: its own settlement would know more.
    """
    with reading(engine) as connection:
        claims = connection.execute(
            sa.select(Claim.id, Claim.campaign_id, Claim.shard, Claim.provider, Claim.server_id, Claim.opened_at, Claim.state).where(
                Claim.server_id == server_id, Claim.state != "closed"
            )
        ).all()
    given_up = 0
    for claim in claims:
        ref = ClaimRef(claim.id, claim.campaign_id, claim.shard, claim.provider, claim.server_id, claim.opened_at)
        results = [Result(contact_id, attempt, State.UNKNOWN, reason="server_lost") for contact_id, attempt in _claimed_rows(engine, ref)]

        def work(connection: Connection, ref: ClaimRef = ref, results: list[Result] = results, state: str = claim.state) -> Mapping[State, int]:
            return record(connection, ref, results, claim_state=state)

        transact(engine, work)
        given_up += len(results)
    return given_up


def _claimed_rows(engine: Engine, ref: ClaimRef) -> list[tuple[int, int]]:
    """Contact and attempt of the rows that a claim still has, by the ledger's index."""
    with reading(engine) as connection:
        rows = connection.execute(
            sa.select(Delivery.contact_id, Delivery.attempt).where(
                Delivery.campaign_id == ref.campaign_id,
                Delivery.shard == ref.shard,
                Delivery.provider == ref.provider,
                Delivery.state == int(State.CLAIMED),
                Delivery.claim_id == ref.id,
            )
        )
        return [(row.contact_id, row.attempt) for row in rows]
