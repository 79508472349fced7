"""Holds over a campaign, a brand and a pool, measured at the far end: what is held stays, and what is not goes on meanwhile."""

from __future__ import annotations

import datetime as dt
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import sqlalchemy as sa

from mail_pipelines.database.engine import transact
from mail_pipelines.database.models import Brand, Campaign, Delivery, State
from mail_pipelines.delivery import counters
from mail_pipelines.dispatch import pools, servers
from mail_pipelines.dispatch.holds import Kind
from tests.dispatch.test_session import session
from tests.dispatch.world import Servers, World, make_world, write_play
from tests.parts.processes import wait_for

pytestmark = [pytest.mark.server, pytest.mark.timeout(480), pytest.mark.parametrize("database_url", ["mariadb"], indirect=True)]

RECIPIENTS = 1200


def test_campaign_brand_and_pool_stay_where_they_are_and_the_others_go_on(engine: sa.Engine, tmp_path: Path, running: Servers) -> None:
    spring = make_world(engine, tmp_path / "home", recipients=RECIPIENTS)
    fleet = [spring.server(key, connections=8, per_second=10.0) for key in ("s1", "s2")]
    # So slow that it is not through with it, however long the holds take.
    servers.set_limits(engine, "s2", "*", {"per_second": 3.0})
    for server in fleet:
        running.start(spring, server, write_play(tmp_path / "play.toml"))
    summer, fleet[1] = of_another_brand_and_pool(spring, fleet[1])
    with ThreadPoolExecutor() as threads:
        beside = threads.submit(session(summer, fleet[1], "beside").run)
        for kind in (Kind.CAMPAIGN, Kind.BRAND, Kind.POOL):
            before = len(list(times(spring)))
            run = threads.submit(session(spring, fleet[0], f"before {kind}").run)
            wait_for(lambda before=before: len(list(times(spring))) > before + 40, what="sending")  # type: ignore[misc]
            spring.hold(kind)
            held_at = time.time()
            assert run.result(60).reason == f"the {kind} is held: look"
            assert session(spring, fleet[0], f"{kind} held").run().claimed == 0
            wait_for(lambda held_at=held_at: max(times(summer)) > held_at + 6, what="what is not held")  # type: ignore[misc]
            assert [at - held_at for at in times(spring) if at > held_at + 5] == []
            assert spring.states()[State.PENDING] > 0
            spring.release(kind)
        summer.hold(Kind.CAMPAIGN)
        assert beside.result(60).reason == "the campaign is held: look"
    summer.release(Kind.CAMPAIGN)
    for world, server in zip((spring, summer), fleet, strict=True):
        servers.set_limits(engine, server.key, "*", {"connections": 12, "per_second": 500.0})
        assert session(world, server, f"released {world.campaign_key}").run().reason == "the shard is final"
    for world in (spring, summer):
        assert world.copies() == dict.fromkeys(range(1, RECIPIENTS + 1), 1)
        world.check_counters()
    assert spring.open_claims() == 0


def of_another_brand_and_pool(world: World, server: servers.ServerInfo) -> tuple[World, servers.ServerInfo]:
    """A campaign to the same recipients that has nothing in common with the world's own, and `server` as the one that sends it."""
    now = dt.datetime.now(dt.UTC)

    def work(connection: sa.Connection) -> int:
        connection.execute(sa.insert(Brand).values(id=2, key="other", name="Other", postal_address="", created_at=now))
        pools.add(connection, "other")
        pool_id = pools.find(connection, "other")
        campaign = dict(connection.execute(sa.select(Campaign.__table__).where(Campaign.id == world.campaign_id)).one()._mapping)
        connection.execute(sa.insert(Campaign).values(campaign | {"id": 2, "key": "summer", "brand_id": 2, "pool_id": pool_id}))
        rows = [dict(row._mapping) | {"campaign_id": 2} for row in connection.execute(sa.select(Delivery.__table__))]
        connection.execute(sa.insert(Delivery), rows)
        counters.add(connection, 2, counters.CENTRE, Counter((row["shard"], row["provider"], State.PENDING, "") for row in rows), now)
        return pool_id

    pool_id = transact(world.engine, work)
    world.set_server(server.key, pool_id=pool_id)
    return replace(world, campaign_id=2, campaign_key="summer"), replace(server, pool_id=pool_id)


def times(world: World) -> Iterator[float]:
    """When the messages of a world's campaign arrived (epoch seconds)."""
    ring = world.ring()
    for message in world.kept():
        if ring.read_delivery(message.token)[0].campaign_id == world.campaign_id:
            yield message.at
