"""What `doctor` says of domains and servers, and that nothing hides it or keeps it waiting. What it says of a home is in `test_home.py`."""

from __future__ import annotations

import datetime as dt
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa

from mail_pipelines import config
from mail_pipelines.database import migrate, models
from mail_pipelines.database.engine import create_engine, reading, transact
from mail_pipelines.database.models import Server
from mail_pipelines.dispatch import last_checks, servers
from mail_pipelines.doctor import central, domains, examination, host
from mail_pipelines.doctor.finding import Finding
from mail_pipelines.domains import records, rotation, store
from mail_pipelines.domains.domain import KeyState, Names
from mail_pipelines.provisioning import last_verified, listing, ssh_keys
from mail_pipelines.provisioning.finding import Finding as Checked
from tests.dispatch.world import World, make_world
from tests.parts.dns import Zone, serving

NOW = dt.datetime.now(dt.UTC)
ON_SQLITE = pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)


@pytest.fixture
def world(engine: sa.Engine, tmp_path: Path) -> World:
    """A server s1 that beats."""
    world = make_world(engine, tmp_path / "home", recipients=2)
    world.server()
    tells(world)
    return world


def tells(world: World, **health: object) -> None:
    """A heartbeat of all servers that tells this."""
    transact(world.engine, lambda connection: connection.execute(sa.update(Server).values(heartbeat_at=dt.datetime.now(dt.UTC), health=health)))


def said(world: World) -> list[Finding]:
    return list(central.check_central_database(config.load(), is_centre=True))


# --- servers ----------------------------------------------------------------------------------------------------------


def test_what_was_last_verified_of_a_server_is_told_until_it_holds(world: World) -> None:
    """On its host it is kept beside the log, and told by the heartbeat; at the centre in the database."""
    assert said(world) == []
    folders = world.folders("s1")
    port = Checked("port 25", False, "the way out over port 25 is closed")
    last_checks.keep(folders, last_verified.failed([port, Checked("TLS", None, "?"), Checked("SMTP", True, "answers")]), NOW)
    beat = servers.Heartbeat(world.engine, "s1", folders, 10)
    transact(world.engine, lambda connection: connection.execute(sa.update(Server).values(heartbeat_token=None, heartbeat_at=None)))
    beat.start()
    reverse = Checked("reverse DNS", False, "the PTR of 192.0.2.9 is missing")
    transact(world.engine, lambda connection: last_verified.keep(connection, "s1", [reverse], NOW))
    found = said(world)
    assert [finding.problem.replace(f"{NOW:%Y-%m-%d %H:%M}", "T") for finding in found] == [
        "server s1: port 25 failed at T UTC: the way out over port 25 is closed",
        "server s1: reverse DNS failed at T UTC: the PTR of 192.0.2.9 is missing",
    ]
    assert [finding.remedy for finding in found] == [
        f"correct it, then `mail-pipelines server verify s1` {where}" for where in ("on its host", "at the centre")
    ]
    last_checks.keep(folders, {}, NOW)
    beat.beat()
    transact(world.engine, lambda connection: last_verified.keep(connection, "s1", [], NOW))
    assert said(world) == []


@ON_SQLITE
@pytest.mark.parametrize(
    "told",
    ["x", 5, {"at": "yesterday", "failed": {}}, {"at": NOW.isoformat()}, {"at": NOW.isoformat(), "failed": ["x"]}],
    ids=["a word", "a number", "another clock", "nothing failed", "a list"],
)
def test_what_a_stolen_server_tells_of_its_checks_ends_no_doctor(world: World, told: object) -> None:
    tells(world, verified=told)
    assert said(world) == []


@ON_SQLITE
def test_a_heartbeat_does_not_end_for_a_file_that_it_cannot_read(world: World) -> None:
    path = world.folders("s1").last_checks
    path.mkdir()
    assert last_checks.read(world.folders("s1")) is None


def test_a_listed_address_an_old_exim_and_a_block_name_what_to_do(world: World) -> None:
    tells(world, version="Exim 4.94.2")
    row = {"provider": "google", "state": "open", "rule": "blocked", "reason": "6 of 6 answers: ip_blocked", "trips": 1, "baseline": {}}
    transact(world.engine, lambda connection: connection.execute(sa.insert(models.Breaker).values(server_id=1, changed_at=NOW, **row)))
    listed = listing.Listing(NOW, ("192.0.2.9 is listed by bl.test",))
    transact(world.engine, lambda connection: listing.keep(connection, {"s1": listed}))
    assert said(world) == [
        Finding("servers", "server s1 runs Exim 4.94.2: it needs 4.96 at least", "upgrade exim4-daemon-light on its host"),
        Finding("block lists", "server s1: 192.0.2.9 is listed by bl.test", "docs/runbook.md#listed-address"),
        Finding(
            "breakers",
            "server s1 has stopped sending to google (6 of 6 answers: ip_blocked)",
            "it tries again by itself; docs/runbook.md#blocked-by-a-provider",
        ),
    ]
    world.set_server("s1", state="retired")
    assert [finding.check for finding in said(world)] == ["servers"]


