"""Records of servers get into a real DNS server and out of it again, whoever publishes them."""

from __future__ import annotations

import datetime as dt
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa
from typer.testing import CliRunner, Result

from mail_pipelines import config
from mail_pipelines.cli import app
from mail_pipelines.commands import context
from mail_pipelines.config import DnsSettings
from mail_pipelines.database.engine import reading, transact
from mail_pipelines.database.models import Server
from mail_pipelines.dispatch import servers, sources
from mail_pipelines.domains import rotation, store
from mail_pipelines.domains.domain import Names
from mail_pipelines.domains.records import Hosts, Purpose, Record, records_of
from mail_pipelines.provisioning.dns import records
from mail_pipelines.provisioning.dns.publishers import ByHand, Command, Rfc2136, publisher_of
from mail_pipelines.provisioning.dns.records import DnsError
from mail_pipelines.provisioning.interfaces import DnsPublisher
from tests.parts.knot import KEY, Knot, running

NOW = dt.datetime(2026, 11, 30, 9, 0, tzinfo=dt.UTC)
ZONES = ("mail.test", "shop.test", "2.0.192.in-addr.arpa", "8.b.d.0.1.0.0.2.ip6.arpa")
HOST, REVERSE = records.host_records("mx9.mail.test", ["192.0.2.9"])
LONG = Record(Purpose.DKIM, "mp1._domainkey.shop.test", "TXT", "v=DKIM1; k=rsa; p=" + "A" * 392)


@pytest.fixture(scope="module")
def _knot(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Knot]:
    with running(tmp_path_factory.mktemp("knot"), ZONES) as knot:
        yield knot


@pytest.fixture
def knot(_knot: Knot) -> Iterator[Knot]:
    """One server for all tests of this file, which leave nothing in its zones."""
    yield _knot
    for name, kind in (("mx9.mail.test.", "A"), ("mx9.mail.test.", "AAAA"), ("9.2.0.192.in-addr.arpa.", "PTR"), ("_spf.mail.test.", "TXT")):
        assert _knot.has(name, kind) == [], "a test has left records behind"


def settings_for(knot: Knot, **more: object) -> DnsSettings:
    given = {"servers": [knot.address], "timeout_seconds": 3.0, "update_server": knot.address, "update_key": KEY} | more
    return DnsSettings.model_validate(given)


def by_update(knot: Knot, folder: Path) -> DnsPublisher:
    return publisher_of(settings_for(knot, publisher="rfc2136"))


HOOK = """
import json, sys
import dns.query, dns.tsig, dns.update
asked = json.load(sys.stdin)
algorithm, name, secret = {key!r}.split(":")
zones = {zones!r}
for record in asked["records"]:
    zone = next(zone for zone in zones if record["name"].endswith(zone))
    update = dns.update.UpdateMessage(zone, keyring=dns.tsig.Key(name, secret, algorithm))
    values = ['" "'.join(value[start:start + 250] for start in range(0, len(value), 250)) for value in record["values"]]
    values = [f'"{{value}}"' if record["type"] == "TXT" else value + ("." if record["type"] == "PTR" else "") for value in values]
    if asked["action"] == "publish":
        update.delete(record["name"] + ".", record["type"])
    for value in values:
        if asked["action"] == "publish":
            update.add(record["name"] + ".", record["ttl"], record["type"], value)
        else:
            update.delete(record["name"] + ".", record["type"], value)
    dns.query.tcp(update, "127.0.0.1", port={port}, timeout=5)
"""


def by_command(knot: Knot, folder: Path) -> DnsPublisher:
    """As an operator's script for a cloud would: here it speaks to the same server."""
    hook = folder / "hook.py"
    hook.write_text(HOOK.format(key=KEY, zones=ZONES, port=knot.port))
    return publisher_of(settings_for(knot, publisher="command", command=[sys.executable, str(hook)]))


@pytest.fixture(params=[by_update, by_command], ids=["rfc2136", "command"])
def publisher(request: pytest.FixtureRequest, knot: Knot, tmp_path: Path) -> DnsPublisher:
    made: DnsPublisher = request.param(knot, tmp_path)
    return made


# --- the contract of every publisher that acts ----------------------------------------------------------------------


