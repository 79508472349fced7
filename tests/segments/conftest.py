"""A world with fields and lists, on both databases."""

from __future__ import annotations

from pathlib import Path

import pytest
import sqlalchemy as sa

from tests.segments.world import World


@pytest.fixture
def world(engine: sa.Engine, tmp_path: Path) -> World:
    return World(engine, tmp_path / "snapshots").set_up()