@pytest.mark.parametrize(
    ("version", "old"), [("Exim 4.95", True), ("Exim 4.96", False), ("Exim 4.98.2", False), ("Exim 5.0", False), ("Exim", False), ("", False)]
)
def test_an_exim_is_judged_by_its_number(version: str, old: bool) -> None:
    from mail_pipelines.dispatch.exim import instance

    assert instance.is_too_old(version) is old


# --- domains ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def zone(monkeypatch: pytest.MonkeyPatch) -> Iterator[Zone]:
    monkeypatch.delenv("MAIL_PIPELINES_SENDING__ALLOW_UNVERIFIED")
    with serving(Zone()) as zone:
        monkeypatch.setenv("MAIL_PIPELINES_DNS__SERVERS", zone.address)
        monkeypatch.setenv("MAIL_PIPELINES_DNS__TIMEOUT_SECONDS", "10")
        yield zone


def test_a_domain_has_one_line_until_the_dns_has_its_records(world: World, zone: Zone) -> None:
    def of_domains() -> list[Finding]:
        return list(domains.check_domains(config.load()))

    assert of_domains() == []
    domain = store.add(world.engine, Names.of("shop.test"), world.settings.token_key(), NOW)
    selector = domain.keys[0].selector
    (line,) = of_domains()
    assert line.problem == (
        f"shop.test: DKIM (TXT of {selector}._domainkey.shop.test) is missing, DMARC (TXT of _dmarc.shop.test) is missing, SPF (TXT of bounces.shop.test) "
        "is missing, bounces (MX of bounces.shop.test) is missing, links (CNAME of links.shop.test) is missing: nothing is sent from it"
    )
    assert line.remedy == "`mail-pipelines domain check shop.test` says what to publish"
    with reading(world.engine) as connection:
        hosts = records.Hosts.of(config.load(), store.sending_hosts(connection))
    zone.publish(*(record.zone_line() for record in records.records_of(domain, hosts, NOW)))
    assert of_domains() == []
    # Nothing is kept: `domain show` goes on telling of the last `domain check`.
    with reading(world.engine) as connection:
        assert store.load(connection, "shop.test").verdict is None
    zone.withdraw("bounces.shop.test", "MX")
    (line,) = of_domains()
    assert line.problem == "shop.test: bounces (MX of bounces.shop.test) is missing"


@ON_SQLITE
def test_the_record_of_a_retired_key_is_missed_by_nobody(world: World, zone: Zone) -> None:
    """That of a stolen server has to be gone."""
    store.add(world.engine, Names.of("shop.test"), world.settings.token_key(), NOW)
    for _ in range(2):
        rotation.rotate(world.engine, config.load(), "shop.test", NOW, allow_unverified=True)
    with reading(world.engine) as connection:
        domain = store.load(connection, "shop.test")
        hosts = records.Hosts.of(config.load(), store.sending_hosts(connection))
    (retired,) = [key for key in domain.keys if key.state is KeyState.RETIRED]
    zone.publish(*(record.zone_line() for record in records.records_of(domain, hosts, NOW) if not record.name.startswith(f"{retired.selector}.")))
    assert list(domains.check_domains(config.load())) == []


