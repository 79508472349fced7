"""Servers that are taken out, through real Exim in both of its modes, and what its beats tell."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import sqlalchemy as sa

from mail_pipelines.commands import context
from tests.dispatch.test_hold_commands import says
from tests.dispatch.test_registry import (  # noqa: F401 (collected here for the other kinds)
    at_work,
    test_a_server_taken_out_at_full_speed_ends_what_it_has_in_hand,
)
from tests.dispatch.world import Servers, make_world, write_play

pytestmark = [pytest.mark.server, pytest.mark.parametrize("database_url", ["mariadb"], indirect=True)]


@pytest.fixture(params=["exim", "burst"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_the_first_beat_tells_version_and_queue(engine: sa.Engine, tmp_path: Path, kind: str, running: Servers) -> None:
    context.settings.cache_clear()
    world = make_world(engine, tmp_path / "home", recipients=1, kind=kind)
    running.start(world, world.server(), write_play(tmp_path / "play.toml"))
    shown = says("server", "show", "s1")
    assert re.search(r"mail server Exim 4\.\d+", shown), shown
    assert "queue 0 messages" in shown
