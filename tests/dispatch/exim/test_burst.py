"""Burst mode through real Exim: what holds in cutthrough mode holds here, and connections are used for many messages."""

from __future__ import annotations

from typing import Any

import pytest

from mail_pipelines.database.models import State
from tests.dispatch.test_session import Start, session, start  # noqa: F401 (a fixture)

pytestmark = [pytest.mark.server, pytest.mark.parametrize("database_url", ["mariadb"], indirect=True)]


def burst(**limits: Any) -> dict[str, Any]:
    return {"mode": "burst"} | limits


def test_everybody_gets_one_message(start: Start) -> None:  # noqa: F811
    world, server, _ = start(recipients=200, limits=burst())
    report = session(world, server).run()
    assert report.reason == "the shard is final"
    assert world.states() == {State.DELIVERED: 200}
    assert world.copies() == dict.fromkeys(range(1, 201), 1)
    assert world.open_claims() == 0
    world.check_counters()
