"""A world in the ledger and a Dagster instance that belongs to it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import dagster as dg
import pytest
import sqlalchemy as sa

from tests.dispatch.world import World, make_world


@pytest.fixture(scope="session")
def _empty_instance(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an instance whose tables are made, which takes a third of a second."""
    folder = tmp_path_factory.mktemp("dagster")
    with dg.instance_for_test(temp_dir=str(folder)) as instance:
        instance.get_runs(limit=1)
        instance.all_asset_keys()
        instance.all_instigator_state()
    return folder


@pytest.fixture
def instance(_empty_instance: Path, tmp_path: Path) -> Iterator[dg.DagsterInstance]:
    folder = shutil.copytree(_empty_instance, tmp_path / "dagster")
    with dg.instance_for_test(temp_dir=str(folder)) as instance:
        yield instance


@pytest.fixture
def world(engine: sa.Engine, tmp_path: Path) -> World:
    """120 recipients in four shards."""
    world = make_world(engine, tmp_path / "home", recipients=120, shards=4)
    world.set_campaign(
        audience_manifest={"rows": 120, "sha256": "-", "file": "-", "snapshots": {}}, audience_counts={"matched": 120, "audience": 120, "excluded": {}}
    )
    return world
