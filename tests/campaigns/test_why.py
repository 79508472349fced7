"""`mail-pipelines why`: the reason of one address, in the audience and out of it."""

from __future__ import annotations

import datetime as dt
from typing import Any

import pytest
import sqlalchemy as sa

from mail_pipelines.campaigns import audience, why
from mail_pipelines.campaigns.campaign import Unsubscribe
from mail_pipelines.config import Settings
from mail_pipelines.contacts import consent
from mail_pipelines.contacts.addresses import parse
from mail_pipelines.database import models
from mail_pipelines.database.engine import transact
from mail_pipelines.database.models import Delivery, DeliveryEvent, EngagementEvent, State
from tests.campaigns.parts import NOW, add_contacts, contact_rows, make_campaign, make_people, refresh_snapshots, save_segment
from tests.dispatch.test_hold_commands import says


def address(number: int) -> str:
    return str(contact_rows([number])[0]["email"])


def frozen(engine: sa.Engine, settings: Settings, **definition: Any) -> int:
    campaign = make_campaign(engine, state="scheduled", start_at=NOW, **definition)
    audience.build(engine, settings, campaign.key, NOW)
    return campaign.id


def reasons(engine: sa.Engine, settings: Settings, number: int) -> list[str]:
    return [moment.what for moment in why.of_campaign(engine, settings, address(number), "spring-sale", NOW).moments]


def test_the_condition_that_keeps_somebody_out_is_named_with_its_place(engine: sa.Engine, settings: Settings) -> None:
    make_people(engine, settings, 20)
    save_segment(engine, "some", {"all": [{"field": "number", "op": ">", "value": 2}, {"any": [{"not": {"field": "number", "op": "=", "value": 5}}]}]})
    save_segment(engine, "ten", {"field": "number", "op": "=", "value": 10})
    frozen(engine, settings, include=("some",), exclude=("ten",))
    assert reasons(engine, settings, 1) == ["not in segment some: all[0]: {field: number, op: '>', value: 2} is not true"]
    assert reasons(engine, settings, 5) == ["not in segment some: all[1].any[0].not: {field: number, op: '=', value: 5} is true"]
    assert reasons(engine, settings, 10) == ["in segment ten, which the campaign excludes"]
    assert why.of_campaign(engine, settings, address(1), "spring-sale", NOW).verdict == "not in the audience"


def test_consent_and_absence_are_named_with_their_time(engine: sa.Engine, settings: Settings) -> None:
    make_people(engine, settings, 20)
    long_ago = NOW - dt.timedelta(days=30)

    def forbid(connection: sa.Connection) -> None:
        consent.suppress(connection, [parse(address(1)).hash], reason="bounce", now=long_ago)
        consent.suppress_domain(connection, parse(address(2)).domain, reason="manual", now=long_ago)

    transact(engine, forbid)
    frozen(engine, settings)
    answer = why.of_campaign(engine, settings, address(1), "spring-sale", NOW)
    assert answer.moments == [why.Moment(long_ago, "the address is suppressed (bounce) for everything")]
    assert reasons(engine, settings, 2) == ["the domain yahoo.com is suppressed (manual) for everything"]
    nobody = why.of_campaign(engine, settings, "nobody@example.net", "spring-sale", NOW)
    assert [moment.what for moment in nobody.moments] == ["there is no contact with this address: never imported, or erased"]
    add_contacts(engine, 21, 21)
    transact(engine, lambda connection: connection.execute(sa.update(models.Contact).where(models.Contact.id == 21).values(created_at=NOW + dt.timedelta(1))))
    assert reasons(engine, settings, 21) == [
        "the contact was added after the campaign began (2026-03-02 09:00:00 UTC)",
        "the contact is not in the snapshot of this time, which segments are evaluated on",
    ]
    refresh_snapshots(engine, settings, NOW + dt.timedelta(days=1))
    assert len(reasons(engine, settings, 21)) == 1


