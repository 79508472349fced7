"""A world in the ledger."""

from __future__ import annotations

from pathlib import Path

import pytest
import sqlalchemy as sa

from tests.dispatch.world import World, make_world


@pytest.fixture
def world(engine: sa.Engine, tmp_path: Path) -> World:
    """120 recipients in four shards."""
    world = make_world(engine, tmp_path / "home", recipients=120, shards=4)
    world.set_campaign(
        audience_manifest={"rows": 120, "sha256": "-", "file": "-", "snapshots": {}}, audience_counts={"matched": 120, "audience": 120, "excluded": {}}
    )
    return world
