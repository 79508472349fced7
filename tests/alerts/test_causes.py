"""Each cause is there when it should be, and not otherwise; what it says to type exists; and what block lists say becomes one."""

from __future__ import annotations

import datetime as dt
import re
import shlex
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
import sqlalchemy as sa
import yaml
from typer.core import TyperGroup
from typer.main import get_command
from typer.testing import CliRunner

from mail_pipelines.alerts import causes
from mail_pipelines.alerts.cause import Cause
from mail_pipelines.capacity import far, in_force, planning
from mail_pipelines.capacity.new_servers import NO_SOURCES, HostSources, NextSource
from mail_pipelines.cli import app
from mail_pipelines.commands import context as commands
from mail_pipelines.config import DnsSettings, ReputationSettings
from mail_pipelines.database import models
from mail_pipelines.database.engine import database_now, reading, transact
from mail_pipelines.database.models import Server, State
from mail_pipelines.definitions import build_defs
from mail_pipelines.delivery import counters
from mail_pipelines.dispatch import holds, servers
from mail_pipelines.dispatch.files import only_one
from mail_pipelines.dispatch.holds import Kind
from mail_pipelines.dispatch.recovery import standing
from mail_pipelines.provisioning import block_lists, listing
from mail_pipelines.provisioning import store as provisions
from mail_pipelines.reputation import readings
from mail_pipelines.reputation import standing as reputation
from mail_pipelines.resources.database import CentralDatabase
from mail_pipelines.sensors import alerts as sensor
from mail_pipelines.sensors import servers as server_sensor
from mail_pipelines.sources import running, status
from tests.alerts.receivers import Hook, Relay, hooking, relaying
from tests.dispatch.world import World, make_world
from tests.parts.dns import Zone, serving
from tests.parts.processes import free_port

HOUR = dt.timedelta(hours=1)


@pytest.fixture
def world(engine: sa.Engine, tmp_path: Path) -> World:
    """A server s1 that beats, and a campaign `spring` of ten that is sending: nothing to tell."""
    world = make_world(engine, tmp_path / "home", recipients=10)
    world.server("s1")
    # Half a minute after its last beat it would be silent, and a busy machine may take that for a test.
    change(world, heartbeat_at=now_of(world) + HOUR, health={"free_mb": 90_000, "clock_ahead": 0.1})
    assert found(world) == {}
    return world


def now_of(world: World) -> dt.datetime:
    with reading(world.engine) as connection:
        return database_now(connection)


def change(world: World, **values: Any) -> None:
    transact(world.engine, lambda connection: connection.execute(sa.update(Server).values(**values)))


def put(world: World, model: type[models.Base], **values: Any) -> None:
    transact(world.engine, lambda connection: connection.execute(sa.insert(model).values(**values)))


def found(world: World) -> dict[str, Cause]:
    with reading(world.engine) as connection:
        return {cause.key: cause for cause in causes.collect(connection, world.settings)}


def breaker(world: World, state: str, trips: int, age: dt.timedelta) -> None:
    row = {"server_id": 1, "provider": "google", "state": state, "rule": "refused", "reason": "20 of 40 refused", "trips": trips, "baseline": {}}
    put(world, models.Breaker, **row, changed_at=now_of(world) - age)


def told(world: World, rate: float, *, day: int = 2, age: dt.timedelta | None = HOUR, sent: int = 0, stopped: bool = False) -> None:
    """Google was asked so long ago (None: in vain) and told this rate of a day so many days ago; so much was sent six days ago."""
    world.settings = world.settings.model_copy(update={"reputation": ReputationSettings(google_credentials="{}")})
    now = now_of(world)
    today = int(now.timestamp()) // readings.DAY * readings.DAY
    found = [readings.Reading(readings.GOOGLE, "shop.test", today - day * readings.DAY, rate)]
    transact(world.engine, lambda connection: readings.keep(connection, found, now))
    known = reputation.Standing(None if age is None else (now - age).isoformat(), error="login")
    reputation.keep(world.engine, readings.GOOGLE, known, now)
    put(world, models.ProviderUsage, server_id=1, provider="google", window_seconds=86400, window_start=today - 6 * readings.DAY, used=sent)
    if stopped:
        row = {"domain": "shop.test", "provider": "google", "state": "open", "reason": "too much", "trips": 1, "changed_at": now, "day": 0}
        put(world, models.DomainBreaker, **row)


