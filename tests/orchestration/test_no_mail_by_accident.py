"""Rows move only while the campaign is sending, whatever is materialised, wiped, re-executed or backfilled."""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterator
from pathlib import Path

import dagster as dg
import pytest

from mail_pipelines import partitions
from mail_pipelines.assets.audience import campaign_audiences, contact_snapshot, engagement_snapshot
from mail_pipelines.assets.sending import send_batches
from mail_pipelines.database.models import State
from mail_pipelines.dispatch import claims, servers
from mail_pipelines.dispatch.journal import Position
from mail_pipelines.resources.database import CentralDatabase
from mail_pipelines.resources.server import DispatchServer
from tests.dispatch.world import Running, World, write_play

RESOURCES = {"database": CentralDatabase(), "server": DispatchServer()}
SHARDS = (0, 3, 63)

pytestmark = pytest.mark.server


@pytest.fixture
def catcher(world: World, tmp_path: Path) -> Iterator[Running]:
    catcher = Running(world, world.server("s1"), write_play(tmp_path / "play.toml"))
    yield catcher
    catcher.stop()


def send(instance: dg.DagsterInstance, shard: int) -> dg.ExecuteInProcessResult:
    result = dg.materialize(
        [send_batches, dg.AssetSpec("campaign_audiences", partitions_def=partitions.campaigns)],
        selection=[send_batches],
        partition_key=partitions.batch_key("spring", shard),
        instance=instance,
        resources=RESOURCES,
    )
    assert result.success
    return result


def freeze(instance: dg.DagsterInstance) -> dg.ExecuteInProcessResult:
    result = dg.materialize(
        [campaign_audiences, contact_snapshot, engagement_snapshot],
        selection=[campaign_audiences],
        partition_key="spring",
        instance=instance,
        resources=RESOURCES,
    )
    assert result.success
    return result


def test_materialising_everything_sends_nothing(world: World, catcher: Running, instance: dg.DagsterInstance) -> None:
    before = world.states()
    for state in ("draft", "scheduled", "paused", "cancelled", "finished"):
        world.set_campaign(state=state, start_at=dt.datetime.now(dt.UTC) + dt.timedelta(days=1))
        # Again with nothing in Dagster that tells of the time before.
        instance.add_dynamic_partitions("campaigns", ["spring"])
        freeze(instance)
        for shard in SHARDS:
            send(instance, shard)
        instance.wipe_assets([send_batches.key, campaign_audiences.key])
        instance.delete_dynamic_partition("campaigns", "spring")
        assert (state, world.kept()) == (state, [])
        assert (state, world.states()) == (state, before)
    world.check_counters()


def test_sending_again_after_everything_was_sent_sends_nothing(world: World, catcher: Running, instance: dg.DagsterInstance) -> None:
    instance.add_dynamic_partitions("campaigns", ["spring"])
    for shard in range(4):
        send(instance, shard)
    assert len(world.kept()) == 120
    assert set(world.copies().values()) == {1}
    instance.wipe_assets([send_batches.key])
    for shard in SHARDS:
        send(instance, shard)
    assert len(world.kept()) == 120


def test_a_partition_is_green_only_when_no_row_is_open(world: World, catcher: Running, instance: dg.DagsterInstance) -> None:
    instance.add_dynamic_partitions("campaigns", ["spring"])
    world.set_campaign(state="paused")
    stopped = send(instance, 0)
    assert stopped.get_asset_materialization_events() == []
    (observation,) = stopped.get_asset_observation_events()
    metadata = observation.asset_observation_data.asset_observation.metadata
    assert metadata["reason"].value == "the campaign is paused"
    assert metadata["open"].value == 30
    world.set_campaign(state="sending")
    (event,) = send(instance, 0).get_asset_materialization_events()
    assert event.materialization.metadata["open"].value == 0
    # The other shards have something due, too.
    assert event.materialization.metadata["sent"].value == 120
    assert event.materialization.metadata["shards"].value == 4
    assert event.materialization.metadata["server"].value == "s1"


def test_a_run_meant_for_another_server_is_refused(world: World, catcher: Running, instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch) -> None:
    instance.add_dynamic_partitions("campaigns", ["spring"])
    monkeypatch.setenv("MAIL_PIPELINES_SERVER", "s1")
    result = dg.materialize(
        [send_batches, dg.AssetSpec("campaign_audiences", partitions_def=partitions.campaigns)],
        selection=[send_batches],
        partition_key=partitions.batch_key("spring", 0),
        instance=instance,
        resources=RESOURCES,
        tags={"dagster-celery/queue": "s2"},
        raise_on_error=False,
    )
    assert not result.success
    assert world.kept() == []


def test_what_a_killed_run_left_is_settled_even_if_the_campaign_was_cancelled_since(world: World, catcher: Running, instance: dg.DagsterInstance) -> None:
    """Its rows would stay claimed for ever, and the shard never final."""
    instance.add_dynamic_partitions("campaigns", ["spring"])
    world.grant(catcher.server)
    opened = claims.open_claim(
        world.engine,
        world.sender(catcher.server),
        servers.recall(world.engine, catcher.folders),
        claim_id=claims.new_id(),
        campaign_id=1,
        shard=1,
        provider="google",
        limit=5,
        position=Position(catcher.folders.journal.stat().st_ino, 0),
        lease_seconds=60,
    )
    assert isinstance(opened, claims.OpenClaim)
    world.set_campaign(state="cancelled")
    send(instance, 1)
    # No marker line of this claim is in the journal: nothing proves that nothing was offered.
    assert world.states()[State.UNKNOWN] == len(opened.rows) > 0
    assert world.states()[State.CLAIMED] == 0
    assert world.open_claims() == 0
    assert world.kept() == []
    world.check_counters()
