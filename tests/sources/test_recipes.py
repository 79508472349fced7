"""The recipes against servers that behave as the services do: everything arrives, nobody who left there or here is subscribed, who leaves here leaves there."""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
import yaml

from mail_pipelines.contacts import consent, lists
from mail_pipelines.database.engine import transact
from mail_pipelines.database.models import SyncOutbox
from mail_pipelines.sources import declaration, outbox, status, telling
from mail_pipelines.sources.declaration import Source
from mail_pipelines.sources.errors import SourceError
from mail_pipelines.sources.running import Report
from tests.parts.web import says, serving
from tests.sources import hubspot, salesforce, shopify
from tests.sources.conftest import contacts, engaged, ids, subscribed
from tests.sources.test_write_back import dead, make_due, states, unsubscribe

# What differs between the databases is tested with the other sources.
pytestmark = [pytest.mark.slow, pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)]
Sync = Callable[..., Report]
PEOPLE = 450
LATER, LATEST = "2026-02-01T00:00:00.000Z", "2026-03-01T00:00:00.000Z"
WHO_LEFT = {f"p{number}@example.test" for number in range(3, PEOPLE + 1, 10)}
ALL = {f"p{number}@example.test" for number in range(1, PEOPLE + 1)}
SECRETS = {
    "HUBSPOT_TOKEN": hubspot.KEY,
    "SALESFORCE_CLIENT_ID": salesforce.CLIENT,
    "SALESFORCE_CLIENT_SECRET": salesforce.SECRET,
    "SHOPIFY_CLIENT_ID": shopify.CLIENT,
    "SHOPIFY_CLIENT_SECRET": shopify.SECRET,
}
OWN: dict[str, dict[str, Any]] = {
    "hubspot": {"consent": {"subscribe": "always", "evidence": "form of the fair"}},
    "salesforce": {"map": {"Newsletter__c": "opted_in"}, "consent": {"subscribe": "opted_in", "evidence": "newsletter box"}},
    "shopify": {},
}
Declared = Callable[..., Source]


def _server(recipe: str) -> Any:
    numbers = range(1, PEOPLE + 1)
    if recipe == "hubspot":
        return hubspot.HubSpot([hubspot.contact(number, hs_email_optout="true" if number % 10 == 3 else None) for number in numbers])
    if recipe == "salesforce":
        return salesforce.Salesforce([salesforce.contact(number, HasOptedOutOfEmail=number % 10 == 3) for number in numbers], page_size=150)
    return shopify.Shopify([shopify.customer(number, "UNSUBSCRIBED" if number % 10 == 3 else "SUBSCRIBED") for number in numbers])


