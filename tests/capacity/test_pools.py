"""Pools: a campaign is granted its own pool's servers, and those of its overflow pool only where its own cannot send."""

from __future__ import annotations

import datetime as dt
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import sqlalchemy as sa

from mail_pipelines.capacity import allotments
from mail_pipelines.commands import context
from mail_pipelines.database.engine import database_now, reading, transact
from mail_pipelines.database.models import Allotment, Breaker, Campaign, Pool, ProviderUsage, State
from mail_pipelines.delivery import counters
from mail_pipelines.delivery.recording import slot_at
from mail_pipelines.dispatch import openings, servers
from mail_pipelines.dispatch.claims import NothingClaimed, OpenClaim
from mail_pipelines.dispatch.files import DispatchError
from mail_pipelines.dispatch.holds import Kind
from mail_pipelines.dispatch.pools import PoolError
from tests.dispatch.test_hold_commands import says
from tests.dispatch.world import World, make_world

HEARTBEAT = 10.0


@pytest.fixture
def world(engine: sa.Engine, tmp_path: Path) -> World:
    """A campaign of the pool `shop` (server `own`, limited to 5 an hour) with the overflow pool `spare` (server `spare-1`); `s9` is in neither."""
    context.settings.cache_clear()
    world = make_world(engine, tmp_path / "home", recipients=40)
    world.stop_the_clock()
    transact(engine, lambda connection: connection.execute(sa.insert(Pool), [{"id": 2, "key": "shop"}, {"id": 3, "key": "spare"}]))
    world.set_campaign(pool_id=2, overflow_pool_id=3)
    for key, pool in (("own", 2), ("spare-1", 3), ("s9", 1)):
        world.server(key)
        world.set_server(key, pool_id=pool, heartbeat_at=dt.datetime.now(dt.UTC))
    servers.set_limits(engine, "own", "*", {"per_second": 0.1, "per_hour": 60, "per_day": 500})
    return world


def granted(world: World) -> set[tuple[str, str]]:
    """(server, provider) that the campaign has an unspent grant for in this slot."""
    allotments.fill(world.engine, HEARTBEAT)
    with reading(world.engine) as connection:
        keys = {server.id: server.key for server in servers.all_servers(connection)}
        slot = slot_at(database_now(connection))
        found = connection.execute(sa.select(Allotment.server_id, Allotment.provider).where(Allotment.slot_start == slot, Allotment.granted > Allotment.used))
        return {(keys[row.server_id], row.provider) for row in found}


PROVIDERS = ("google", "microsoft", "other", "yahoo")
OWN = {("own", provider) for provider in PROVIDERS}
SPARE = {("spare-1", provider) for provider in PROVIDERS}


def use(world: World, length: int, used: int) -> None:
    def work(connection: sa.Connection) -> None:
        now = int(database_now(connection).timestamp())
        server = servers.find(connection, "own")
        values = {"server_id": server.id, "provider": "google", "window_seconds": length, "window_start": now - now % length, "used": used}
        connection.execute(sa.insert(ProviderUsage).values(**values))

    transact(world.engine, work)


def breaker(world: World, state: str) -> None:
    def work(connection: sa.Connection) -> None:
        values = {"server_id": servers.find(connection, "own").id, "provider": "google", "state": state, "rule": "blocked", "reason": "5 of 5 answers"}
        now = dt.datetime.now(dt.UTC)
        connection.execute(sa.insert(Breaker).values(**values, trips=1, until=now + dt.timedelta(hours=1), changed_at=now, baseline={}))

    transact(world.engine, work)


GOOGLE = {("spare-1", "google")}


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda world: None, OWN),
        (lambda world: world.set_server("own", heartbeat_at=dt.datetime.now(dt.UTC) - dt.timedelta(minutes=2)), OWN | SPARE),
        (lambda world: world.set_server("own", state="draining"), SPARE),
        (lambda world: world.hold(Kind.SERVER, "own"), SPARE),
        (lambda world: world.hold(Kind.POOL, "shop"), set()),
        (lambda world: world.hold(Kind.POOL, "spare"), OWN),
        (lambda world: breaker(world, "open"), OWN - {("own", "google")} | GOOGLE),
        (lambda world: breaker(world, "trial"), OWN),
        (lambda world: use(world, 900, 89), OWN),
        (lambda world: use(world, 900, 90), OWN - {("own", "google")} | GOOGLE),
        (lambda world: use(world, 3600, 60), OWN - {("own", "google")} | GOOGLE),
        (lambda world: use(world, 86400, 500), OWN - {("own", "google")} | GOOGLE),
        (lambda world: [world.set_server("own", state="paused"), world.set_campaign(overflow_pool_id=None)], set()),
        (lambda world: [world.set_server("own", state="paused"), world.set_server("spare-1", state="paused")], set()),
        (lambda world: world.set_campaign(overflow_pool_id=2), OWN),
    ],
    ids=[
        "all is well", "silent", "draining", "server held", "pool held", "overflow held", "refused", "on trial", "slot not spent", "slot spent", "hour spent",
        "day spent", "no overflow", "neither", "itself",
    ],
)  # fmt: skip
def test_the_overflow_pool_helps_where_the_own_pool_cannot_send(world: World, change: Callable[[World], object], expected: set[tuple[str, str]]) -> None:
    change(world)
    assert granted(world) == expected


