"""A server with a real Exim is verified from its own mail server to the test message that arrives, and every check is made to fail once."""

from __future__ import annotations

import datetime as dt
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import sqlalchemy as sa
from typer.testing import CliRunner, Result

from mail_pipelines import config
from mail_pipelines.cli import app
from mail_pipelines.commands import context
from mail_pipelines.database.engine import reading
from mail_pipelines.dispatch import audit, last_checks, servers
from mail_pipelines.dispatch.recovery import reading as recovery_reading
from mail_pipelines.dispatch.session import journal_of
from mail_pipelines.domains import store
from mail_pipelines.domains.domain import Names, SendingDomain
from mail_pipelines.domains.records import dkim_record
from mail_pipelines.inbound import reading as inbound_reading
from mail_pipelines.messages.keyring import KeyRing
from mail_pipelines.provisioning import block_lists, last_verified, listing, verify
from mail_pipelines.provisioning.finding import Finding
from tests.dispatch.world import RunningExim, Servers, World, make_world, write_play
from tests.inbound.receiving import Receiving
from tests.parts.dns import Zone
from tests.parts.processes import free_port, stop, wait_for

pytestmark = [pytest.mark.server, pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)]

NAMES = ["SMTP", "TLS", "AUTH", "port 25", "test message", "HELO", "reverse DNS", "DKIM", "SPF", "block lists", "arrival"]
REVERSE = "9.2.0.192.in-addr.arpa"
RECORDS = (
    "mail.example.test. 60 IN A 192.0.2.9",
    f"{REVERSE}. 60 IN PTR mail.example.test.",
    'bounces.shop.test. 60 IN TXT "v=spf1 include:_spf.test ~all"',
    '_spf.test. 60 IN TXT "v=spf1 ip4:192.0.2.8/31 ~all"',
    "big.test. 60 IN MX 10 mx.big.test.",
    "mx.big.test. 60 IN A 127.0.0.1",
    *(f"2.0.0.127.{a_list.zone}. 60 IN A 127.0.0.2" for a_list in block_lists.block_lists()),
)


@pytest.fixture(scope="module")
def receiving(_sqlite_template: Path) -> Iterator[Receiving]:
    """Where bounces come: a real Exim, too, which also is the mail exchanger of the world."""
    receiving = Receiving(_sqlite_template)
    yield receiving
    receiving.end()


@dataclass
class Place:
    world: World
    exim: RunningExim
    zone: Zone
    receiving: Receiving
    domain: SendingDomain

    def verify(self, **given: object) -> dict[str, Finding]:
        found = verify.verify(
            self.world.engine,
            self.world.settings,
            "s1",
            dt.datetime.now(dt.UTC),
            **{"egress_port": self.receiving.port, "egress_domains": ("big.test",), "arrival_seconds": 120, **given},
        )
        assert [finding.name for finding in found.findings] == NAMES
        return {finding.name: finding for finding in found.findings}


@pytest.fixture
def place(engine: sa.Engine, tmp_path: Path, zone: Zone, running: Servers, receiving: Receiving, monkeypatch: pytest.MonkeyPatch) -> Place:
    monkeypatch.setenv("MAIL_PIPELINES_DNS__SERVERS", zone.address)
    monkeypatch.setenv("MAIL_PIPELINES_DNS__TIMEOUT_SECONDS", "60")
    monkeypatch.setenv("MAIL_PIPELINES_INBOUND__FOLDER", str(receiving.folders.root))
    # Whatever address this machine has: nobody else sees this one, so that of its name counts.
    monkeypatch.setenv("MAIL_PIPELINES_SERVER__ADDRESS", "127.0.0.1")
    made = make_world(engine, tmp_path / "home", recipients=1, kind="exim")
    world = replace(made, settings=config.load())
    context.settings.cache_clear()
    domain = store.add(engine, Names.of("shop.test"), world.settings.token_key(), dt.datetime.now(dt.UTC))
    zone.publish(*RECORDS, dkim_record("shop.test", domain.keys[0]).zone_line())
    exim = running.start(world, world.server(), write_play(tmp_path / "play.toml"), f"bounces.shop.test=127.0.0.1:{receiving.port}")
    wait_for(lambda: (health(engine) or {}).get("hostname") == "mail.example.test", what="the first heartbeat")
    return Place(world, exim, zone, receiving, domain)


def health(engine: sa.Engine) -> dict[str, object] | None:
    with reading(engine) as connection:
        return dict(servers.find(connection, "s1").health or {})


