"""Holds through real Exim, in both of its modes."""

from __future__ import annotations

import pytest

from tests.dispatch.test_holds import (  # noqa: F401 (collected here for the other kinds)
    test_a_hold_acts_within_five_seconds_at_full_speed,
    test_a_hold_outlives_the_restart_of_everything,
)

pytestmark = [pytest.mark.server, pytest.mark.timeout(240), pytest.mark.parametrize("database_url", ["mariadb"], indirect=True)]


@pytest.fixture(params=["exim", "burst"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)
