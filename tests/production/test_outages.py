"""A campaign goes on whatever of its surroundings is killed and started again, what of it is held stays where it is, and at the far end every recipient
has one copy."""

from __future__ import annotations

import pytest
import sqlalchemy as sa

from mail_pipelines.database.engine import reading
from mail_pipelines.database.models import Claim, Delivery
from tests.parts.processes import wait_for
from tests.production.fleet import SERVERS, Fleet

HELD = "google"

pytestmark = [
    pytest.mark.server,
    pytest.mark.timeout(1200),
    pytest.mark.xdist_group("centre"),
    pytest.mark.parametrize("fleet", ["rabbitmq"], indirect=True),
]


def test_killed_surroundings_neither_lose_nor_repeat_nor_release_a_hold(fleet: Fleet) -> None:
    # So slow that on a busy machine as well rows are left after all of it.
    fleet.platform.limit(1.0)
    fleet.platform.schedule("outages")
    fleet.sending("outages")
    wait_for(lambda: arrived(fleet), what="a message of those that will be held")
    fleet.platform.command("mail-pipelines", "hold", "--provider", HELD, "--reason", "complaints")
    wait_for(lambda: not open_claims(fleet), what="the end of what was on its way")
    before, recipients = arrived(fleet), held_recipients(fleet)
    assert 0 < len(before) < len(recipients)
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
    for server in (None, *SERVERS):
        fleet.restart_worker(server)
        if server is not None:
            fleet.restart_catcher(server)
    # By sessions that know of the hold only from the database; mail to all others went out through all of it.
    fleet.sending("outages")
    assert arrived(fleet) == before
    fleet.platform.command("mail-pipelines", "release", "--provider", HELD)
    fleet.quicken("outages")
    fleet.holds_promise("outages", unknown=48)
    assert len(arrived(fleet)) > len(before)
    # Also those that ended while there was no storage to record it.
    fleet.wait_for_ends("outages")


def open_claims(fleet: Fleet) -> int:
    """Of what is held."""
    with reading(fleet.platform.engine) as connection:
        return connection.execute(sa.select(sa.func.count()).where(Claim.provider == HELD, Claim.state != "closed")).scalar_one()


def held_recipients(fleet: Fleet) -> set[int]:
    campaign_id = fleet.platform.campaign("outages").id
    with reading(fleet.platform.engine) as connection:
        return set(connection.execute(sa.select(Delivery.contact_id).where(Delivery.campaign_id == campaign_id, Delivery.provider == HELD)).scalars())


def arrived(fleet: Fleet) -> set[int]:
    """Recipients of what is held who have their copy."""
    return held_recipients(fleet) & set(fleet.platform.copies("outages"))
