"""The moves of a ledger row, as a table. Whoever moves rows asks it first, and guards the same move in SQL (`… WHERE state = …`)."""

from __future__ import annotations

from mail_pipelines.database.models import State

_WAITING_BECOMES = frozenset(
    {
        State.CLAIMED,
        State.SUPPRESSED,
        State.EXPIRED,
        State.CANCELLED,
        State.UNRESOLVED,
        State.DELIVERED,
        State.BOUNCED,
        State.DEFERRED,
        State.UNKNOWN,
    }
)
MOVES: dict[State, frozenset[State]] = {
    # Unresolved instead of expired or cancelled: a row that waits to be sent again, since its first copy may have arrived. Delivered or
    # bounced: it turned out what became of that copy. These, deferred and unknown: a restored ledger learns of offers that it had forgotten.
    State.PENDING: _WAITING_BECOMES,
    State.DEFERRED: _WAITING_BECOMES,
    State.CLAIMED: frozenset(
        {
            State.DELIVERED,
            State.BOUNCED,
            State.DEFERRED,
            State.UNKNOWN,
            # released: nothing was offered
            State.PENDING,
            # released or deferred after a cancel; unresolved if it was sent again
            State.CANCELLED,
            State.UNRESOLVED,
            # no message can be made of its values
            State.SUPPRESSED,
        }
    ),
    # Later evidence (also of a temporary refusal), or the decision to send again, or 72 hours.
    State.UNKNOWN: frozenset({State.DELIVERED, State.BOUNCED, State.DEFERRED, State.PENDING, State.UNRESOLVED}),
    State.DELIVERED: frozenset(),
    # Only a bounce that was itself later evidence: that somebody reacted to the message is stronger (`delivery.evidence`).
    State.BOUNCED: frozenset({State.DELIVERED}),
    State.SUPPRESSED: frozenset(),
    State.EXPIRED: frozenset(),
    State.CANCELLED: frozenset(),
    State.UNRESOLVED: frozenset(),
}


def may_move(source: State, target: State) -> bool:
    return target in MOVES[source]
