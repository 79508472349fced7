"""An urgent campaign gets a slot within seconds, and no more than one of each server's sessions ends for it."""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable
from pathlib import Path

import pytest
import sqlalchemy as sa

from mail_pipelines.capacity import allotments
from mail_pipelines.database.engine import reading, transact
from mail_pipelines.database.models import Allotment, Campaign, Claim, State
from mail_pipelines.delivery import counters
from mail_pipelines.dispatch.giving_way import waits_for_a_slot
from mail_pipelines.dispatch.holds import Kind
from mail_pipelines.dispatch.servers import ServerInfo
from tests.dispatch.world import World, make_world

URGENT = 2


def another_campaign(world: World, *, priority: int, state: str = "sending", rows: State = State.PENDING) -> None:
    """Beside the world's own, with rows and a grant."""
    now = dt.datetime.now(dt.UTC)

    def work(connection: sa.Connection) -> None:
        given = dict(connection.execute(sa.select(Campaign.__table__).where(Campaign.id == world.campaign_id)).one()._mapping)
        connection.execute(sa.insert(Campaign).values(given | {"id": URGENT, "key": "urgent", "priority": priority, "state": state}))
        counters.add(connection, URGENT, counters.CENTRE, {(0, "google", rows, ""): 50}, now)

    transact(world.engine, work)
    allotments.fill(world.engine, 10)


def sessions(world: World, server: ServerInfo, *runs: tuple[str, int]) -> None:
    """Open claims of runs of campaigns."""
    now = dt.datetime.now(dt.UTC)
    place = {"shard": 0, "provider": "google", "size": 1, "state": "open", "incarnation": "i", "boot_id": "b", "journal_inode": 1, "journal_offset": 0}
    times = {"opened_at": now, "lease_until": now + dt.timedelta(seconds=60), "server_id": server.id}
    rows = [place | times | {"id": number, "campaign_id": campaign, "run_id": run} for number, (run, campaign) in enumerate(runs, 1)]
    transact(world.engine, lambda connection: connection.execute(sa.insert(Claim), rows))


def asked(world: World, server: ServerInfo, run_id: str) -> str | None:
    with reading(world.engine) as connection:
        return waits_for_a_slot(connection, server, run_id, slots=2)


@pytest.fixture
def world(engine: sa.Engine, tmp_path: Path) -> World:
    return make_world(engine, tmp_path / "home", recipients=20)


def test_one_session_gives_way_to_an_urgent_campaign(world: World) -> None:
    server = world.server()
    sessions(world, server, ("run-1", 1), ("run-2", 1))
    assert asked(world, server, "run-1") is None
    another_campaign(world, priority=3)
    assert asked(world, server, "run-1") == "urgent"
    assert asked(world, server, "run-2") is None


@pytest.mark.parametrize("runs", [[("run-1", 1)], [("run-1", 1), ("run-2", URGENT)]], ids=["a slot is free", "it has one"])
def test_no_session_ends_when_the_urgent_campaign_can_have_a_slot_or_has_one(world: World, runs: list[tuple[str, int]]) -> None:
    server = world.server()
    another_campaign(world, priority=3)
    sessions(world, server, *runs)
    assert [asked(world, server, run) for run, _ in runs] == [None] * len(runs)


def no_grant(world: World) -> None:
    another_campaign(world, priority=3)
    transact(world.engine, lambda connection: connection.execute(sa.update(Allotment).where(Allotment.campaign_id == URGENT).values(used=Allotment.granted)))


def held(world: World) -> None:
    another_campaign(world, priority=3)
    world.hold(Kind.CAMPAIGN, "urgent")


@pytest.mark.parametrize(
    "other",
    [
        no_grant,
        held,
        lambda world: another_campaign(world, priority=1),
        lambda world: another_campaign(world, priority=3, state="paused"),
        lambda world: another_campaign(world, priority=3, rows=State.DEFERRED),
    ],
    ids=["without a grant", "held", "of the same priority", "paused", "with nothing but deferred rows"],
)
def test_no_session_ends_for_a_campaign_that_could_not_use_the_slot(world: World, other: Callable[[World], None]) -> None:
    server = world.server()
    sessions(world, server, ("run-1", 1), ("run-2", 1))
    other(world)
    assert asked(world, server, "run-1") is None