def command(place: Place, *words: str) -> Result:
    given = ("--egress-domain", "big.test", "--egress-port", str(place.receiving.port))
    result = CliRunner().invoke(app, ["server", *words, *given])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def test_a_good_server_passes_and_its_test_message_disturbs_nothing(place: Place) -> None:
    answered = command(place, "verify", "s1", "--json")
    findings = json.loads(answered.output)
    assert [finding["name"] for finding in findings] == NAMES
    assert [finding for finding in findings if finding["ok"] is not True] == []
    assert answered.exit_code == 0
    assert "signed by mp" in findings[-1]["text"]
    again = command(place, "verify", "s1")
    assert again.exit_code == 0
    assert again.output.count("ok      ") == len(NAMES)
    # What `doctor` tells of it: nothing has failed, here or there.
    kept = last_checks.read(place.world.folders("s1"))
    assert kept is not None
    assert kept["failed"] == {}
    with reading(place.world.engine) as connection:
        assert {key: dict(found.failed) for key, found in last_verified.at_centre(connection).items()} == {"s1": {}}
    egress = command(place, "check-egress", "--json")
    assert (egress.exit_code, json.loads(egress.output)[0]["ok"]) == (0, True)

    # The log names messages of no campaign, and whoever reads it leaves them alone.
    world = place.world
    with reading(world.engine) as connection:
        server = servers.find(connection, "s1")
    journal = journal_of(world.folders("s1"), "exim")
    done = audit.run(world.engine, world.settings, server, journal, dt.datetime.now(dt.UTC) + dt.timedelta(seconds=10))
    assert (done.numbers()["delivered"], done.foreign, done.alarms, done.disagreeing.total()) == (2, 0, 0, 0)
    offers: list[object] = []
    keys = KeyRing([(server.id, world.settings.token_key())])
    blocks = audit.tail.blocks(journal, None, dt.datetime.now(dt.UTC).timestamp() + 10)
    found = recovery_reading.read("s1", journal, blocks, None, keys, lambda some: offers.extend(some))
    assert (offers, found.foreign) == ([], 0)

    # Nor is it a bounce, and it still counts as arrived when it has been read.
    report = inbound_reading.read(world.engine, world.settings, dt.datetime.now(dt.UTC))
    assert report.numbers() == {"ignored_test": 2}
    subject = verify.Subject(world.engine, world.settings, server, "mail.example.test", ("192.0.2.9",), dt.datetime.now(dt.UTC), keys=keys)
    assert verify.BY_THE_DNS[-1](subject).ok


def test_what_is_wrong_in_the_dns_fails_its_own_check_alone(place: Place) -> None:
    zone, listed = place.zone, block_lists.block_lists()[0]
    key_name = f"{place.domain.keys[0].selector}._domainkey.shop.test"
    key_line = dkim_record("shop.test", place.domain.keys[0]).zone_line()
    # Check: what is put in place of what, and what is said.
    wrong = {
        "reverse DNS": (REVERSE, "PTR", f"{REVERSE}. 60 IN PTR host9.hoster.test.", "set it where the address was rented"),
        "SPF": ("_spf.test", "TXT", '_spf.test. 60 IN TXT "v=spf1 ip4:198.51.100.1 ~all"', "does not let 192.0.2.9 send (softfail)"),
    }
    whole = {line.split(".  ")[0].split(". ")[0]: line for line in RECORDS}
    for check, (name, kind, line, words) in wrong.items():
        zone.withdraw(name, kind)
        zone.publish(line)
        found = place.verify()
        assert [finding.name for finding in found.values() if finding.ok is not True] == [check]
        assert words in found[check].text
        zone.withdraw(name, kind)
        zone.publish(whole[name])

    # A listing, and a query that was refused, which is none.
    zone.publish(f"9.2.0.192.{listed.zone}. 60 IN A 127.0.0.4")
    found = place.verify()
    assert [finding.name for finding in found.values() if finding.ok is not True] == ["block lists"]
    assert listed.remedy in found["block lists"].text
    # It counts as a look of the sensor's own: what would drain a server does so when it is seen again.
    with reading(place.world.engine) as connection:
        (known,) = listing.listings(connection).values()
    assert (known.matters, known.confirmed) == (known.listed, False)
    zone.withdraw(f"9.2.0.192.{listed.zone}", "A")
    zone.publish(f"9.2.0.192.{listed.zone}. 60 IN A 127.255.255.254")
    found = place.verify()
    assert found["block lists"].ok
    assert "refuses this resolver" in found["block lists"].text

    # Without the key nobody can verify what arrives, either.
    zone.withdraw(key_name, "TXT")
    found = place.verify()
    assert [finding.name for finding in found.values() if finding.ok is not True] == ["DKIM", "arrival"]
    assert "domain show shop.test" in found["DKIM"].text
    zone.publish(key_line)

    # A name that is another host's: the address that it confirms is not this one.
    zone.withdraw("mail.example.test", "A")
    found = place.verify(egress_domains=("nowhere.test",))
    assert {name: finding.ok for name, finding in found.items() if finding.ok is not True} == {"port 25": None, "HELO": False}
    assert "has no address in the DNS" in found["HELO"].text

    # A DNS that does not answer is no failure of the server's.
    zone.publish(whole["mail.example.test"])
    zone.silent |= {REVERSE, "bounces.shop.test", key_name}
    impatient = place.world.settings.dns.model_copy(update={"timeout_seconds": 8})
    place.world = replace(place.world, settings=place.world.settings.model_copy(update={"dns": impatient}))
    found = place.verify()
    assert {name: finding.ok for name, finding in found.items() if finding.ok is not True} == {
        "reverse DNS": None,
        "DKIM": None,
        "SPF": None,
        "arrival": False,
    }