def hold(world: World, age: dt.timedelta) -> None:
    def work(connection: sa.Connection) -> None:
        for scope in (holds.Scope(), holds.Scope(Kind.PROVIDER, provider="google"), holds.scope_of(connection, Kind.CAMPAIGN, "spring")):
            holds.place(connection, scope, "100 % bad", "ann", now_of(world) - age)

    transact(world.engine, work)


def unknown(world: World) -> None:
    moves = {(0, "google", State.PENDING, ""): -3, (0, "google", State.UNKNOWN, ""): 3}
    transact(world.engine, lambda connection: counters.add(connection, world.campaign_id, 0, moves, now_of(world)))


def listed(world: World, *texts: str) -> None:
    value = {"at": now_of(world).isoformat(), "listed": list(texts), "unknown": ["away.test: it does not answer"]}
    put(world, models.SyncState, source=listing.SOURCE, key="s1", value=value, version=1, changed_at=now_of(world))


def made(world: World, state: str, **values: Any) -> None:
    """A server mx1 that somebody asked for."""

    def work(connection: sa.Connection) -> None:
        key = provisions.request(connection, world.settings.provisioning, "short").key
        connection.execute(sa.update(models.Provision).where(models.Provision.key == key).values(state=state, **values))

    transact(world.engine, work)


def propose(world: World) -> None:
    given = {"state": "open", "servers": 2, "cost_per_month": 14.4, "made_at": now_of(world)}
    put(world, models.ProvisionProposal, **given, why="spring is late", effect="it ends at noon")


def plan(world: World, sources: HostSources = NO_SOURCES) -> None:
    """One message an hour to each provider, and an hour for all of them."""
    world.set_campaign(finish_by=now_of(world) + HOUR)
    servers.set_limits(world.engine, None, "*", {"per_second": 1.0, "per_hour": 1})
    planning.make(world.engine, world.settings, sources=sources)


def far_order(world: World) -> None:
    """A plan of an hour ago that orders three servers, which may be ordered without a person, and cannot."""
    mode(world, "auto")
    at = now_of(world) - HOUR
    order = far.FarOrder("default", 3, at.date(), at.date(), at.date(), due=True, short=9_000, left=0, why="google: 60,000 messages come up")
    document = {"campaigns": [], "orders": [], "far": [far.to_document(order)]}
    assert transact(world.engine, lambda connection: in_force.follow(connection, 0, document, at))


def mode(world: World, name: str) -> None:
    world.settings = world.settings.model_copy(update={"provisioning": world.settings.provisioning.model_copy(update={"mode": name})})


def aside(world: World) -> None:
    transact(world.engine, lambda connection: provisions.put_aside(connection, "north", "port 25 is shut"))


def recover(world: World) -> None:
    put(world, models.Recovery, generation="g", began_at=now_of(world), finished_at=None)
    transact(world.engine, lambda connection: connection.execute(sa.update(models.LedgerGeneration).values(generation="g")))
    with reading(world.engine) as connection:
        assert standing.newest(connection) is not None


def external(world: World, text: str = "", *, told: bool = False, **standing: Any) -> None:
    """A source `crm` that is read every night, as its last run left it; durations are how long ago."""
    folder = world.settings.home / "sources"
    folder.mkdir(parents=True, exist_ok=True)
    contacts: dict[str, Any] = {"read": {"glob": "*"}, "map": {"mail": "email"}, "consent": {"subscribe": "never"}}
    declared: dict[str, Any] = {"name": "crm", "kind": "files", "connection": {"url": "drop"}, "schedule": "0 3 * * *", "fresh_hours": 24, "contacts": contacts}
    if told:
        connection, sent = {"url_env": "CRM"}, {"what": ["opens"], "send": {"table": "t", "columns": {"k": "key"}}}
        declared |= {"kind": "sql", "connection": connection, "contacts": contacts | {"read": {"table": "t"}}, "write_back": sent}
    (folder / "crm.yaml").write_text(text or yaml.safe_dump(declared))
    if standing:
        times = {name: (now_of(world) - age).isoformat() for name, age in standing.items() if isinstance(age, dt.timedelta)}
        status.change(world.engine, "crm", "contacts", now_of(world), **standing | times)


