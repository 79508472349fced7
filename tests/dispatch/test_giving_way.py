"""An urgent campaign gets a slot within seconds, and no more than one of each server's sessions ends for it."""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable
from pathlib import Path

import pytest
import sqlalchemy as sa

from mail_pipelines.capacity import allotments
from mail_pipelines.database.engine import reading, transact
from mail_pipelines.database.models import Allotment, Campaign, Claim, Delivery, State
from mail_pipelines.delivery import counters
from mail_pipelines.dispatch import giving_way, greylisting
from mail_pipelines.dispatch.giving_way import ERRAND_AFTER_SECONDS, Errand, errand_for, waits_for_a_slot
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


def errand(world: World, server: ServerInfo, run_id: str, *, waits: bool = False) -> Errand | None:
    with reading(world.engine) as connection:
        return errand_for(connection, server, run_id, world.campaign_id, slots=2, waits=waits)


def retries(world: World, *, priority: int = 3, since: float = ERRAND_AFTER_SECONDS + 5, state: str = "sending") -> None:
    """Two rows of another campaign that have been due for so long."""
    due = int(dt.datetime.now(dt.UTC).timestamp() - since)

    def work(connection: sa.Connection) -> None:
        given = connection.execute(sa.select(Delivery.__table__).where(Delivery.contact_id.in_((1, 2)))).all()
        rows = [dict(row._mapping) | {"campaign_id": URGENT, "provider": "google", "state": int(State.DEFERRED), "sort_key": due} for row in given]
        connection.execute(sa.insert(Delivery), rows)
        counters.add(connection, URGENT, counters.CENTRE, {(0, "google", State.DEFERRED, ""): 2 - 50}, dt.datetime.now(dt.UTC))

    another_campaign(world, priority=priority, rows=State.DEFERRED, state=state)
    transact(world.engine, work)


def give_window(world: World) -> None:
    window = {"from": "00:00", "until": "24:00", "zone": "Europe/Berlin"}
    transact(world.engine, lambda connection: connection.execute(sa.update(Campaign).where(Campaign.id == URGENT).values(send_window=window)))


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


def test_one_session_gives_way_where_a_send_window_has_opened(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its recipients are deferred ones, put off until now: too many for an errand."""
    monkeypatch.setattr(giving_way, "ROWS_TO_JOIN", 2)
    server = world.server()
    sessions(world, server, ("run-1", 1), ("run-2", 1))
    retries(world)
    assert asked(world, server, "run-1") is None
    give_window(world)
    assert asked(world, server, "run-1") == "urgent"
    monkeypatch.setattr(giving_way, "ROWS_TO_JOIN", 3)
    assert asked(world, server, "run-1") is None


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


def test_a_session_does_an_errand_for_the_retries_of_an_urgent_campaign(world: World) -> None:
    server = world.server()
    retries(world)
    sessions(world, server, ("run-1", 1), ("run-2", 1))
    assert errand(world, server, "run-1") == (URGENT, "urgent", 0)
    # One session for each server, and none ends.
    assert errand(world, server, "run-2") is None
    assert asked(world, server, "run-1") is None


def test_while_it_is_on_an_errand_a_session_is_still_the_one_that_gives_way(world: World) -> None:
    server = world.server()
    retries(world)
    sessions(world, server, ("run-1", 1), ("run-1", URGENT), ("run-2", 1))
    # And nobody else does it.
    assert errand(world, server, "run-2") is None
    transact(world.engine, lambda connection: connection.execute(sa.update(Campaign).where(Campaign.id == URGENT).values(state="paused")))
    with reading(world.engine) as connection:
        assert giving_way.at_work(connection, server).gives_way("run-1", 2)


def no_grant_for_retries(world: World) -> None:
    retries(world)
    transact(world.engine, lambda connection: connection.execute(sa.update(Allotment).where(Allotment.campaign_id == URGENT).values(used=Allotment.granted)))


def retries_of_a_held_provider(world: World) -> None:
    retries(world)
    world.hold(Kind.PROVIDER, "google")


def retries_for_another_server(world: World) -> None:
    retries(world)
    values = {"reason": greylisting.REASON, "server_id": world.server("s2").id}
    transact(world.engine, lambda connection: connection.execute(sa.update(Delivery).where(Delivery.campaign_id == URGENT).values(**values)))


@pytest.mark.parametrize(
    "other",
    [
        lambda world: retries(world, priority=1),
        lambda world: retries(world, since=0),
        lambda world: retries(world, state="paused"),
        no_grant_for_retries,
        retries_of_a_held_provider,
        retries_for_another_server,
        lambda world: another_campaign(world, priority=3),
    ],
    ids=["same priority", "due a moment ago", "paused", "no grant", "held provider", "of another server", "with pending rows"],
)
def test_no_errand_is_done_for_rows_that_need_none(world: World, other: Callable[[World], None]) -> None:
    server = world.server()
    other(world)
    sessions(world, server, ("run-1", 1), ("run-2", 1))
    assert errand(world, server, "run-1") is None


@pytest.mark.parametrize("runs", [[("run-1", 1)], [("run-1", 1), ("run-2", URGENT)]], ids=["a slot is free", "it has a session"])
def test_no_errand_is_done_for_who_can_come_itself(world: World, runs: list[tuple[str, int]]) -> None:
    server = world.server()
    retries(world)
    sessions(world, server, *runs)
    assert errand(world, server, "run-1") is None


def test_a_session_that_only_waits_does_errands_for_any_campaign(world: World) -> None:
    server = world.server()
    retries(world, priority=0)
    assert errand(world, server, "run-1", waits=True) == (URGENT, "urgent", 0)
    sessions(world, server, ("run-2", URGENT))
    assert errand(world, server, "run-1", waits=True) is None
