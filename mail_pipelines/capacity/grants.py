"""Grants, the rows of `allotments`: reading them, and writing many without holding anybody up.

They are written in portions, each a transaction of its own, those of the current slot first. A grant's `planned` counts only while the plan that wrote it is in
force: so of a plan that was killed between two portions, what it did not write yet is shared as if nothing were planned there, and two plans are never mixed. A
portion is made of whole providers of a slot, for which one campaign's part means nothing without the others'.
"""

from __future__ import annotations

import datetime as dt
import itertools
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine

from mail_pipelines.capacity import breakers, domain_breakers, in_force
from mail_pipelines.capacity.fleet import Fleet
from mail_pipelines.database.engine import is_mysql, transact
from mail_pipelines.database.models import Allotment
from mail_pipelines.delivery.recording import SLOT_SECONDS, slot_at

# A portion ends with the provider of a slot with which it reaches so many rows. Claims wait for those of theirs that are in one.
PORTION_ROWS = 2_000
# Campaign, server, provider, start of the slot.
Place = tuple[int, int, str, int]


class Grant(NamedTuple):
    """A row of `allotments`; `planned` by the plan in force."""

    granted: int
    used: int = 0
    planned: int = 0


def slots_at(moment: dt.datetime, count: int) -> list[int]:
    """The starts of the current slot and of those after it, `count` in all."""
    return [slot_at(moment) + number * SLOT_SECONDS for number in range(count)]


def read(
    connection: Connection, slots: Sequence[int], epoch: int, providers: Collection[str] | None = None, server_ids: Collection[int] | None = None
) -> dict[Place, Grant]:
    """The grants of these slots while plan `epoch` is in force; of some providers, or servers, or of all."""
    columns = (Allotment.campaign_id, Allotment.server_id, Allotment.provider, Allotment.slot_start, Allotment.granted, Allotment.used)
    query = sa.select(*columns, sa.case((Allotment.plan_epoch == epoch, Allotment.planned), else_=0)).where(Allotment.slot_start.in_(slots))
    if providers is not None:
        query = query.where(Allotment.provider.in_(providers))
    if server_ids is not None:
        query = query.where(Allotment.server_id.in_(server_ids))
    rows = connection.execute(query).tuples()
    return {(campaign, server, provider, start): Grant(granted, used, planned) for campaign, server, provider, start, granted, used, planned in rows}


def write(engine: Engine, wanted: Mapping[Place, Grant], fleet: Fleet, epoch: int, *, lowers: bool, beside: int | None = None) -> int:
    """Insert grants or change those that are there: not below what they are, or if this `lowers` them not below what is used; returns how many.

    Also what the plan `epoch` means. Or these are shares `beside` it, made out when so many portions of plans were written: if there are more by now, nothing
    is written, or shares of a whole room would stand above a plan that has just taken its part of it. It ends early where another plan has come into force,
    and leaves out lines whose breaker is not as in `fleet` any more, and campaigns whose domain's breaker is open.
    """
    written = 0
    pairs: set[tuple[int, str]] = set()
    for places in _portions(wanted):
        pairs.update(place[1:3] for place in places)
        count = transact(engine, lambda connection, places=places: _write(connection, places, wanted, fleet, epoch, lowers, beside))  # type: ignore[misc]
        if count is None:
            break
        written += count
    if written:
        transact(engine, lambda connection: _keep_open(connection, pairs))
    return written


def _keep_open(connection: Connection, pairs: Collection[tuple[int, str]]) -> None:
    breakers.keep_open(connection, pairs)
    domain_breakers.keep_open(connection)


def _portions(places: Collection[Place]) -> Iterator[list[Place]]:
    """Whole providers of slots, the current slot first."""
    portion: list[Place] = []
    for _, group in itertools.groupby(sorted(places, key=lambda place: (place[3], place[2])), key=lambda place: place[2:]):
        portion += group
        if len(portion) >= PORTION_ROWS:
            yield portion
            portion = []
    if portion:
        yield portion


def _write(
    connection: Connection,
    places: Collection[Place],
    wanted: Mapping[Place, Grant],
    fleet: Fleet,
    epoch: int,
    lowers: bool,
    beside: int | None,
) -> int | None:
    """Write a portion in the order of its keys; None if another plan is in force, or has written more."""
    if not in_force.is_still(connection, epoch, alone=beside is not None):
        return None
    if beside is None:
        in_force.count_portion(connection, epoch)
    elif in_force.portions(connection) != beside:
        return None
    stopped = breakers.not_closed(connection)
    domains = {pair for pair, breaker in domain_breakers.stopped(connection).items() if breaker.state == domain_breakers.OPEN}
    rows = [
        {
            "campaign_id": place[0], "server_id": place[1], "provider": place[2], "slot_start": place[3],
            "granted": wanted[place].granted, "used": 0, "planned": wanted[place].planned, "plan_epoch": epoch,
        }
        for place in sorted(places)
        if stopped.get(place[1:3], breakers.CLOSED) == fleet.breaker(*place[1:3]) and (place[0], place[2]) not in domains
    ]  # fmt: skip
    if beside is not None:
        rows = [{name: value for name, value in row.items() if name not in _STAMPS} for row in rows]
    if rows:
        connection.execute(_upsert(is_mysql(connection), lowers, _STAMPS if beside is None else ()), rows)
    return len(rows)


_STAMPS = ("planned", "plan_epoch")


def _upsert(mysql_family: bool, lowers: bool, stamps: Sequence[str]) -> sa.Insert:
    table = Allotment.__table__
    assert isinstance(table, sa.Table)
    least = table.c.used if lowers else table.c.granted
    if mysql_family:
        from sqlalchemy.dialects import mysql

        insert = mysql.insert(table)
        given = {name: sa.func.values(sa.column(name)) for name in ("granted", *stamps)}
        values: dict[str, Any] = given | {"granted": sa.func.greatest(least, given["granted"])}
        return insert.on_duplicate_key_update(**values)
    from sqlalchemy.dialects import sqlite

    upsert = sqlite.insert(table)
    values = {name: upsert.excluded[name] for name in stamps} | {"granted": sa.func.max(least, upsert.excluded.granted)}
    return upsert.on_conflict_do_update(index_elements=list(table.primary_key), set_=values)