def test_what_is_published_is_seen_once_however_often(publisher: DnsPublisher, knot: Knot) -> None:
    wanted = [HOST, REVERSE, LONG, *records.host_records("mx9.mail.test", ["2001:db8::9"]), records.spf_record("_spf.mail.test", ["192.0.2.9", "192.0.2.8"])]
    assert publisher.missing(wanted) == wanted
    for _ in range(2):
        publisher.publish(wanted)
        assert publisher.missing(wanted) == []
    assert knot.has("mx9.mail.test.", "A") == ["192.0.2.9"]
    assert knot.has("9.2.0.192.in-addr.arpa.", "PTR") == ["mx9.mail.test."]
    assert knot.has("_spf.mail.test.", "TXT") == ['"v=spf1 ip4:192.0.2.8/31 ~all"']
    for _ in range(2):
        publisher.withdraw(wanted)
        assert publisher.missing(wanted) == wanted
    assert knot.has("other.mail.test.", "TXT") == ['"somebody else\'s"']


def test_publishing_takes_the_place_of_what_the_name_had(publisher: DnsPublisher, knot: Knot) -> None:
    """The shared record loses a server, and a server gets another address."""
    publisher.publish([records.spf_record("_spf.mail.test", ["192.0.2.9", "198.51.100.1"]), HOST])
    moved = records.host_records("mx9.mail.test", ["192.0.2.77"])[0]
    shorter = records.spf_record("_spf.mail.test", ["192.0.2.9"])
    publisher.publish([shorter, moved])
    assert knot.has("_spf.mail.test.", "TXT") == ['"v=spf1 ip4:192.0.2.9 ~all"']
    assert knot.has("mx9.mail.test.", "A") == ["192.0.2.77"]
    publisher.withdraw([shorter, moved])


def test_withdrawing_leaves_what_somebody_else_has_put_there(publisher: DnsPublisher, knot: Knot) -> None:
    somebodys = records.host_records("mx9.mail.test", ["192.0.2.77"])[0]
    publisher.publish([somebodys])
    publisher.withdraw([HOST])
    assert knot.has("mx9.mail.test.", "A") == ["192.0.2.77"]
    publisher.withdraw([somebodys])


# --- dynamic updates ------------------------------------------------------------------------------------------------


def test_records_of_zones_elsewhere_stay_missing_and_the_others_are_published(knot: Knot, tmp_path: Path) -> None:
    """Reverse zones are mostly the hoster's."""
    publisher = by_update(knot, tmp_path)
    elsewhere = records.host_records("mx9.mail.test", ["203.0.113.9"])[1]
    publisher.publish([HOST, elsewhere])
    assert publisher.missing([HOST, elsewhere]) == [elsewhere]
    publisher.withdraw([HOST, elsewhere])


@pytest.mark.parametrize(
    ("changed", "complaint"),
    [
        ({"update_key": "hmac-sha256:nobody:c2VjcmV0"}, "refuses|does not know the key nobody"),
        ({"update_key": "hmac-sha256:publisher:d3Jvbmc="}, "secret of dns.update_key differs|refuses"),
        ({"update_server": "127.0.0.1:9"}, r"127\.0\.0\.1:9 \(dns\.update_server\) does not answer"),
        ({"update_key": "hmac-sha256:publisher:not base64"}, "dns.update_key is no TSIG key"),
        ({"update_key": "md2:publisher:c2VjcmV0"}, "dns.update_key is no TSIG key"),
        ({"update_key": "publisher"}, "dns.update_key is no TSIG key"),
        ({"update_key": None}, "give dns.update_server"),
        ({"update_server": "ns.mail.test"}, "dns.update_server has 'ns.mail.test'"),
    ],
)
def test_what_is_wrong_is_said_without_the_secret(knot: Knot, changed: dict[str, object], complaint: str) -> None:
    with pytest.raises(Exception, match=complaint) as raised:
        publisher_of(settings_for(knot, publisher="rfc2136", **changed)).publish([HOST])
    assert "c2VjcmV0" not in str(raised.value)
    assert "not base64" not in str(raised.value)
    assert knot.has("mx9.mail.test.", "A") == []