def dead_letter(world: World) -> None:
    external(world, told=True)
    put(world, models.SyncDeadLetter, source="crm", kind="open", event_id=1, contact_id=1, reason="no", attempts=24, at=now_of(world))


THERE: dict[str, tuple[Callable[[World], object], list[str], str]] = {
    "silent": (lambda world: change(world, heartbeat_at=now_of(world) - HOUR), ["server-silent:s1"], "is silent since"),
    "silent while warming": (lambda world: change(world, state="warming", heartbeat_at=now_of(world) - HOUR), ["server-silent:s1"], "is silent since"),
    "lost": (lambda world: change(world, state="lost"), ["server-lost:s1"], "was declared lost"),
    "failed": (lambda world: made(world, "failed", reason="create: no room"), ["server-failed:mx1"], "could not be made: create: no room"),
    "waits for the DNS": (lambda world: made(world, "waiting_dns", records=["mx1 IN A 192.0.2.1"]), ["server-dns:mx1"], "waits for 1 DNS records"),
    "source is no source": (lambda world: external(world, "name: crm\n"), ["external-source:crm"], "external source crm is not read: "),
    "source failed": (
        lambda world: external(world, error="the token has expired", begun_at=HOUR, ended_at=HOUR, good_at=2 * HOUR),
        ["external-source:crm:contacts"],
        "external source crm, contacts: the token has expired; in step at ",
    ),
    "source was cut off": (lambda world: external(world, begun_at=HOUR), ["external-source:crm:contacts"], "was cut off"),
    "source is old": (
        lambda world: external(world, begun_at=25 * HOUR, ended_at=25 * HOUR, good_at=25 * HOUR),
        ["external-source:crm:contacts"],
        "25 hours old, and was to be 24 at most",
    ),
    "source refused": (dead_letter, ["dead-letters:crm"], "refused 1 events"),
    "proposed": (propose, ["proposal:1"], "proposal 1: 2 more servers for 14.40 a month: spring is late (it ends at noon)"),
    "set aside": (aside, ["source:north"], "host source north is set aside: port 25 is shut"),
    "clock": (lambda world: change(world, health={"clock_ahead": -240.0}), ["clock:s1"], "240 s behind"),
    "disk": (lambda world: change(world, health={"free_mb": 1_500}), ["log-disk:s1"], "1,500 MB free"),
    "full": (lambda world: change(world, health={"free_mb": 3}), ["log-disk:s1"], "it sends nothing until there is room"),
    "trips": (lambda world: breaker(world, "open", 3, dt.timedelta(0)), ["breaker:s1:google"], "20 of 40 refused"),
    "long": (lambda world: breaker(world, "trial", 1, 2 * HOUR), ["breaker:s1:google"], "stopped sending to google"),
    "listed": (lambda world: listed(world, "192.0.2.9 is listed by bl.test"), ["block-list:s1"], "is listed by bl.test"),
    "recovery": (recover, ["recovery"], "nothing is sent"),
    "held": (lambda world: hold(world, 12 * HOUR), ["hold:everything:", "hold:provider:google", "hold:campaign:spring"], "is held since"),
    "late": (lambda world: world.set_campaign(finish_by=now_of(world) - HOUR), ["campaign-late:spring"], "has 10 recipients to go"),
    "in danger": (plan, ["campaign-in-danger:spring"], "more warm servers would save it"),
    "ordered by nobody": (
        far_order,
        ["servers-wanted:default"],
        "3 more servers of pool default are wanted, but provisioning.budget and",
    ),
    "unknown": (unknown, ["unknown:spring"], "3 recipients of whom nobody knows"),
    "domain stopped": (lambda world: told(world, 0.004, stopped=True), ["domain-stopped:shop.test:google"], "mail of shop.test to google is stopped: too much"),
    "reported": (lambda world: told(world, 0.002), ["reputation:shop.test:spam_rate"], "0.20% reported as spam of shop.test"),
    "not read": (lambda world: told(world, 0.0, age=51 * HOUR), ["reputation-stale:google_postmaster"], "google_postmaster was read last at"),
    "never read": (lambda world: told(world, 0.0, age=None), ["reputation-stale:google_postmaster"], "could not be read yet: login"),
    "tells no more": (lambda world: told(world, 0.0, day=7, sent=5_000), ["reputation-stale:google_postmaster"], "5,000 messages or more went to google"),
}
NOT_THERE: dict[str, Callable[[World], object]] = {
    "being made": lambda world: made(world, "provisioning"),
    "failed long ago": lambda world: made(world, "failed", ended_at=now_of(world) - 48 * HOUR),
    "source in step": lambda world: external(world, begun_at=HOUR, ended_at=HOUR, good_at=HOUR),
    "source never read": external,
    "never spoke": lambda world: change(world, heartbeat_at=None),
    "paused": lambda world: change(world, state="paused", heartbeat_at=now_of(world) - HOUR, health={"free_mb": 1, "clock_ahead": 99.0}),
    "retired": lambda world: change(world, state="retired", heartbeat_at=now_of(world) - HOUR),
    "just opened": lambda world: breaker(world, "open", 2, HOUR),
    "closed": lambda world: breaker(world, "closed", 9, 9 * HOUR),
    "not listed": listed,
    "held of late": lambda world: hold(world, 11 * HOUR),
    "in time": lambda world: world.set_campaign(finish_by=now_of(world) + HOUR),
    "told well": lambda world: told(world, 0.0019, sent=5_000),
    "told long ago": lambda world: told(world, 0.5, day=8, sent=4_999),
    "over": lambda world: world.set_campaign(finish_by=now_of(world) - HOUR, state="finished"),
}


