"""The rolled-up numbers of a campaign: how many rows are in each state, and how many reached an outcome in each minute.

What belongs here: the functions that change them. Every change of the ledger calls `add` in its own transaction, so the
counters always equal the ledger and nobody has to count it; facts beside the ledger's states (`delivery.evidence`) are counted by
`add_facts`. Reading them is `campaigns.progress`.
"""

from __future__ import annotations

import datetime as dt
from collections import Counter
from collections.abc import Mapping

from sqlalchemy.engine import Connection

from mail_pipelines.database.models import CampaignCounter, CampaignFact, CampaignMinute, State
from mail_pipelines.database.upsert import add_to

# Server 0 is the centre: freeze, expiry, cancel.
CENTRE = 0
# An accepted message that bounced later, as a kind of `campaign_facts`; the others are kinds of evidence.
LATE_BOUNCE = "late_bounce"
# (shard, provider, state, reason): where rows come from (negative) or go to (positive). `reason` is "" where there is none.
Place = tuple[int, str, State, str]


def add(connection: Connection, campaign_id: int, server_id: int, moves: Mapping[Place, int], now: dt.datetime) -> None:
    """Add the deltas of one change to the ledger to `campaign_counters` and, for rows that reached an outcome, to `campaign_minutes`.

    A row that moves is −1 where it was and +1 where it is now. An outcome is a final state or a deferral with its reason (a row that
    goes back to its queue unsent has none); only rows that arrive count in the minute of `now`, and a final state that is corrected is
    taken off there. Rows are written in key order, so that two writers wait and do not deadlock.
    """
    states: Counter[tuple[int, str, int]] = Counter()
    outcomes: Counter[tuple[str, int, str]] = Counter()
    for (shard, provider, state, reason), delta in moves.items():
        states[shard, provider, int(state)] += delta
        if state.is_final or (delta > 0 and state is State.DEFERRED and reason):
            outcomes[provider, int(state), reason] += delta
    key = {"campaign_id": campaign_id, "server_id": server_id}
    add_to(
        connection,
        CampaignCounter,
        [
            key | {"shard": shard, "provider": provider, "state": state, "count": count}
            for (shard, provider, state), count in sorted(states.items())
            if count != 0
        ],
        column="count",
    )
    minute = int(now.timestamp()) // 60
    add_to(
        connection,
        CampaignMinute,
        [
            key | {"minute": minute, "provider": provider, "state": state, "reason": reason, "count": count}
            for (provider, state, reason), count in sorted(outcomes.items())
            if count != 0
        ],
        column="count",
    )


def add_facts(connection: Connection, campaign_id: int, counts: Mapping[tuple[str, str], int]) -> None:
    """Add recipients to `campaign_facts`, by (provider, kind of fact)."""
    rows = [{"campaign_id": campaign_id, "provider": provider, "kind": kind, "count": count} for (provider, kind), count in sorted(counts.items())]
    add_to(connection, CampaignFact, rows, column="count")


def change_reasons(connection: Connection, campaign_id: int, server_id: int, state: State, reasons: Mapping[tuple[str, str], int], now: dt.datetime) -> None:
    """Move outcomes in `campaign_minutes` from one reason to another, as deltas by (provider, reason) in the minute of `now`; the sums stay right."""
    key = {"campaign_id": campaign_id, "server_id": server_id, "minute": int(now.timestamp()) // 60, "state": int(state)}
    rows = [key | {"provider": provider, "reason": reason, "count": count} for (provider, reason), count in sorted(reasons.items()) if count]
    add_to(connection, CampaignMinute, rows, column="count")