def test_a_key_needs_no_algorithm(knot: Knot) -> None:
    publisher = publisher_of(settings_for(knot, publisher="rfc2136", update_key=KEY.removeprefix("hmac-sha256:")))
    assert isinstance(publisher, Rfc2136)
    assert "c2Vj" not in repr(publisher)
    publisher.publish([HOST])
    assert knot.has("mx9.mail.test.", "A") == ["192.0.2.9"]
    publisher.withdraw([HOST])


# --- the command, and by hand ---------------------------------------------------------------------------------------


def test_a_command_gets_whole_sets_as_json_and_its_failure_is_told(knot: Knot, tmp_path: Path) -> None:
    kept = tmp_path / "asked.json"
    good = publisher_of(settings_for(knot, publisher="command", command=["tee", str(kept)]))
    good.publish(records.host_records("mx9.mail.test", ["192.0.2.9", "192.0.2.10"])[::2])
    assert json.loads(kept.read_text()) == {
        "action": "publish",
        "records": [{"name": "mx9.mail.test", "type": "A", "ttl": 3600, "values": ["192.0.2.10", "192.0.2.9"]}],
    }
    kept.unlink()
    good.withdraw([])
    assert not kept.exists()
    bad = publisher_of(settings_for(knot, publisher="command", command=["sh", "-c", "cat >/dev/null; echo 'no such zone' >&2; exit 3"]))
    with pytest.raises(DnsError, match="could not withdraw the records: status 3, no such zone"):
        bad.withdraw([HOST])
    with pytest.raises(DnsError, match="did not run to its end: No such file"):
        publisher_of(settings_for(knot, publisher="command", command=["/no/such/program"])).publish([HOST])
    with pytest.raises(DnsError, match=r"say in dns\.command which one"):
        publisher_of(settings_for(knot, publisher="command"))


def test_by_hand_only_looks(knot: Knot, tmp_path: Path) -> None:
    publisher = publisher_of(settings_for(knot))
    assert isinstance(publisher, ByHand)
    publisher.publish([HOST])
    assert publisher.missing([HOST]) == [HOST]
    acting = by_update(knot, tmp_path)
    acting.publish([HOST])
    publisher.withdraw([HOST])
    assert publisher.missing([HOST]) == []
    acting.withdraw([HOST])


def test_a_resolver_that_does_not_answer_sees_nothing(knot: Knot) -> None:
    assert publisher_of(settings_for(knot, servers=["127.0.0.1:9"], timeout_seconds=0.3)).missing([HOST]) == [HOST]


# --- which records --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("hostname", "address", "complaint"), [("mx 9", "192.0.2.9", "is no host name"), ("mx9.mail.test", "192.0.2", "is no IP address")])
def test_nonsense_becomes_no_record(hostname: str, address: str, complaint: str) -> None:
    with pytest.raises(DnsError, match=complaint):
        records.host_records(hostname, [address])


def test_the_shared_record_has_networks_of_both_families() -> None:
    many = [f"192.0.2.{number}" for number in range(16, 32)] + ["2001:db8::2", "2001:db8::1", "198.51.100.7"]
    assert records.spf_record("_spf.mail.test", many).value == "v=spf1 ip4:192.0.2.16/28 ip4:198.51.100.7 ip6:2001:db8::1 ip6:2001:db8::2 ~all"
    assert records.spf_record("_spf.mail.test", []).value == "v=spf1 ~all"


def register(engine: sa.Engine, key: str, *addresses: str, state: str = "active") -> servers.ServerInfo:
    server = servers.register(engine, key, kind="exim", host="127.0.0.1", port=2525, now=NOW)
    health = {"hostname": f"{key}.mail.test", "addresses": list(addresses)}
    transact(engine, lambda connection: connection.execute(sa.update(Server).where(Server.id == server.id).values(health=health, state=state)))
    return server


@pytest.fixture
def installation(engine: sa.Engine, knot: Knot, database_url: str, monkeypatch: pytest.MonkeyPatch) -> config.Settings:
    for name, value in {
        "DATABASE__URL": database_url,
        "SENDING__TOKEN_KEY": "a key for tests",
        "DNS__SERVERS": knot.address,
        "DNS__UPDATE_SERVER": knot.address,
        "DNS__UPDATE_KEY": KEY,
        "DNS__PUBLISHER": "rfc2136",
        "DNS__SPF_INCLUDE": "_spf.mail.test",
    }.items():
        monkeypatch.setenv(f"MAIL_PIPELINES_{name}", value)
    context.settings.cache_clear()
    return config.load()