@pytest.fixture(params=["hubspot", "salesforce", "shopify"])
def recipe(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def service(recipe: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    server = _server(recipe)
    with serving(server) as url:
        server.url = url
        yield server


@pytest.fixture
def declared(recipe: str, service: Any, home: Path) -> Declared:
    """`declared(write_back={…})`: the declaration that a user writes, but for the address of the service."""

    def write(**more: Any) -> Source:
        tree = {
            "name": recipe,
            "recipe": recipe,
            "connection": {"url": service.url, "first_wait_seconds": 0.01},
            "contacts": {"list": "News", **OWN[recipe]},
            **more,
        }
        (home / "sources" / f"{recipe}.yaml").write_text(yaml.safe_dump(tree))
        return declaration.load(home, recipe)

    return write


@pytest.fixture
def source(declared: Declared) -> Source:
    return declared(write_back={"what": ["unsubscribes"]})


def standing(engine: sa.Engine, source: Source) -> status.Standing:
    return status.read(engine, source.name, "contacts")


def test_everything_arrives_and_then_only_what_changed(engine: sa.Engine, service: Any, source: Source, sync: Sync) -> None:
    service.come_back(7, LATER)
    first = sync(source)
    assert (first.standing.counts["read"], first.standing.counts["inserted"], first.standing.rejected) == (PEOPLE, PEOPLE, {})
    assert set(contacts(engine)) == ALL
    assert subscribed(engine) == ALL - WHO_LEFT
    assert contacts(engine)["p7@example.test"]["first_name"] == "P7"
    requests = len(service.asked)
    # From five minutes before the newest change.
    again = sync(source)
    assert (again.standing.counts["read"], again.standing.counts["unchanged"]) == (1, 1)
    assert len(service.asked) - requests <= 3
    service.remove(8)
    assert sync(source, whole=True).ended == 1
    assert subscribed(engine) == ALL - WHO_LEFT - {"p8@example.test"}


def test_who_leaves_there_is_not_subscribed_here_any_more_nor_ever_again(engine: sa.Engine, home: Path, service: Any, source: Source, sync: Sync) -> None:
    sync(source)
    unsubscribe(engine, "p1@example.test")
    service.leave(2, LATER)
    sync(source)
    assert subscribed(engine) == ALL - WHO_LEFT - {"p1@example.test", "p2@example.test"}
    for number in (1, 2, 13):
        service.come_back(number, LATEST)
    sync(source)
    sync(source, whole=True)
    assert subscribed(engine) == ALL - WHO_LEFT - {"p1@example.test", "p2@example.test"}
    # What the service itself said it is not told.
    assert telling.run(engine, home, source).counts["pushed"] == 1


def test_who_leaves_here_leaves_there_once(engine: sa.Engine, home: Path, service: Any, source: Source, sync: Sync) -> None:
    sync(source)
    gone = [f"p{number}@example.test" for number in range(21, 33) if number % 10 != 3]
    for address in gone:
        unsubscribe(engine, address)
    engaged(engine, range(1, 3))
    other = transact(engine, lambda connection: lists.ensure(connection, "Offers", now=_now()))
    elsewhere = ids(engine)["p40@example.test"]
    transact(engine, lambda connection: consent.unsubscribe(connection, [elsewhere], scope="list", scope_id=other.id, now=_now()))
    report = telling.run(engine, home, source)
    assert (report.counts["pushed"], report.standing) == (len(gone), outbox.Standing(0, 0, None))
    assert service.left() == WHO_LEFT | set(gone)
    assert len(_told(service)) == len(set(_told(service))) == len(gone)
    assert telling.run(engine, home, source).counts.get("pushed", 0) == 0
    # As if a run had been killed before it noted anything: said again, it is the same.
    transact(engine, lambda connection: connection.execute(sa.update(SyncOutbox).where(SyncOutbox.kind == "unsubscribe").values(state=outbox.WAITING)))
    before = service.left()
    telling.run(engine, home, source)
    assert service.left() == before
    # And it comes back as what is known.
    sync(source)
    assert subscribed(engine) == ALL - WHO_LEFT - set(gone)
    assert telling.run(engine, home, source).counts.get("pushed", 0) == 0


def _told(service: Any) -> list[Any]:
    for name in ("unsubscribed", "changed", "told"):
        if hasattr(service, name):
            return [str(entry) for entry in getattr(service, name)]
    raise AssertionError(service)


def test_a_500_in_the_middle_passes_or_is_named_and_nothing_is_lost(engine: sa.Engine, service: Any, source: Source, sync: Sync) -> None:
    service.before = lambda number, asked: says(500, {"message": "internal error"}) if number == 2 else None
    assert sync(source).standing.counts["inserted"] == PEOPLE
    good, begin = standing(engine, source), len(service.asked)
    service.before = lambda number, asked: says(500, {"message": "internal error"}) if number > begin + 1 else None
    with pytest.raises(SourceError, match="status 500"):
        sync(source, whole=True)
    failed = standing(engine, source)
    assert (failed.cursor, failed.good_at, failed.counts) == (good.cursor, good.good_at, good.counts)
    assert subscribed(engine) == ALL - WHO_LEFT
    service.before = None
    assert sync(source, whole=True).ended == 0


def test_where_the_word_of_who_left_is_lost_nobody_is_mailed_by_mistake(engine: sa.Engine, service: Any, source: Source, sync: Sync) -> None:
    sync(source)
    column = service.lose_the_word()
    with pytest.raises(SourceError) as caught:
        sync(source, whole=True)
    assert column in str(caught.value)
    assert subscribed(engine) == ALL - WHO_LEFT
    assert column in (standing(engine, source).error or "")


@pytest.mark.parametrize("recipe", ["salesforce", "shopify"], indirect=True)
def test_a_token_that_expires_in_the_middle_is_renewed(engine: sa.Engine, home: Path, service: Any, source: Source, sync: Sync) -> None:
    service.token_requests = 2
    assert sync(source).standing.counts["inserted"] == PEOPLE
    assert service.tokens >= 2
    for number in (21, 22, 24, 25, 26):
        unsubscribe(engine, f"p{number}@example.test")
    assert telling.run(engine, home, source).counts["pushed"] == 5
    assert service.tokens >= 4


@pytest.mark.parametrize("recipe", ["salesforce", "shopify"], indirect=True)
def test_an_app_that_was_removed_is_named_and_its_secret_is_not(
    engine: sa.Engine, home: Path, service: Any, source: Source, sync: Sync, monkeypatch: pytest.MonkeyPatch
) -> None:
    sync(source)
    unsubscribe(engine, "p21@example.test")
    monkeypatch.setenv(f"{source.name.upper()}_CLIENT_SECRET", "wrong-secret")
    with pytest.raises(SourceError, match=r"gives no token \(status 400 invalid_") as caught:
        sync(source)
    assert "wrong-secret" not in str(caught.value)
    with pytest.raises(SourceError, match="gives no token"):
        telling.run(engine, home, source)
    # That cost the event no attempt.
    assert (states(engine)[outbox.WAITING], dead(engine)) == (1, {})
    monkeypatch.setenv(f"{source.name.upper()}_CLIENT_SECRET", SECRETS[f"{source.name.upper()}_CLIENT_SECRET"])
    assert telling.run(engine, home, source).counts["pushed"] == 1


@pytest.mark.parametrize("recipe", ["hubspot"], indirect=True)
def test_hubspots_limits_are_waited_for_and_a_key_that_ended_is_named(engine: sa.Engine, home: Path, service: Any, source: Source, sync: Sync) -> None:
    sync(source)
    assert [body["filterGroups"][0]["filters"][0]["value"] for body in service.searches] == ["0", "200", "400", "450"]
    sync(source, whole=True)
    assert service.refused == 1
    service.key = "another"
    with pytest.raises(SourceError, match=r"refuses the login \(status 401 EXPIRED_AUTHENTICATION\)") as caught:
        sync(source)
    assert hubspot.KEY not in str(caught.value)
    unsubscribe(engine, "p21@example.test")
    with pytest.raises(SourceError, match="EXPIRED_AUTHENTICATION"):
        telling.run(engine, home, source)
    service.key = hubspot.KEY
    for number in range(31, 43):
        unsubscribe(engine, f"p{number}@example.test")
    assert telling.run(engine, home, source).counts["pushed"] == 13 - 1
    # One of these had left there long ago.
    assert service.unsubscribed == [f"p{number}@example.test" for number in (21, *range(31, 43)) if number != 33]
    assert service.refused >= 3


@pytest.mark.parametrize("recipe", ["salesforce"], indirect=True)
def test_salesforces_busy_moment_is_waited_for_and_its_day_may_be_used_up(engine: sa.Engine, home: Path, service: Any, source: Source, sync: Sync) -> None:
    """Both are a 403 of the same word; the first passes."""
    busy = says(403, [{"message": "ConcurrentPerOrgLongTxn Limit exceeded.", "errorCode": "REQUEST_LIMIT_EXCEEDED"}])
    service.before = lambda number, asked: busy if number in (2, 3) else None
    assert sync(source).standing.counts["inserted"] == PEOPLE
    service.before = None
    unsubscribe(engine, "p21@example.test")
    service.daily = service.used
    with pytest.raises(SourceError, match=r"status 429 \(REQUEST_LIMIT_EXCEEDED\)"):
        sync(source)
    with pytest.raises(SourceError, match="REQUEST_LIMIT_EXCEEDED"):
        telling.run(engine, home, source)
    assert subscribed(engine) == ALL - WHO_LEFT - {"p21@example.test"}
    assert states(engine)[outbox.WAITING] == 1
    service.daily = 15_000
    make_due(engine)
    assert telling.run(engine, home, source).counts["pushed"] == 1


@pytest.mark.parametrize("recipe", ["salesforce"], indirect=True)
def test_a_contact_that_is_deleted_there_meanwhile_stops_no_other(engine: sa.Engine, home: Path, service: Any, source: Source, sync: Sync) -> None:
    sync(source)
    for number in (21, 22, 24):
        unsubscribe(engine, f"p{number}@example.test")
    service.remove(22)
    report = telling.run(engine, home, source)
    assert (report.counts["pushed"], report.counts["dead"]) == (2, 1)
    assert [reason for reason, _ in dead(engine).values()] == ['status 404: [{"message": "entity is deleted", "errorCode": "ENTITY_IS_DELETED"}]']


@pytest.mark.parametrize("recipe", ["salesforce"], indirect=True)
def test_a_box_that_is_unticked_ends_what_the_source_had_begun(engine: sa.Engine, home: Path, service: Any, source: Source, sync: Sync) -> None:
    service.contacts[4]["Newsletter__c"] = False
    sync(source)
    assert subscribed(engine) == ALL - WHO_LEFT - {"p5@example.test"}
    # Never ticked is not left: it may be ticked yet.
    service.contacts[4].update(Newsletter__c=True, SystemModstamp=LATER)
    service.contacts[5].update(Newsletter__c=False, SystemModstamp=LATER)
    service.contacts[6].update(Newsletter__c=None, SystemModstamp=LATER)
    sync(source)
    assert subscribed(engine) == ALL - WHO_LEFT - {"p6@example.test"}
    service.contacts[5].update(Newsletter__c=True, SystemModstamp=LATEST)
    sync(source)
    assert subscribed(engine) == ALL - WHO_LEFT - {"p6@example.test"}
    assert telling.run(engine, home, source).counts.get("pushed", 0) == 0


@pytest.mark.parametrize("recipe", ["salesforce"], indirect=True)
def test_a_refresh_token_does_as_well(engine: sa.Engine, service: Any, declared: Declared, sync: Sync, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SALESFORCE_REFRESH_TOKEN", "5Aep.refresh")
    connection = {"url": service.url, "first_wait_seconds": 0.01, "auth": {"refresh_env": "SALESFORCE_REFRESH_TOKEN"}}
    assert sync(declared(connection=connection)).standing.counts["inserted"] == PEOPLE
    monkeypatch.setenv("SALESFORCE_REFRESH_TOKEN", "expired")
    with pytest.raises(SourceError, match="status 400 invalid_grant"):
        sync(declared(connection=connection))


@pytest.mark.parametrize("recipe", ["shopify"], indirect=True)
def test_shopifys_bucket_is_waited_for(engine: sa.Engine, service: Any, source: Source, sync: Sync) -> None:
    service.throttled = {2, 3, 6}
    begin = dt.datetime.now(dt.UTC)
    assert sync(source).standing.counts["inserted"] == PEOPLE
    # Five pages, and three that came again after the hundredth of a second in which a point is restored.
    assert len(service.asked) == 5 + 3
    assert dt.datetime.now(dt.UTC) - begin >= dt.timedelta(seconds=3 * 0.01)


@pytest.mark.parametrize("recipe", ["shopify"], indirect=True)
def test_a_page_of_customers_without_any_address_is_no_broken_shop(engine: sa.Engine, service: Any, source: Source, sync: Sync) -> None:
    service.customers[:0] = [shopify.customer(number, defaultEmailAddress=None) for number in range(1_001, 1_101)]
    report = sync(source)
    assert (report.standing.counts["inserted"], report.standing.rejected) == (PEOPLE, {"address: there is none": 100})


@pytest.mark.parametrize("recipe", ["shopify"], indirect=True)
def test_a_newer_word_in_the_shop_stands(engine: sa.Engine, home: Path, service: Any, source: Source, sync: Sync) -> None:
    sync(source)
    unsubscribe(engine, "p21@example.test")
    unsubscribe(engine, "p22@example.test")
    service.come_back(21, "2099-01-01T00:00:00Z")
    service.remove(22)
    report = telling.run(engine, home, source)
    assert (report.counts["pushed"], report.counts["dead"]) == (1, 1)
    assert "Customer not found" in next(iter(dead(engine).values()))[0]
    assert "p21@example.test" not in service.left()
    sync(source)
    assert "p21@example.test" not in subscribed(engine)


def _now() -> dt.datetime:
    return dt.datetime.now(dt.UTC)
