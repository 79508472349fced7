"""Sending unknown rows once more, and what becomes of a row whose second copy was never sent.

What belongs here: the event `resent`, which remembers that a first copy may have arrived, and the two changes of the ledger that
depend on it. What does not: who decides (`unknown.decide`, `overdue.resend_unknown`).
"""

from __future__ import annotations

import datetime as dt
from collections import Counter
from collections.abc import Sequence

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine

from mail_pipelines.campaigns.open_rows import BY_STATE, WAITING, Slice, in_slice, slices
from mail_pipelines.campaigns.states import CampaignState
from mail_pipelines.contacts import sets
from mail_pipelines.database.bulk import CHUNK_ROWS
from mail_pipelines.database.engine import reading, transact
from mail_pipelines.database.models import Campaign, Delivery, DeliveryEvent, State
from mail_pipelines.delivery import counters
from mail_pipelines.delivery.events import RESENT, event_id
from mail_pipelines.delivery.resolving import Source, note


def send_again(
    engine: Engine,
    campaign_id: int,
    now: dt.datetime,
    states: tuple[CampaignState, ...],
    *,
    unknown_since: dt.datetime | None = None,
    only: Sequence[sa.ColumnElement[bool]] = (),
    decision: Source | None = None,
) -> int:
    """Offer unknown rows once more, as long as the campaign is in one of `states`; returns how many.

    With `unknown_since` only rows that were unknown by then and were not sent again before; `only` are further conditions on the ledger's
    row, `decision` is remembered with each. The attempt stays, so the second copy carries the same Message-ID. At most 10,000 rows a
    transaction; a killed call may be repeated.
    """
    conditions = list(only)
    if unknown_since is not None:
        conditions += [Delivery.sort_key <= int(unknown_since.timestamp()), ~_is_resent(campaign_id)]
    with reading(engine) as connection:
        parts = slices(connection, campaign_id, (State.UNKNOWN,))
    moved = 0
    for part in parts:
        while count := transact(engine, lambda connection, part=part: _send_chunk(connection, campaign_id, part, now, states, conditions, decision)):  # type: ignore[misc]
            moved += count
    return moved


def _send_chunk(
    connection: Connection,
    campaign_id: int,
    part: Slice,
    now: dt.datetime,
    states: tuple[CampaignState, ...],
    conditions: list[sa.ColumnElement[bool]],
    decision: Source | None,
) -> int:
    # Locked against a cancel: whoever cancels finds the rows of this transaction, with their events.
    state = connection.execute(sa.select(Campaign.state).where(Campaign.id == campaign_id).with_for_update(read=True)).scalar_one()
    if state not in states:
        return 0
    where = [*in_slice(campaign_id, part), *conditions]
    rows = connection.execute(
        sa.select(Delivery.contact_id, Delivery.attempt)
        .where(*where)
        .order_by(Delivery.sort_key, Delivery.contact_id)
        .limit(CHUNK_ROWS)
        .with_hint(Delivery, BY_STATE, "mysql")
        .with_hint(Delivery, BY_STATE, "mariadb")
        .with_for_update()
    ).all()
    if not rows:
        return 0
    connection.execute(
        sets.insert_if_absent(DeliveryEvent),
        [
            {
                "month": now.year * 100 + now.month,
                "id": event_id(campaign_id, row.contact_id, row.attempt, RESENT),
                "occurred_at": now,
                "campaign_id": campaign_id,
                "contact_id": row.contact_id,
                "attempt": row.attempt,
                "kind": RESENT,
            }
            for row in rows
        ],
    )
    if decision is not None:
        note(connection, campaign_id, counters.CENTRE, [(row.contact_id, row.attempt) for row in rows], decision, now)
    # The engagement rank is gone with the claim; rows in doubt go first, while the answer is still of use.
    values = {"state": int(State.PENDING), "sort_key": 0, "claim_id": None, "server_id": None, "not_before": None}
    ours = (Delivery.campaign_id == campaign_id, Delivery.contact_id.in_([row.contact_id for row in rows]), Delivery.state == int(State.UNKNOWN))
    connection.execute(sa.update(Delivery).where(*ours).values(values))
    moves = {(part.shard, part.provider, State.UNKNOWN, ""): -len(rows), (part.shard, part.provider, State.PENDING, ""): len(rows)}
    counters.add(connection, campaign_id, counters.CENTRE, moves, now)
    return len(rows)


def give_up_waiting(engine: Engine, campaign_id: int, now: dt.datetime) -> sa.ColumnElement[bool] | None:
    """Make waiting rows that were sent again unresolved: the first copy may have arrived, so they are neither expired nor cancelled.

    Returns the condition that a ledger row was never sent again, for the caller to end the others by; None if none was.
    """
    with reading(engine) as connection:
        query = sa.select(DeliveryEvent.contact_id, DeliveryEvent.month).where(DeliveryEvent.campaign_id == campaign_id, DeliveryEvent.kind == RESENT)
        found = connection.execute(query).all()
    if not found:
        return None
    for chunk in sets.slices(sorted({row.contact_id for row in found})):
        transact(engine, lambda connection, chunk=chunk: _give_up_chunk(connection, campaign_id, chunk, now))  # type: ignore[misc]
    # By month, so that the partitions of other months are not looked at.
    return ~_is_resent(campaign_id, DeliveryEvent.month.in_(sorted({row.month for row in found})))


def _give_up_chunk(connection: Connection, campaign_id: int, contact_ids: list[int], now: dt.datetime) -> None:
    where = (Delivery.campaign_id == campaign_id, Delivery.contact_id.in_(contact_ids), Delivery.state.in_([int(state) for state in WAITING]))
    rows = connection.execute(sa.select(Delivery.shard, Delivery.provider, Delivery.state).where(*where).with_for_update()).all()
    connection.execute(sa.update(Delivery).where(*where).values(state=int(State.UNRESOLVED), sort_key=int(now.timestamp())))
    moves: Counter[counters.Place] = Counter()
    for row in rows:
        moves[row.shard, row.provider, State(row.state), ""] -= 1
        moves[row.shard, row.provider, State.UNRESOLVED, ""] += 1
    counters.add(connection, campaign_id, counters.CENTRE, moves, now)


def _is_resent(campaign_id: int, *when: sa.ColumnElement[bool]) -> sa.ColumnElement[bool]:
    event = sa.select(sa.literal(1)).where(
        DeliveryEvent.campaign_id == campaign_id, DeliveryEvent.contact_id == Delivery.contact_id, DeliveryEvent.kind == RESENT, *when
    )
    return event.correlate(Delivery).exists()