def test_the_next_slot_is_the_own_pools(world: World) -> None:
    """Whether it needs help will be seen when it comes."""
    use(world, 3600, 60)
    granted(world)
    with reading(world.engine) as connection:
        spare = servers.find(connection, "spare-1").id
        slots = connection.execute(sa.select(Allotment.slot_start).where(Allotment.server_id == spare)).scalars().all()
        assert slots == [slot_at(database_now(connection))]


def test_campaigns_of_the_pool_and_those_it_helps_share_a_server(world: World) -> None:
    def second(connection: sa.Connection) -> None:
        row = dict(connection.execute(sa.select(Campaign.__table__).where(Campaign.id == 1)).mappings().one())
        connection.execute(sa.insert(Campaign).values(row | {"id": 2, "key": "summer", "pool_id": 3, "overflow_pool_id": None}))

    transact(world.engine, second)
    moves = Counter({(0, "google", State.PENDING, ""): 10})
    transact(world.engine, lambda connection: counters.add(connection, 2, 0, moves, dt.datetime.now(dt.UTC)))
    world.set_server("own", state="paused")
    allotments.fill(world.engine, HEARTBEAT)
    with reading(world.engine) as connection:
        spare = servers.find(connection, "spare-1").id
        slot = slot_at(database_now(connection))
        rows = connection.execute(
            sa.select(Allotment.campaign_id, Allotment.granted).where(
                Allotment.server_id == spare, Allotment.provider == "google", Allotment.slot_start == slot
            )
        )
        grants = {row.campaign_id: row.granted for row in rows}
    assert grants == {1: 225_000, 2: 225_000}


def test_nobody_outside_sends_whatever_was_granted_once(world: World) -> None:
    with reading(world.engine) as connection:
        fleet = {server.key: server for server in servers.all_servers(connection)}
    for server in fleet.values():
        world.grant(server)
    answer = world.claim(fleet["s9"], limit=1)
    assert isinstance(answer, NothingClaimed)
    assert (answer.reason, answer.ends_session) == ("server s9 is in none of the campaign's pools", True)
    assert isinstance(world.claim(fleet["own"], limit=1), OpenClaim)
    assert isinstance(world.claim(fleet["spare-1"], limit=1), OpenClaim)
    with reading(world.engine) as connection:
        found = openings.find(connection, dt.datetime.now(dt.UTC), slots=2, heartbeat_seconds=HEARTBEAT, in_flight=())
        assert {opening.server for opening in found} <= {"own", "spare-1"}
        assert found
        assert servers.choose(connection, 1, ["own", "s9"], HEARTBEAT).key == "own"
        with pytest.raises(DispatchError, match="no dispatch server of the campaign's pools"):
            servers.choose(connection, 1, ["s9"], HEARTBEAT)


def test_pools_as_an_operator_sees_them(world: World) -> None:
    assert says("pool", "add", "quiet") == "pool quiet is made\n"
    with pytest.raises(PoolError, match="there is a pool 'quiet' already"):
        says("pool", "add", "quiet")
    listed = says("pool", "list")
    assert " quiet 0 0 0 " in listed
    assert " shop 1 1 0 " in listed
    assert " spare 1 0 1 " in listed
    shown = says("pool", "show", "shop")
    assert "servers own (active)" in shown
    assert "campaigns spring" in shown
    assert says("server", "add", "q1", "--port", "2601", "--pool", "quiet") == "server q1 at 127.0.0.1:2601 is active\n"
    # Another port leaves it where it is.
    says("server", "add", "q1", "--port", "2602")
    assert "servers q1 (active)" in says("pool", "show", "quiet")
    assert " q1 catcher quiet 127.0.0.1:2602 " in says("server", "list")
    with pytest.raises(PoolError, match="there is no pool 'spar'; did you mean 'spare'"):
        says("server", "add", "q2", "--port", "2603", "--pool", "spar")
    says("hold", "--pool", "quiet", "--reason", "moving")
    assert "held moving (" in says("pool", "show", "quiet")