def test_a_way_out_that_is_closed_and_a_mail_server_that_is_down_are_named(place: Place) -> None:
    closed = place.verify(egress_port=free_port())
    assert [finding.name for finding in closed.values() if not finding.ok] == ["port 25"]
    place.exim.stop()
    down = place.verify()
    assert [finding.name for finding in down.values() if not finding.ok] == ["SMTP", "test message", "arrival"]
    assert "is `mail-pipelines exim run`" in down["SMTP"].text
    failed = command(place, "verify", "s1", "--wait", "0")
    assert failed.exit_code == 1
    assert (failed.output.count("failed  "), failed.output.count("unknown ")) == (2, 1)
    place.exim.start()


def test_a_message_that_the_return_path_refuses_or_loses_is_named(place: Place, tmp_path: Path) -> None:
    """Its mail exchanger is down, then another installation's, then one that loses mail."""
    stop(place.receiving.process, 30)
    try:
        down = place.verify(egress_domains=("nowhere.test",))
    finally:
        place.receiving.restart()
    assert [finding.name for finding in down.values() if finding.ok is False] == ["test message"]
    assert "to bounces.shop.test: " in down["test message"].text

    elsewhere = config.load({**place_environment(place), "MAIL_PIPELINES_INBOUND__FOLDER": str(tmp_path / "elsewhere")})
    lost = verify.verify(
        place.world.engine,
        elsewhere,
        "s1",
        dt.datetime.now(dt.UTC),
        arrival_seconds=0.5,
        egress_port=place.receiving.port,
        egress_domains=("big.test",),
    )
    assert [finding.name for finding in lost.findings if not finding.ok] == ["arrival"]
    assert "see that the return path's MX leads to" in lost.findings[-1].text


def place_environment(place: Place) -> dict[str, str]:
    return {name: value for name, value in place.exim.environment.items() if name.startswith("MAIL_PIPELINES_")}


def test_each_host_makes_the_checks_that_it_can(place: Place, tmp_path: Path) -> None:
    environ = place_environment(place)
    now = dt.datetime.now(dt.UTC)
    own = config.load({**environ, "MAIL_PIPELINES_SERVER": "s1"})
    at_host = verify.verify(place.world.engine, own, "s1", now, egress_port=place.receiving.port, egress_domains=("big.test",))
    assert [finding.name for finding in at_host.findings] == NAMES[:5]
    assert at_host.ok
    assert at_host.elsewhere == "not looked at here: DNS, block lists and arrival: at the centre, by the same command"
    centre = config.load({**environ, "MAIL_PIPELINES_SERVER__LOG_FOLDER": str(tmp_path / "none")})
    at_centre = verify.verify(place.world.engine, centre, "s1", now)
    assert [finding.name for finding in at_centre.findings] == NAMES[5:]
    assert at_centre.ok
    assert "SMTP, port 25 and test message: on its host" in at_centre.elsewhere


def test_a_server_that_has_told_nothing_is_not_looked_up(place: Place) -> None:
    servers.register(place.world.engine, "new", kind="exim", host="127.0.0.1", port=1, now=dt.datetime.now(dt.UTC))
    verdict = verify.verify(place.world.engine, place.world.settings, "new", dt.datetime.now(dt.UTC))
    assert [(finding.name, finding.ok) for finding in verdict.findings] == [("HELO", False)]