def command(*words: str) -> Result:
    result = CliRunner().invoke(app, ["server", "dns", *words])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def test_a_server_is_put_into_the_dns_and_taken_out_by_command(engine: sa.Engine, installation: config.Settings, knot: Knot) -> None:
    register(engine, "mx8", "198.51.100.8", "10.0.0.8")
    register(engine, "gone", "198.51.100.99", state="retired")
    server = register(engine, "mx9", "192.0.2.9")
    store.add(engine, Names.of("shop.test"), installation.token_key(), NOW)
    [step] = rotation.equip(engine, installation, server.id, NOW)
    key = f"{step.key.selector}._domainkey.shop.test."

    shown = command("mx9")
    assert shown.exit_code == 1
    lines = [line for line in shown.output.splitlines() if " IN " in line]
    assert [line.split()[0] for line in lines] == ["mx9.mail.test.", "9.2.0.192.in-addr.arpa.", key, "_spf.mail.test."]
    assert "4 of 4 records are not seen" in shown.output

    published = command("mx9", "--publish")
    assert published.exit_code == 0, published.output
    assert "resolvers see all 4 records" in published.output
    assert knot.has("_spf.mail.test.", "TXT") == ['"v=spf1 ip4:192.0.2.9 ip4:198.51.100.8 ~all"']
    assert len(knot.has(key, "TXT")) == 1

    assert command("mx9", "--withdraw").exit_code == 0
    assert knot.has(key, "TXT") == knot.has("mx9.mail.test.", "A") == knot.has("9.2.0.192.in-addr.arpa.", "PTR") == []
    assert knot.has("_spf.mail.test.", "TXT") == ['"v=spf1 ip4:198.51.100.8 ~all"']
    publisher_of(installation.dns).withdraw([records.spf_record("_spf.mail.test", ["198.51.100.8"])])


def test_a_second_address_of_a_server_joins_the_first(engine: sa.Engine, installation: config.Settings, knot: Knot, tmp_path: Path) -> None:
    register(engine, "mx9", "192.0.2.9", "192.0.2.19")
    by_update(knot, tmp_path).publish([HOST, REVERSE])
    assert command("mx9", "--publish").exit_code == 0
    assert knot.has("mx9.mail.test.", "A") == ["192.0.2.19", "192.0.2.9"]
    assert command("mx9", "--withdraw").exit_code == 0
    assert knot.has("mx9.mail.test.", "A") == knot.has("19.2.0.192.in-addr.arpa.", "PTR") == []
    by_update(knot, tmp_path).withdraw([records.spf_record("_spf.mail.test", [])])


def test_a_domains_return_path_includes_the_shared_record(engine: sa.Engine, installation: config.Settings) -> None:
    domain = store.add(engine, Names.of("shop.test"), installation.token_key(), NOW)
    with reading(engine) as connection:
        hosts = Hosts.of(installation, store.sending_hosts(connection))
    [spf] = [record for record in records_of(domain, hosts, NOW) if record.purpose is Purpose.SPF]
    assert (spf.name, spf.value) == ("bounces.shop.test", "v=spf1 include:_spf.mail.test ~all")


def test_a_server_that_has_not_told_its_name_needs_it_given(engine: sa.Engine, installation: config.Settings) -> None:
    servers.register(engine, "new", kind="exim", host="127.0.0.1", port=2525, now=NOW)
    result = CliRunner().invoke(app, ["server", "dns", "new"])
    assert "give --hostname and --address" in str(result.exception)
    shown = command("new", "--hostname", "mx9.mail.test", "--address", "192.0.2.9")
    assert "mx9.mail.test. 3600 IN A 192.0.2.9" in shown.output


def test_a_host_knows_from_where_it_reaches_the_world() -> None:
    assert all(":" in address or address.count(".") == 3 for address in sources.addresses())


def test_each_publisher_has_a_name_in_the_settings(knot: Knot) -> None:
    made = {name: type(publisher_of(settings_for(knot, publisher=name, command=["true"]))) for name in ("none", "rfc2136", "command")}
    assert made == {"none": ByHand, "rfc2136": Rfc2136, "command": Command}
