"""A key changes without a message that cannot be verified, for all servers or for one."""

from __future__ import annotations

import datetime as dt

import pytest
import sqlalchemy as sa

from mail_pipelines.config import Settings
from mail_pipelines.database.engine import reading
from mail_pipelines.database.models import DkimKey
from mail_pipelines.domains import records, rotation, signing, store
from mail_pipelines.domains.domain import KeyState, SendingDomain
from tests.domains.conftest import HOSTS, NOW, publish
from tests.parts.dns import Zone

DAY = dt.timedelta(days=1)


def states(engine: sa.Engine) -> dict[str, str]:
    with reading(engine) as connection:
        return {key.selector: key.state.value for key in store.load(connection, "shop.example").keys}


def selector(engine: sa.Engine, settings: Settings, server_id: int = 0) -> str:
    with reading(engine) as connection:
        found = signing.sending_as(connection, "shop.example", server_id, settings.token_key())
    assert found is not None
    return found.signer.selector


def test_the_new_key_signs_only_once_it_is_published(engine: sa.Engine, settings: Settings, zone: Zone, domain: SendingDomain) -> None:
    publish(zone, domain)
    made = rotation.rotate(engine, settings, "shop.example", NOW)
    assert (made.key.selector, made.key.state, made.retired) == ("mp20260302-2", KeyState.WAITING, None)
    assert selector(engine, settings) == "mp20260302"
    with pytest.raises(rotation.NotPublished, match=r"mp20260302-2 is not taken into use: DKIM: .* found nothing: publish it"):
        rotation.rotate(engine, settings, "shop.example", NOW + DAY)
    assert states(engine) == {"mp20260302": "active", "mp20260302-2": "waiting"}
    zone.publish(records.dkim_record("shop.example", made.key).zone_line())
    switched = rotation.rotate(engine, settings, "shop.example", NOW + DAY)
    assert switched.retired is not None
    assert (switched.key.selector, switched.retired.selector) == ("mp20260302-2", "mp20260302")
    assert states(engine) == {"mp20260302": "retired", "mp20260302-2": "active"}
    assert selector(engine, settings) == "mp20260302-2"


def test_a_retired_key_cannot_sign_any_more_and_stays_published_for_two_weeks(engine: sa.Engine, settings: Settings, domain: SendingDomain) -> None:
    for _ in range(2):
        rotation.rotate(engine, settings, "shop.example", NOW, allow_unverified=True)
    with reading(engine) as connection:
        rows = connection.execute(sa.select(DkimKey.selector, DkimKey.private_key)).all()
        now = store.load(connection, "shop.example")
    assert {row.selector: row.private_key is None for row in rows} == {"mp20260302": True, "mp20260302-2": False}

    def published(moment: dt.datetime) -> dict[str, bool]:
        found = records.records_of(now, HOSTS, moment)
        return {record.name.partition(".")[0]: record.required for record in found if record.purpose is records.Purpose.DKIM}

    assert published(NOW + 13 * DAY) == {"mp20260302": False, "mp20260302-2": True}
    assert published(NOW + 15 * DAY) == {"mp20260302-2": True}


def test_a_server_signs_with_its_own_key_and_the_others_with_the_common_one(engine: sa.Engine, settings: Settings, domain: SendingDomain) -> None:
    for _ in range(2):
        step = rotation.rotate(engine, settings, "shop.example", NOW, server_id=7, allow_unverified=True)
    assert (step.key.selector, step.retired) == ("mp20260302-2", None)
    assert selector(engine, settings, server_id=7) == "mp20260302-2"
    assert selector(engine, settings, server_id=8) == "mp20260302"
    for _ in range(2):
        rotation.rotate(engine, settings, "shop.example", NOW + DAY, server_id=7, allow_unverified=True)
    assert states(engine) == {"mp20260302": "active", "mp20260302-2": "retired", "mp20260303": "active"}
    assert selector(engine, settings, server_id=7) == "mp20260303"
