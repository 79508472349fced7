"""What is due: cheap questions to counters and indexes, asked by sessions, sensors and pages. The ledger is never scanned."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from math import inf

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from mail_pipelines.database.models import OPEN_STATES, State
from mail_pipelines.database.views import deferred_rows, shard_counts
from mail_pipelines.dispatch import greylisting

_deferred, _counts = deferred_rows.c, shard_counts.c
# A shard must have so many rows for each server that is already asked to work there, before another is asked in the same tick; and so many deferred
# rows of a provider that are due are much.
ROWS_TO_JOIN = 200
# Shard and provider: where rows of a campaign wait.
Place = tuple[int, str]


def due_times(connection: Connection, campaign_id: int, shard: int | None = None, *, server_id: int | None = None) -> dict[Place, float]:
    """When each place of a campaign, or of one shard, next has a row to send (epoch seconds; 0: now): by this server, or by whichever."""
    firsts = _firsts(connection, campaign_id, shard, server_id)
    return {place: min(own, first + greylisting.WAIT_SECONDS) for place, (first, own) in firsts.items()}


def next_due(connection: Connection, campaign_id: int, shard: int) -> float | None:
    """When a shard next has a row to send, by whichever server; None if never by time alone."""
    return min(due_times(connection, campaign_id, shard).values(), default=None)


def senders(connection: Connection, campaign_id: int, second: float) -> dict[Place, set[int] | None]:
    """Where a campaign has rows to send at `second`, and the ids of the servers that may send them (None: each)."""
    found: dict[Place, set[int] | None] = {}
    held: list[Place] = []
    for place, (first, free) in _firsts(connection, campaign_id, None, greylisting.NO_SERVER).items():
        if min(free, first + greylisting.WAIT_SECONDS) <= second:
            found[place] = None
        elif first <= second:
            held.append(place)
    if held:
        waiting: defaultdict[Place, set[int]] = defaultdict(set)
        for shard, provider, server_id in connection.execute(_awaited(campaign_id, held, int(second))):
            waiting[shard, provider].add(server_id)
        found |= waiting
    return found


def due_of_many(connection: Connection, campaign_id: int, count: int) -> dict[Place, float]:
    """Where a campaign has so many deferred rows, and when the last of the first so many is due."""
    here = (_deferred.campaign_id == campaign_id, _deferred.shard == _counts.shard, _deferred.provider == _counts.provider)
    last = sa.select(_deferred.sort_key).where(*here).order_by(_deferred.sort_key).limit(1).offset(count - 1).correlate(shard_counts)
    query = (
        sa.select(_counts.shard, _counts.provider, last.scalar_subquery().label("due"))
        .where(_counts.campaign_id == campaign_id, _counts.state == int(State.DEFERRED))
        .group_by(_counts.shard, _counts.provider)
        .having(sa.func.sum(_counts.count) >= count)
    )
    return {(row.shard, row.provider): float(row.due) for row in connection.execute(query) if row.due is not None}


def _firsts(connection: Connection, campaign_id: int, shard: int | None, server_id: int | None) -> dict[Place, tuple[float, float]]:
    """By place when its first row is due, and when the first that does not wait for another server than this one (infinity: all wait).

    One statement: the counters say where rows wait, the ledger's index gives the first of each deferred range. What is read besides are greylisted
    rows before the first that waits for nobody.
    """
    here = (_deferred.campaign_id == campaign_id, _deferred.shard == _counts.shard, _deferred.provider == _counts.provider)
    first = sa.select(_deferred.sort_key).where(*here).order_by(_deferred.sort_key).limit(1).correlate(shard_counts)
    own = first if server_id is None else first.where(~greylisting.waits_for_another(server_id, _deferred))
    pending = _counts.state == int(State.PENDING)
    waiting = (
        sa.select(
            _counts.shard,
            _counts.provider,
            sa.case((pending, 0), else_=first.scalar_subquery()).label("first"),
            sa.case((pending, 0), else_=own.scalar_subquery()).label("own"),
        )
        .where(_counts.campaign_id == campaign_id, _counts.state.in_([int(State.PENDING), int(State.DEFERRED)]))
        .group_by(_counts.shard, _counts.provider, _counts.state)
        .having(sa.func.sum(_counts.count) > 0)
    )
    if shard is not None:
        waiting = waiting.where(_counts.shard == shard)
    found: dict[Place, tuple[float, float]] = {}
    for row in connection.execute(waiting):
        # A deferred row may have been claimed since the counter was read.
        if row.first is not None:
            before = found.get((row.shard, row.provider), (inf, inf))
            found[row.shard, row.provider] = min(before[0], float(row.first)), min(before[1], inf if row.own is None else float(row.own))
    return found


def _awaited(campaign_id: int, places: Sequence[Place], second: int) -> sa.Select[int, str, int]:
    """The servers that due rows of these places wait for. Of places without other due rows, so that no others are read."""
    return (
        sa.select(_deferred.shard, _deferred.provider, _deferred.server_id)
        .where(
            _deferred.campaign_id == campaign_id,
            sa.or_(*(sa.and_(_deferred.shard == shard, _deferred.provider == provider) for shard, provider in places)),
            _deferred.sort_key <= second,
            greylisting.waits_for_another(greylisting.NO_SERVER, _deferred),
        )
        .distinct()
    )


def open_rows(connection: Connection, campaign_id: int, shard: int) -> int:
    """Rows of a shard that are not final, from the counters."""
    return int(
        connection.execute(
            sa.select(sa.func.coalesce(sa.func.sum(_counts.count), 0)).where(
                _counts.campaign_id == campaign_id,
                _counts.shard == shard,
                _counts.state.in_([int(state) for state in OPEN_STATES]),
            )
        ).scalar_one()
    )