def test_who_left_the_list_is_told_so(engine: sa.Engine, settings: Settings) -> None:
    make_people(engine, settings, 3)

    def subscribe(connection: sa.Connection) -> None:
        connection.execute(sa.insert(models.ContactList).values(id=7, key="news", name="News", brand_id=1, created_at=NOW))
        rows = [{"contact_id": number, "list_id": 7, "subscribed": number != 2, "source": "form", "changed_at": NOW} for number in (1, 2, 3)]
        connection.execute(sa.insert(models.Subscription), rows)

    transact(engine, subscribe)
    frozen(engine, settings, unsubscribe=Unsubscribe.LIST, list="news")
    assert reasons(engine, settings, 2) == ["unsubscribed from the list news"]


def test_what_became_of_a_recipient_is_told_in_order(engine: sa.Engine, settings: Settings) -> None:
    make_people(engine, settings, 5)
    campaign_id = frozen(engine, settings)

    def at(minutes: int) -> dt.datetime:
        return NOW + dt.timedelta(minutes=minutes)

    def happen(connection: sa.Connection) -> None:
        connection.execute(sa.insert(models.Server).values(id=3, key="mx3", kind="exim", host="127.0.0.1", port=25, pool_id=1, state="active", created_at=NOW))
        event = {"month": 202603, "server_id": 3, "campaign_id": campaign_id, "contact_id": 2}
        deferred = {
            "id": 1,
            "occurred_at": at(2),
            "attempt": 0,
            "kind": "deferred",
            "code": 450,
            "enhanced": "4.2.0",
            "reason": "rate_limited",
            "text": "slow down",
        }
        connection.execute(sa.insert(DeliveryEvent).values(**event, **deferred))
        opened = {"month": 202603, "id": 2, "occurred_at": at(60), "recorded_at": at(61), "campaign_id": campaign_id, "contact_id": 2, "kind": "open"}
        connection.execute(sa.insert(EngagementEvent).values(**opened, machine=True))
        values = {"state": int(State.DELIVERED), "attempt": 1, "sort_key": int(at(30).timestamp()), "server_id": 3, "code": 250}
        connection.execute(sa.update(Delivery).where(Delivery.contact_id == 2).values(values))

    transact(engine, happen)
    answer = why.of_campaign(engine, settings, address(2), "spring-sale", NOW)
    assert answer.verdict == "delivered, through mx3: it was taken by the destination"
    assert answer.moments == [
        why.Moment(NOW, f"frozen into the audience of 5 (segments everybody), shard 0, provider {contact_rows([2])[0]['provider']}"),
        why.Moment(at(2), "attempt 0 through mx3: deferred, 450 4.2.0 rate_limited slow down"),
        why.Moment(at(30), "delivered, 250"),
        why.Moment(at(60), "open by a machine"),
    ]
    waiting = why.of_campaign(engine, settings, address(1), "spring-sale", NOW)
    assert (waiting.verdict, waiting.moments[-1]) == ("pending: it waits for its turn", why.Moment(None, "pending"))


def test_somebody_erased_since_is_still_answered(engine: sa.Engine, settings: Settings) -> None:
    make_people(engine, settings, 5)
    frozen(engine, settings)
    assert transact(engine, lambda connection: consent.erase(connection, 4, now=NOW))
    assert why.of_campaign(engine, settings, address(4), "spring-sale", NOW).verdict.startswith("pending")


def test_the_command_shows_the_newest_campaigns_and_then_one(engine: sa.Engine, settings: Settings, database_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from mail_pipelines.commands import context

    monkeypatch.setenv("MAIL_PIPELINES_DATABASE__URL", database_url)
    context.settings.cache_clear()
    make_people(engine, settings, 5)
    save_segment(engine, "some", {"field": "number", "op": ">", "value": 2})
    frozen(engine, settings, include=("some",))
    make_campaign(engine, "Later")
    assert "later its audience is not frozen yet" in says("why", address(1))
    assert "spring-sale not in the audience" in says("why", address(1))
    assert "spring-sale pending: it waits for its turn" in says("why", address(3))
    assert "criteria: {field: number, op: '>', value: 2} is not true" in says("why", address(1), "--campaign", "spring-sale")
    context.settings.cache_clear()
