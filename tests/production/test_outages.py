"""A campaign goes on whatever of its surroundings is killed and started again, and at the far end every recipient has one copy."""

from __future__ import annotations

import pytest

from tests.production.fleet import Fleet

pytestmark = [
    pytest.mark.server,
    pytest.mark.timeout(400),
    pytest.mark.xdist_group("platform"),
    pytest.mark.parametrize("fleet", ["rabbitmq"], indirect=True),
]


def test_killed_surroundings_neither_lose_nor_repeat(fleet: Fleet) -> None:
    # So slow that on a busy machine as well rows are left after all of it.
    fleet.platform.limit(1.0)
    fleet.platform.schedule("outages")
    fleet.sending("outages")
    fleet.restart_dagster()
    fleet.sending("outages")
    assert fleet.backing.broker is not None
    assert fleet.backing.database is not None
    fleet.backing.broker.restart()
    # Sessions need no broker, and new runs find the one that came back.
    fleet.sending("outages")
    fleet.backing.database.kill()
    fleet.backing.database.start()
    fleet.sending("outages")
    fleet.quicken("outages")
    fleet.holds_promise("outages", unknown=48)
    # Also those that ended while there was no storage to record it.
    fleet.wait_for_ends("outages")