@pytest.mark.parametrize("name", THERE)
def test_a_cause_is_found_with_a_command_that_exists(world: World, name: str) -> None:
    make, keys, words = THERE[name]
    make(world)
    there = found(world)
    assert sorted(there) == sorted(keys)
    assert words in there[keys[0]].text
    for cause in there.values():
        assert takes(cause.command), cause.command


@pytest.mark.parametrize("name", NOT_THERE)
def test_what_is_no_cause_is_not_found(world: World, name: str) -> None:
    NOT_THERE[name](world)
    assert found(world) == {}


def takes(line: str) -> bool:
    """Whether `mail-pipelines` would run this."""
    program, *words = shlex.split(line)
    assert program == "mail-pipelines"
    command = get_command(app)
    while isinstance(command, TyperGroup) and words and words[0] in command.commands:
        command = command.commands[words.pop(0)]
    command.make_context(command.name, words).close()
    return True


def test_what_needs_time_is_told_later(world: World) -> None:
    unknown(world)
    recover(world)
    external(world, error="it is away")
    assert {cause.kind: cause.after for cause in found(world).values()} == {"unknown": 6 * HOUR, "recovery": HOUR / 2, "external-source": HOUR / 2}


def test_a_deadline_in_danger_is_told_with_what_to_type_unless_a_proposal_or_an_order_is_in_time_for_it(world: World) -> None:
    plan(world)
    (alone,) = found(world).values()
    assert alone.command == "mail-pipelines plan what-if --campaign spring"
    assert re.match(r"campaign spring will miss its finish_by, .{16} UTC: \d messages come too late, the last .{16} \(.*\); \d+ more warm servers", alone.text)
    # Where those of the next source are in time.
    plan(world, HostSources(NextSource("", 0.1)))
    (offered,) = found(world).values()
    assert re.fullmatch(r"mail-pipelines server provision --count \d+", offered.command)
    made(world, "provisioning")
    assert found(world) == {}
    # Of those of others nobody knows.
    plan(world)
    assert list(found(world)) == ["campaign-in-danger:spring"]
    world.set_campaign(state="paused")
    assert found(world) == {}


