"""Holds through real Exim, in both of its modes."""

from __future__ import annotations

from pathlib import Path

import pytest
import sqlalchemy as sa

from mail_pipelines.dispatch.holds import Kind
from tests.dispatch.test_holds import (
    acts_within_five_seconds,
    test_a_hold_outlives_the_restart_of_everything,  # noqa: F401 (collected here for the other kinds)
)
from tests.dispatch.world import Servers

pytestmark = [pytest.mark.server, pytest.mark.timeout(600), pytest.mark.parametrize("database_url", ["mariadb"], indirect=True)]


@pytest.fixture(params=["exim", "burst"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


# One that ends the sessions, and one that leaves some of their lanes at work. To Exim a hold over a server is like the first.
@pytest.mark.parametrize("scope", [Kind.EVERYTHING, Kind.PROVIDER])
def test_a_hold_acts_within_five_seconds_at_full_speed(engine: sa.Engine, tmp_path: Path, kind: str, running: Servers, scope: Kind) -> None:
    acts_within_five_seconds(engine, tmp_path, kind, running, scope)
