"""How long events are kept one by one, and what is kept of them then.

What belongs here: moving engagement events of old months to sums, and dropping what nobody asks for any more of the delivery events. What does not:
what is read from both (`engagement`, `segments.engagement_snapshot`, `campaigns.why`), and the archive, with which all else of a campaign goes.

A transaction that adds events to the sums deletes them: each is in one of the two, whenever this is killed, however often it runs, and whoever reads
meanwhile. An event that comes later for such a month is one event more, and follows the next night.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine

from mail_pipelines.config import RetentionSettings
from mail_pipelines.database import partitions, upsert
from mail_pipelines.database.engine import reading, transact
from mail_pipelines.database.epochs import epoch_second
from mail_pipelines.database.models import Campaign, DeliveryEvent, EngagementEvent, EngagementHour, EngagementSum
from mail_pipelines.delivery.events import DEFERRED

# Of one transaction: a tenth of a second on a busy machine.
ROWS_AT_ONCE = 2_000
# What is left is older the next night.
ROWS_A_NIGHT = 20_000_000
# Snapshots read events by the time they were recorded: those of the last day are left to them, also to one that is being made anew just now.
READ_WITHIN = dt.timedelta(days=1)
# What these say of the recent past is still asked for event by event (`campaigns.stopping`), and they can be asked anything.
_RUNNING = ("sending", "paused")
# Their rows change no more but by evidence, which never asks for deferrals. Archived ones had theirs moved, or are just being moved.
_OVER = ("finished", "cancelled")
_HOUR = 3600


class Report(NamedTuple):
    """What a night has done."""

    rolled_up: int
    deferrals_dropped: int
    partitions_dropped: list[str]


def first_kept(today: dt.date, months: int) -> int:
    """The oldest month (YYYYMM) whose events stay, with so many whole months before that of `today`; 0, before all others, if they stay for ever."""
    number = today.year * 12 + today.month - 1 - months
    return number // 12 * 100 + number % 12 + 1 if months else 0


def keep(engine: Engine, settings: RetentionSettings, now: dt.datetime, read_until: dt.datetime | None, *, most: int = ROWS_A_NIGHT) -> Report:
    """Do what is due of all that this module is for. May be killed at any moment, and be done twice at once.

    `read_until` is how far the engagement snapshot has read what was recorded, None if there is none: what it has not read is left to it.
    """
    recorded_before = now - READ_WITHIN if read_until is None else min(now - READ_WITHIN, read_until)
    rolled_up = roll_up(engine, first_kept(now.date(), settings.engagement_months), recorded_before, most=most)
    dropped = drop_deferrals(engine, first_kept(now.date(), settings.deferral_months), most=most)
    return Report(rolled_up, dropped, partitions.drop_empty_months(engine, now.date()))


def roll_up(engine: Engine, kept_from: int, recorded_before: dt.datetime, *, most: int = ROWS_A_NIGHT) -> int:
    """Move the engagement events of the months before `kept_from` to the sums, but those of campaigns that run; returns how many.

    In transactions of at most `ROWS_AT_ONCE` events. `recorded_before` leaves out those that were recorded since.
    """
    with reading(engine) as connection:
        running = list(connection.execute(sa.select(Campaign.id).where(Campaign.state.in_(_RUNNING))).scalars())
    old = (EngagementEvent.recorded_at < recorded_before, EngagementEvent.campaign_id.not_in(running))

    def move(connection: Connection, month: int, after: int) -> Sequence[int]:
        # Locked: whoever does the same waits, and finds them gone. An event that is committed meanwhile is not among them.
        ids = connection.execute(_next(EngagementEvent, month, after, *old).with_for_update()).scalars().all()
        if ids:
            chosen = sa.and_(EngagementEvent.month == month, EngagementEvent.id.in_(ids))
            _add(connection, chosen)
            connection.execute(sa.delete(EngagementEvent).where(chosen))
        return ids

    return _through(engine, EngagementEvent, kept_from, move, most)


def _add(connection: Connection, chosen: sa.ColumnElement[bool]) -> None:
    event, count, at = EngagementEvent, sa.func.count(), EngagementEvent.occurred_at
    by = (event.campaign_id, event.kind, event.contact_id, sa.func.coalesce(event.link_id, 0).label("link"), event.machine)
    sums = sa.select(*by, count, sa.func.min(at), sa.func.max(at)).where(chosen).group_by(*by[:3], sa.text("link"), event.machine)
    upsert.fold_in(connection, EngagementSum, sums, added=("count",), least=("first_at",), greatest=("last_at",))
    second = epoch_second(connection, at)
    hours = sa.select(event.campaign_id, (second - second % _HOUR).label("hour"), event.kind, event.machine, count).where(chosen)
    # By the label: repeated expressions with parameters are not one expression to MariaDB.
    hours = hours.group_by(event.campaign_id, sa.text("hour"), event.kind, event.machine)
    upsert.fold_in(connection, EngagementHour, hours, added=("count",))


def drop_deferrals(engine: Engine, kept_from: int, *, most: int = ROWS_A_NIGHT) -> int:
    """Delete the deferrals of the months before `kept_from` whose campaigns are over and not archived; returns how many.

    That an attempt was refused for now is known from the ledger's row, and how many were when from the campaign's minutes. Everything else stays for as
    long as the row: it says what became of the message, and later evidence is held against it (`delivery.evidence`).
    """

    def drop(connection: Connection, month: int, after: int) -> Sequence[int]:
        event = DeliveryEvent
        over = sa.select(Campaign.id).where(Campaign.state.in_(_OVER))
        found = _next(event, month, after, event.kind == DEFERRED, event.campaign_id.in_(over)).add_columns(event.campaign_id)
        rows = connection.execute(found).all()
        # Held in their state: while an archive is written, what it is written from does not change.
        held = over.where(Campaign.id.in_({row.campaign_id for row in rows})).order_by(Campaign.id).with_for_update(read=True)
        still = set(connection.execute(held).scalars())
        ids = [row.id for row in rows if row.campaign_id in still]
        connection.execute(sa.delete(event).where(event.month == month, event.id.in_(ids)))
        return ids

    return _through(engine, DeliveryEvent, kept_from, drop, most)


def _next(event: type[DeliveryEvent] | type[EngagementEvent], month: int, after: int, *conditions: sa.ColumnElement[bool]) -> sa.Select[int]:
    """The numbers of the next events of a month that meet the conditions."""
    return sa.select(event.id).where(event.month == month, event.id > after, *conditions).order_by(event.id).limit(ROWS_AT_ONCE)


def _through(
    engine: Engine, event: type[DeliveryEvent] | type[EngagementEvent], kept_from: int, work: Callable[[Connection, int, int], Sequence[int]], most: int
) -> int:
    """Do `work` (month, number of the last event before) for all months before `kept_from`, one stretch after the other; returns for how many events."""
    done = 0
    for month in _months(engine, event, kept_from):
        after = -1
        while done < most and (ids := transact(engine, lambda connection, month=month, after=after: work(connection, month, after))):  # type: ignore[misc]
            done, after = done + len(ids), ids[-1]
    return done


def _months(engine: Engine, event: type[DeliveryEvent] | type[EngagementEvent], kept_from: int) -> Iterator[int]:
    """The months before `kept_from` that have events, oldest first."""
    last = 0
    while True:
        with reading(engine) as connection:
            month = connection.execute(sa.select(sa.func.min(event.month)).where(event.month > last, event.month < kept_from)).scalar_one()
        if month is None:
            return
        yield month
        last = month