def test_servers_of_the_next_weeks_are_told_of_as_long_as_they_are_neither_proposed_nor_ordered(world: World) -> None:
    far_order(world)
    (cause,) = found(world).values()
    assert (cause.command, cause.after) == ("mail-pipelines server provisions", dt.timedelta(minutes=70))
    made(world, "provisioning")
    mode(world, "off")
    (cause,) = found(world).values()
    assert cause.text.startswith("2 more servers of pool default are wanted, but provisioning.mode is off: google: 60,000 messages come up (")
    assert "messages would be too late by 9,000 days, added up over all of them" in cause.text
    assert cause.command == "mail-pipelines server provision --count 2"
    propose(world)
    assert list(found(world)) == ["proposal:1"]


def test_a_source_that_is_being_read_was_not_cut_off(world: World) -> None:
    external(world, begun_at=HOUR)
    with only_one(running.lock(world.settings.home, "crm"), "source crm"):
        assert found(world) == {}
    assert list(found(world)) == ["external-source:crm:contacts"]


# --- the sensor -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def repository() -> dg.RepositoryDefinition:
    return build_defs().get_repository_def()


def tick(repository: dg.RepositoryDefinition, instance: dg.DagsterInstance, cursor: str | None = None) -> Any:
    with dg.build_sensor_context(instance=instance, cursor=cursor, repository_def=repository) as context:
        return sensor.alerts(context, CentralDatabase())


