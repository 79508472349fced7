"""A server's name has one owner, a run gets a server that speaks, and a lost server's rows are unknown."""

from __future__ import annotations

import datetime as dt
import shutil
import threading
from pathlib import Path

import pytest
import sqlalchemy as sa

from mail_pipelines.config import ConfigError, load
from mail_pipelines.database.engine import reading, transact
from mail_pipelines.database.models import Campaign, Delivery, Server, State
from mail_pipelines.dispatch import claims, servers, settlement
from mail_pipelines.dispatch.claims import OpenClaim
from mail_pipelines.dispatch.files import DispatchError
from mail_pipelines.dispatch.journal import Position
from mail_pipelines.dispatch.servers import Heartbeat, NameTaken
from mail_pipelines.doctor.fleet import check_servers
from tests.dispatch.world import World, make_world


@pytest.fixture
def world(engine: sa.Engine, tmp_path: Path) -> World:
    return make_world(engine, tmp_path / "home", recipients=40)


def fresh(world: World, key: str) -> servers.ServerInfo:
    """Registered, and never started."""
    folders = world.folders(key)
    folders.make()
    return servers.register(world.engine, key, kind="catcher", host="127.0.0.1", port=1, now=dt.datetime.now(dt.UTC))


def beat_at(world: World, key: str, seconds_ago: float) -> None:
    moment = dt.datetime.now(dt.UTC) - dt.timedelta(seconds=seconds_ago)
    transact(world.engine, lambda connection: connection.execute(sa.update(Server).where(Server.key == key).values(heartbeat_at=moment)))


def test_a_clone_cannot_start_and_the_owner_goes_on(world: World) -> None:
    fresh(world, "s1")
    owner = Heartbeat(world.engine, "s1", world.folders("s1"), 10)
    owner.start()
    shutil.copytree(world.folders("s1").log, world.folders("clone").log)
    owner.beat()
    clone = Heartbeat(world.engine, "s1", world.folders("clone"), 10)
    with pytest.raises(NameTaken, match="another process speaks for server s1"):
        clone.start()
    owner.beat()


def test_the_first_of_two_stops_when_a_silent_name_was_taken_over(world: World) -> None:
    fresh(world, "s1")
    first = Heartbeat(world.engine, "s1", world.folders("s1"), 10)
    first.start()
    shutil.copytree(world.folders("s1").log, world.folders("clone").log)
    first.beat()
    # By its own interval the clone has been waiting for long.
    second = Heartbeat(world.engine, "s1", world.folders("clone"), 0.0001)
    second.start()
    with pytest.raises(NameTaken, match="taken over"):
        first.beat()
    second.beat()


def test_a_killed_server_takes_its_own_name_again_at_once(world: World) -> None:
    """Whether or not its last beat was committed."""
    fresh(world, "s1")
    first = Heartbeat(world.engine, "s1", world.folders("s1"), 10)
    first.start()
    kept = world.folders("s1").heartbeat.read_text()
    first.beat()
    again = Heartbeat(world.engine, "s1", world.folders("s1"), 10)
    again.start()
    again._keep([*again._possible, "a beat that was written down and not committed"])
    third = Heartbeat(world.engine, "s1", world.folders("s1"), 10)
    third.start()
    assert kept != world.folders("s1").heartbeat.read_text()


def test_a_run_without_a_server_gets_one_that_speaks_and_has_most_left(world: World) -> None:
    fleet = [world.server(key) for key in ("s1", "s2", "s3")]
    for key, ago in (("s1", 1), ("s2", 1), ("s3", 500)):
        beat_at(world, key, ago)
        world.folders(key).journal.touch()
    for server, amount in zip(fleet, (10, 50, 900), strict=True):
        world.grant(server, amount)
    with reading(world.engine) as connection:
        assert servers.for_run(connection, world.settings, 1, own=None, hint=None).key == "s2"
        assert servers.for_run(connection, world.settings, 1, own=None, hint="s1").key == "s1"
        assert servers.for_run(connection, world.settings, 1, own="s1", hint=None).key == "s1"
        with pytest.raises(DispatchError, match="meant for server s2, but this worker speaks for s1"):
            servers.for_run(connection, world.settings, 1, own="s1", hint="s2")
    world.folders("s2").journal.unlink()
    with reading(world.engine) as connection:
        assert servers.for_run(connection, world.settings, 1, own=None, hint=None).key == "s1"
        with pytest.raises(DispatchError, match="s2 has no journal on this host"):
            servers.for_run(connection, world.settings, 1, own=None, hint="s2")
    for key in ("s1", "s2"):
        beat_at(world, key, 500)
    with reading(world.engine) as connection, pytest.raises(DispatchError, match="no dispatch server of the campaign's pools is active, speaking and not held"):
        servers.for_run(connection, world.settings, 1, own=None, hint=None)