@pytest.mark.slow
@ON_SQLITE
def test_forty_servers_and_twenty_domains_do_not_wait_for_a_dns_that_is_silent(world: World, zone: Zone, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(2, 41):
        servers.register(world.engine, f"s{number}", kind="exim", host="127.0.0.1", port=2500 + number, now=NOW)
    tells(world, hostname="mail.example.test", addresses=["192.0.2.9"])
    # What it imports takes longer than what it does.
    examination.examine()

    def names(number: int) -> dict[str, str]:
        return {"domain": f"d{number}.test", "return_path_domain": f"bounces.d{number}.test", "tracking_domain": f"links.d{number}.test"}

    rows = [{**names(number), "ready": False, "created_at": NOW} for number in range(20)]
    transact(world.engine, lambda connection: connection.execute(sa.insert(models.SendingDomain), rows))
    monkeypatch.setenv("MAIL_PIPELINES_DNS__TIMEOUT_SECONDS", "600")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as silent:
        silent.bind(("127.0.0.1", 0))
        monkeypatch.setenv("MAIL_PIPELINES_DNS__SERVERS", f"127.0.0.1:{silent.getsockname()[1]}")
        began = time.monotonic()
        found = [finding for finding in examination.examine() if finding.check == "domains"]
    # One domain after the other would take 80 s, though the questions about each are asked at once.
    assert time.monotonic() - began < 60
    first = "d0.test, d1.test, d10.test, d11.test, d12.test"
    said = f"the DNS does not answer about {first} and 15 more: no answer within 4 s; try again, or see the setting dns.servers"
    assert [finding.problem for finding in found] == [said]


# --- making servers and telling of them -------------------------------------------------------------------------------

SOURCES = """
[[source]]
name = "rack"
kind = "inventory"
hosts = [{address = "192.0.2.10", key_file = "{home}/ssh", host_key = "ssh-ed25519 AAAA"}]

[[source]]
name = "cloud"
kind = "command"
command = ["/nowhere/cloud", "hetzner"]
key_file = "{home}/ssh"
cost_per_hour = 0.01
"""


@ON_SQLITE
def test_what_a_host_source_lacks_is_told_before_a_server_is_needed(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    home = config.home_folder()
    (home / "hosts.toml").write_text(SOURCES)

    def lacking() -> list[str]:
        return [finding.problem for finding in said(world) if finding.check == "provisioning"]

    names, key = "its servers need names: set provisioning.domain", f"the SSH key {home}/ssh cannot be read: No such file or directory"
    money, command = "a host costs 0.01 an hour, and provisioning.budget is 0", "its command /nowhere/cloud is not there, or may not be run"
    assert lacking() == [f"host source {name}: {word}" for name, words in (("rack", (names, key)), ("cloud", (names, money, command, key))) for word in words]
    monkeypatch.setenv("MAIL_PIPELINES_PROVISIONING__DOMAIN", "example.com")
    monkeypatch.setenv("MAIL_PIPELINES_PROVISIONING__BUDGET", "50")
    (home / "ssh").write_text(ssh_keys.generate())
    (home / "hosts.toml").write_text(SOURCES.replace("/nowhere/cloud", sys.executable))
    assert lacking() == []


@ON_SQLITE
def test_half_a_configuration_of_alerts_is_named(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def about_alerts() -> list[str]:
        return [finding.problem for finding in host.check_alerts(config.load())]

    assert about_alerts() == []
    monkeypatch.setenv("MAIL_PIPELINES_ALERTS__RELAY_HOST", "smtp.example.com")
    assert about_alerts() == ["alerts.relay_host is set: give alerts.from_address and alerts.to, too"]


# --- configuration ----------------------------------------------------------------------------------------------------


@ON_SQLITE
def test_each_server_of_a_host_is_asked_for_by_its_own_account(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An account shows no server but its own; SQLite has none, so each has a database."""
    home = config.home_folder()
    (home / "servers").mkdir()
    for key in ("s1", "s2"):
        own = world.engine if key == "s1" else create_engine(f"sqlite:///{tmp_path / 'other.sqlite3'}")
        migrate.upgrade(own)
        servers.register(own, key, kind="catcher", host="127.0.0.1", port=25, now=NOW)
        token_key = 'token_key = "one"' if key == "s1" else ""
        text = f'[server]\nexim = "s1"\naddress = "127.0.0.1{key[1]}"\n[database]\nurl = "{own.url}"\n[sending]\n{token_key}\n'
        (home / "servers" / f"{key}.toml").write_text(text)
    monkeypatch.delenv("MAIL_PIPELINES_DATABASE__URL")
    monkeypatch.delenv("MAIL_PIPELINES_SENDING__TOKEN_KEY")
    monkeypatch.setenv(config.SERVER_VARIABLE, "s1,s2")
    said = {finding.check: finding.problem for finding in examination.examine()}
    assert said["servers"] == "1 of 1 active servers are silent: s2"
    assert "sending.token_key is not set" in said["token key"]


@ON_SQLITE
@pytest.mark.parametrize("broken", ["s1", "s2", "s1 and s2"])
def test_a_broken_file_of_one_server_hides_no_other_line(world: World, broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = config.home_folder() / "servers"
    folder.mkdir()
    for key, rest in (("s1", ""), ("s2", 'exim = "s1"\n')):
        (folder / f"{key}.toml").write_text(f'[server]\naddress = "127.0.0.1{key[1]}"\n{rest}' if key not in broken else "[server\n")
    monkeypatch.setenv(config.SERVER_VARIABLE, "s1,s2")
    world.set_server("s1", heartbeat_at=NOW - dt.timedelta(hours=1))
    found = examination.examine()
    said = [finding.problem for finding in found if finding.check == "configuration"]
    assert [f"{key}.toml is not valid TOML" in problem for key, problem in zip(broken.split(" and "), said, strict=True)] == [True] * len(said)
    assert {"home", "servers"} <= {finding.check for finding in found}
    # A configuration of all of them does.
    (config.home_folder() / config.CONFIG_FILE).write_text("[server\n")
    assert {finding.check for finding in examination.examine()} == {"configuration"}