def test_a_tick_tells_what_the_database_and_dagster_know(
    world: World, repository: dg.RepositoryDefinition, instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    with hooking(Hook()) as hook:
        idle = tick(repository, instance)
        assert isinstance(idle, dg.SkipReason)
        assert "set alerts.relay_host" in str(idle)
        monkeypatch.setenv("MAIL_PIPELINES_ALERTS__WEBHOOK_URL", hook.url)
        assert "there is no news" in tick(repository, instance).skip_reason.skip_message
        change(world, state="lost")

        for job in ("build_audience", "build_audience", "send_campaign"):
            run = instance.create_run_for_job(repository.get_job(job), tags={"dagster/partition": "x"})
            instance.report_run_failed(run)
        # Each source has its own cause.
        instance.add_run(dg.DagsterRun(job_name="sync_external", run_id=str(uuid.uuid4()), status=dg.DagsterRunStatus.FAILURE))
        tick(repository, instance)
        tick(repository, instance)
    [text] = hook.texts
    assert "mail-pipelines server retire s1 --lost" in text
    assert "2 runs of build_audience failed within an hour" in text
    assert "send_campaign" not in text
    assert "sync_external" not in text


def test_a_relay_that_is_away_is_named_once_and_tried_at_each_tick(
    world: World, repository: dg.RepositoryDefinition, instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    port = free_port()
    for name, value in {"RELAY_HOST": "127.0.0.1", "RELAY_PORT": str(port), "FROM_ADDRESS": "a@shop.test", "TO": "ops@shop.test"}.items():
        monkeypatch.setenv(f"MAIL_PIPELINES_ALERTS__{name}", value)
    change(world, state="lost")
    cursor = None
    for _ in range(3):
        ended = tick(repository, instance, cursor)
        cursor = ended.cursor
    assert "did not take a message" in cursor
    assert capfd.readouterr().err.count("ERROR - operators are not told") == 1
    with relaying(Relay(), port) as relay:
        ended = tick(repository, instance, cursor)
    assert (ended.cursor, len(relay.messages)) == ("", 1)


def test_half_a_configuration_is_named_and_ends_no_tick(
    world: World, repository: dg.RepositoryDefinition, instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MAIL_PIPELINES_ALERTS__RELAY_HOST", "127.0.0.1")
    assert "give alerts.from_address" in tick(repository, instance).cursor


# --- block lists ----------------------------------------------------------------------------------------------------

LIST = block_lists.block_lists()[0].zone


def on_lists(zone: Zone) -> None:
    zone.publish(*(f"2.0.0.127.{one.zone}. 60 IN A 127.0.0.2" for one in block_lists.block_lists()), f"9.2.0.192.{LIST}. 60 IN A 127.0.0.4")


def test_public_addresses_are_looked_up_a_few_times_a_day(world: World) -> None:
    with serving(Zone()) as zone:
        on_lists(zone)
        dns = DnsSettings(servers=[zone.address], timeout_seconds=60, block_list_hours=6)
        for number in range(2, 9):
            world.server(f"s{number}")
        change(world, health={"addresses": ["192.0.2.9", "10.0.0.1"]})
        with reading(world.engine) as connection:
            fleet = servers.all_servers(connection)
        now = now_of(world)
        first = listing.look(world.engine, dns, fleet, now)
        assert len(first) == listing.AT_ONCE
        assert all("is listed by" in one.listed[0] for one in first.values())
        second = listing.look(world.engine, dns, fleet, now)
        assert sorted([*first, *second]) == [server.key for server in fleet]
        # What matters is looked at once more soon.
        again = now + listing.CONFIRM_AFTER
        assert sorted([*listing.look(world.engine, dns, fleet, again), *listing.look(world.engine, dns, fleet, again)]) == [server.key for server in fleet]
        asked = dict(zone.asked)
        assert listing.look(world.engine, dns, fleet, again + 5 * HOUR) == {}
        assert listing.look(world.engine, dns.model_copy(update={"block_list_hours": 0}), fleet, again + 9 * HOUR) == {}
        assert zone.asked == asked
        zone.withdraw(f"9.2.0.192.{LIST}", "A")
        assert all(one.listed == () for one in listing.look(world.engine, dns, fleet, again + 6 * HOUR).values())
        # A name or a private address is nobody's to be looked up.
        change(world, health={"hostname": "mx.test", "addresses": ["10.0.0.1"]})
        with reading(world.engine) as connection:
            assert listing.look(world.engine, dns, servers.all_servers(connection), now + 99 * HOUR) == {}


def test_a_listed_server_is_shown_told_and_goes_on(
    world: World, repository: dg.RepositoryDefinition, instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(commands.console, "width", 300)
    with serving(Zone()) as zone:
        on_lists(zone)
        for name, value in {"SERVERS": zone.address, "TIMEOUT_SECONDS": "60", "BLOCK_LIST_HOURS": "6"}.items():
            monkeypatch.setenv(f"MAIL_PIPELINES_DNS__{name}", value)
        commands.settings.cache_clear()
        change(world, health={"hostname": "mx1.test", "addresses": ["192.0.2.9"]})
        with dg.build_sensor_context(instance=instance, repository_def=repository) as context:
            server_sensor.server_health(context, CentralDatabase())
    assert "block-list:s1" in found(world)
    with reading(world.engine) as connection:
        assert servers.find(connection, "s1").state == "active"
    shown = CliRunner().invoke(app, ["server", "show", "s1"]).output
    assert f"is listed by {LIST} (127.0.0.4)" in shown
    assert "mx1.test, from 192.0.2.9" in shown
    assert "active (block-listed)" in CliRunner().invoke(app, ["server", "list"]).output


def test_a_resolver_that_cannot_be_asked_ends_no_tick(
    world: World, repository: dg.RepositoryDefinition, instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MAIL_PIPELINES_DNS__BLOCK_LIST_HOURS", "6")
    monkeypatch.setenv("MAIL_PIPELINES_DNS__SERVERS", "no address")
    change(world, health={"addresses": ["192.0.2.9"]})
    with dg.build_sensor_context(instance=instance, repository_def=repository) as context:
        assert server_sensor.server_health(context, CentralDatabase())
