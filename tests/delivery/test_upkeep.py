"""Upkeep drops what nothing refers to, in bounded transactions, and keeps what a server proves itself by."""

from __future__ import annotations

import datetime as dt
from pathlib import Path

import pytest
import sqlalchemy as sa

from mail_pipelines.database import pruning
from mail_pipelines.database.engine import reading, transact
from mail_pipelines.database.models import Allotment, Base, Claim, ProviderUsage, WindowRows, WindowSpan
from mail_pipelines.delivery import upkeep
from mail_pipelines.dispatch import servers
from mail_pipelines.dispatch.claims import Memory, OpenClaim
from mail_pipelines.dispatch.files import boot_id
from tests.campaigns.parts import NOW, make_campaign
from tests.dispatch.world import make_world
from tests.parts.transactions import sizes_of_transactions

DAY = dt.timedelta(days=1)


def add_claims(engine: sa.Engine, campaign_id: int, server_id: int, opened: list[dt.datetime], *, first_id: int, state: str = "closed") -> None:
    fixed = {"campaign_id": campaign_id, "shard": 0, "provider": "other", "server_id": server_id, "run_id": "r", "size": 1, "state": state}
    place = {"incarnation": "i", "boot_id": boot_id(), "journal_inode": 0, "journal_offset": 0}
    rows = [
        fixed | place | {"id": first_id + number, "opened_at": at, "lease_until": at, "closed_at": at if state == "closed" else None}
        for number, at in enumerate(opened)
    ]
    transact(engine, lambda connection: connection.execute(sa.insert(Claim), rows))


def kept_claims(engine: sa.Engine, server_id: int) -> list[int]:
    with reading(engine) as connection:
        return list(connection.execute(sa.select(Claim.id).where(Claim.server_id == server_id).order_by(Claim.id)).scalars())


def test_each_server_keeps_the_claims_of_its_own_last_two_weeks(engine: sa.Engine) -> None:
    campaign = make_campaign(engine, state="finished")
    add_claims(engine, campaign.id, 1, [NOW - day * DAY for day in range(30)], first_id=100)
    add_claims(engine, campaign.id, 2, [NOW - day * DAY for day in range(60, 90)], first_id=200)
    assert upkeep.prune(engine, NOW)["claims"] == 32
    assert kept_claims(engine, 1) == list(range(100, 114))
    # Idle for two months, and still there.
    assert kept_claims(engine, 2) == list(range(200, 214))
    assert upkeep.prune(engine, NOW + 365 * DAY)["claims"] == 0


def test_open_claims_and_those_of_running_campaigns_are_kept(engine: sa.Engine) -> None:
    for number, state in enumerate(("sending", "paused", "finished")):
        campaign = make_campaign(engine, state, state=state)
        add_claims(engine, campaign.id, 1, [NOW - 40 * DAY], first_id=100 * number)
    add_claims(engine, campaign.id, 1, [NOW - 40 * DAY], first_id=300, state="settling")
    add_claims(engine, campaign.id, 1, [NOW], first_id=400)
    assert upkeep.prune(engine, NOW)["claims"] == 1
    assert kept_claims(engine, 1) == [0, 100, 300, 400]


def test_a_server_that_was_idle_for_a_month_is_not_refused(engine: sa.Engine, tmp_path: Path) -> None:
    world = make_world(engine, tmp_path / "home", recipients=12)
    idle, busy = world.server("idle"), world.server("busy")

    def claim(server: servers.ServerInfo, memory: Memory) -> object:
        world.grant(server)
        return world.claim(server, limit=1, memory=memory)

    memory = servers.recall(engine, world.folders("idle"))
    opened = claim(idle, memory)
    assert isinstance(opened, OpenClaim)
    now = dt.datetime.now(dt.UTC)
    month_ago = {"state": "closed", "opened_at": now - 31 * DAY, "closed_at": now - 31 * DAY}
    transact(engine, lambda connection: connection.execute(sa.update(Claim).values(month_ago)))
    old = make_campaign(engine, "old", state="finished")
    transact(engine, lambda connection: connection.execute(sa.update(Claim).values(campaign_id=old.id)))
    add_claims(engine, old.id, busy.id, [now], first_id=7)
    transact(engine, lambda connection: connection.execute(sa.delete(Allotment)))
    upkeep.prune(engine, now)
    assert isinstance(claim(idle, Memory(memory.generation, opened.ref.id)), OpenClaim)


def test_old_rows_of_every_table_go_in_bounded_transactions_and_young_ones_stay(engine: sa.Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pruning, "CHUNK_ROWS", 20)
    campaign = make_campaign(engine, state="finished")
    second = int(NOW.timestamp())
    old, young = second - 4 * 86400, second - 2 * 86400
    add_claims(engine, campaign.id, 1, [NOW - 30 * DAY] * 70 + [NOW] * 5, first_id=1)
    # More rows in one slot than fit into a transaction.
    grants = [
        {"campaign_id": number % 7, "server_id": number % 3, "provider": f"p{number}", "slot_start": start, "granted": 1, "used": 0}
        for start in (old - 900, old, young)
        for number in range(50)
    ]
    windows = [
        {"server_id": number % 3, "provider": f"p{number}", "window_seconds": length, "window_start": start, "used": 1}
        for start in (old, young)
        for length in (900, 3600)
        for number in range(30)
    ]
    transact(engine, lambda connection: (connection.execute(sa.insert(Allotment), grants), connection.execute(sa.insert(ProviderUsage), windows)))
    running = make_campaign(engine, "running", state="sending")
    spans = [
        {"campaign_id": number, "time_zone": f"z{opens}", "opens_at": opens, "closes_at": opens + 1}
        for number in (campaign.id, running.id)
        for opens in range(50)
    ]
    waiting = [{"campaign_id": campaign.id, "provider": f"p{number}", "time_zone": "", "opens_at": 1, "count": 1} for number in range(30)]
    transact(engine, lambda connection: (connection.execute(sa.insert(WindowSpan), spans), connection.execute(sa.insert(WindowRows), waiting)))
    with sizes_of_transactions(engine, "DELETE") as sizes:
        assert upkeep.prune(engine, NOW) == {
            "claims": 70,
            "allotments": 100,
            "provider_usage": 60,
            "warm_up_days": 0,
            "reputation": 0,
            "window_spans": 50,
            "window_rows": 30,
        }
    assert sum(sizes) == 310
    assert max(sizes) <= 20

    def left(table: type[Base]) -> int:
        with reading(engine) as connection:
            return connection.execute(sa.select(sa.func.count()).select_from(table)).scalar_one()

    assert (left(Claim), left(Allotment), left(ProviderUsage)) == (5, 50, 60)
    assert upkeep.prune(engine, NOW) == dict.fromkeys(
        ("claims", "allotments", "provider_usage", "warm_up_days", "reputation", "window_spans", "window_rows"), 0
    )