def open_claim(world: World, server: servers.ServerInfo, campaign_id: int = 1, limit: int = 5) -> OpenClaim | claims.NothingClaimed:
    return claims.open_claim(
        world.engine,
        world.sender(server),
        servers.recall(world.engine, world.folders(server.key)),
        claim_id=claims.new_id(),
        campaign_id=campaign_id,
        shard=0,
        provider="google",
        limit=limit,
        position=Position(1, 0),
        lease_seconds=120,
    )


def test_what_a_lost_server_had_in_hand_is_unknown(world: World) -> None:
    server = world.server()
    world.grant(server)
    assert isinstance(open_claim(world, server), OpenClaim)
    assert settlement.give_up(world.engine, server.id) == 5
    assert world.states() == {State.PENDING: 35, State.UNKNOWN: 5}
    assert world.open_claims() == 0
    world.check_counters()
    assert settlement.give_up(world.engine, server.id) == 0


def test_two_campaigns_that_meet_in_a_new_window_do_not_exceed_the_limit(world: World) -> None:
    """Failure scenario 9: the window has no row yet, and both read it as empty."""
    server = world.server(per_hour=6)
    world.stop_the_clock()

    def second_campaign(connection: sa.Connection) -> None:
        values = dict(connection.execute(sa.select(Campaign.__table__).where(Campaign.id == 1)).mappings().one()) | {"id": 2, "key": "summer"}
        connection.execute(sa.insert(Campaign).values(values))
        rows = [dict(row) | {"campaign_id": 2} for row in connection.execute(sa.select(Delivery.__table__)).mappings()]
        connection.execute(sa.insert(Delivery), rows)

    transact(world.engine, second_campaign)
    for campaign in (1, 2):
        world.campaign_id = campaign
        world.grant(server)
    together = threading.Barrier(2)
    taken: list[int] = []

    def claim(campaign: int) -> None:
        together.wait()
        opened = open_claim(world, server, campaign)
        taken.append(len(opened.rows) if isinstance(opened, OpenClaim) else 0)

    threads = [threading.Thread(target=claim, args=(campaign,)) for campaign in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(taken) == 6
    assert world.usage(server, "google")[3600] == 6


def test_servers_of_another_version_are_named(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    fresh(world, "s1")
    fresh(world, "s2")
    Heartbeat(world.engine, "s1", world.folders("s1"), 10).start()
    monkeypatch.setattr(servers, "__version__", "0.0.9")
    Heartbeat(world.engine, "s2", world.folders("s2"), 10).start()
    (finding,) = check_servers(world.engine, 10)
    assert "s2 (0.0.9)" in finding.problem
    assert "s1" not in finding.problem


def test_a_memory_that_a_power_loss_emptied_is_made_anew(world: World) -> None:
    world.server()
    folders = world.folders("s1")
    before = servers.recall(world.engine, folders)
    folders.memory.write_text("")
    assert servers.recall(world.engine, folders) == before


@pytest.mark.parametrize("limits", [{"per_second": 0.0}, {"connections": 0}, {"per_hour": -1}, {"messages_per_connection": 0}])
def test_limits_under_which_nothing_could_be_sent_are_refused(world: World, limits: dict[str, float]) -> None:
    with pytest.raises(DispatchError, match="expected more than 0"):
        servers.set_limits(world.engine, None, "*", limits)


def test_a_lease_shorter_than_a_reply_may_take_is_refused(tmp_path: Path) -> None:
    environ = {"MAIL_PIPELINES_HOME": str(tmp_path), "MAIL_PIPELINES_SENDING__LEASE_SECONDS": "20", "MAIL_PIPELINES_SENDING__REPLY_TIMEOUT_SECONDS": "15"}
    with pytest.raises(ConfigError, match="lease_seconds is 20: it must be at least"):
        load(environ)
