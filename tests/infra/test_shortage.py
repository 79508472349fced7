"""A fleet that makes itself, on hosts of kernel namespaces with systemd: from a centre whose campaign nobody can send, by the product's own sensors, jobs and
playbook over SSH, to servers that send it in time, and back to bare hosts.

What belongs here: what only real hosts can show. What does not: the same steps against stand-ins (`tests/provisioning`).
"""

from __future__ import annotations

import datetime as dt
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.infra.conftest import FIRST, OWN
from tests.infra.installing import AS_UNIT, BOUNCES, CENTRE, DATABASE, PUBLIC, Installation, equip
from tests.infra.machine import Machine, environment, machine
from tests.parts.hosts import joined
from tests.parts.processes import wait_for

pytestmark = [pytest.mark.server, pytest.mark.timeout(1200), pytest.mark.xdist_group("machines")]

HOME = "/var/lib/mail-pipelines"
RECIPIENTS = 300
# Whoever makes the servers: what an operator writes into config.toml.
SETTINGS = {
    "dns.publisher": "command",
    "dns.command": ["/usr/local/bin/publish-records"],
    "dns.spf_include": "spf.example.com",
    "provisioning.mode": "auto",
    "provisioning.domain": "example.com",
    "provisioning.cool_down_minutes": 0,
    "provisioning.retry_seconds": 3,
    "operation.sensor_seconds": 4,
}
# The command of a DNS hoster.
PUBLISH = """#!/usr/bin/python3
import socket, sys
with socket.create_connection(("{address}", 8053), 10) as hoster:
    hoster.sendall(sys.stdin.buffer.read())
    hoster.shutdown(socket.SHUT_WR)
    sys.exit(0 if hoster.makefile().read() == "done\\n" else 1)
"""
SUBJECT = b"\r\nSubject: The fair begins\r\n"
SEGMENT = "{key: visitors, name: Visitors, criteria: {in_list: fair}}"
CAMPAIGN = """
name: Fair
segments: {{include: [visitors]}}
unsubscribe: all
finish_by: {finish_by}
content:
  from_name: Shop
  from_address: news@fair.test
  subject: The fair begins
  body: |
    <p>Dear reader, <a href="{{{{ unsubscribe_url }}}}">Unsubscribe</a></p>
"""
# What is wrong with a host, and why its server fails.
REASONS = {
    "silent": r"^play: the host \S+ does not answer by SSH",
    "full": r"^play: the task .* failed: .*[Nn]o space left",
    "lacking": r"^play: the task 'Packages' failed: .*nftables",
    "killed": r"^play: the playbook was not played: it was ended by signal 9$",
    "taken": r"^play: the task .* failed: .*mail-pipelines-exim",
    "listed": r"^verify: block lists: .*zen.spamhaus.org",
}
# Several servers at a time, each to its end, as runs of the job do it one by one; every line that is said.
MAKE = """
import os, sys
from concurrent.futures import ThreadPoolExecutor
os.environ |= {"MAIL_PIPELINES_PROVISIONING__" + name: value for name, value in
    {"ATTEMPTS": "1", "AT_ONCE": "20", "BOOT_SECONDS": "3", "RETRY_SECONDS": "900"}.items()}
from mail_pipelines import config
from mail_pipelines.database.engine import open_engine, transact
from mail_pipelines.provisioning import making, store
from mail_pipelines.resources.provisioning import parts_of
settings = config.load()
engine = open_engine(settings.database)
parts = parts_of(engine, settings)
count = len(parts.sources[0].hosts)
keys = transact(engine, lambda connection: [store.request(connection, settings.provisioning, "for a test").key for _ in range(count)])
def say(line):
    print(line, flush=True)
with ThreadPoolExecutor(count) as threads:
    list(threads.map(lambda key: making.advance(parts, key, say), keys))
"""
# The player that plays on a host, by the lock of its folder.
PLAYER = """
for place in /proc/[0-9]*/fd/*; do
  folder=$(readlink "$place") || continue
  case $folder in */mail-pipelines-play-*/lock) ;; *) continue ;; esac
  grep -qF "\"$1\"" "${folder%/lock}/inventory/hosts.json" || continue
  pid=${place#/proc/}
  echo "${pid%%/*}"
done
"""
# As the button of the web page does it.
LAUNCH = """
import json, sys, urllib.request
mutation = "mutation($p: ExecutionParams!) {launchRun(executionParams: $p) {__typename ... on PythonError {message}}}"
selector = {"repositoryLocationName": "mail_pipelines", "repositoryName": "__repository__", "jobName": sys.argv[1]}
body = json.dumps({"query": mutation, "variables": {"p": {"selector": selector, "runConfigData": {}}}}).encode()
asked = urllib.request.Request("http://127.0.0.1:3000/dagster/graphql", body, {"Content-Type": "application/json"})
print(urllib.request.urlopen(asked, timeout=60).read().decode())
"""


@dataclass(frozen=True)
class Fleet:
    """The centre, and the bare hosts of its rack by their names."""

    installed: Installation
    rack: dict[str, Machine]

    def sql(self, query: str) -> list[list[str]]:
        """What the central database has; cheaper to ask over and over than a command is."""
        said = self.installed.database.run("mariadb", "--batch", "--skip-column-names", "--execute", query, "mail").stdout
        return [line.split("\t") for line in said.splitlines()]

    def value(self, query: str) -> str:
        rows = self.sql(query)
        return rows[0][0] if rows else ""

    def provisions(self) -> dict[str, tuple[str, str, str]]:
        """State, step and reason by server."""
        return {
            key: (state, step, reason) for key, state, step, reason in self.sql("SELECT `key`, state, step, COALESCE(reason, '') FROM provisions ORDER BY id")
        }

    def commands(self, *lines: str) -> str:
        return self.installed.commands(*lines)

    def plan(self) -> None:
        """A plan of now, instead of within five minutes."""
        before = self.value("SELECT version FROM sync_state WHERE source = 'capacity' AND `key` = 'plan'")
        said = self.installed.centre.run("python3", "-", "plan_capacity", text=LAUNCH).stdout
        assert json.loads(said)["data"]["launchRun"]["__typename"] == "LaunchRunSuccess", said
        wait_for(
            lambda: self.value("SELECT version FROM sync_state WHERE source = 'capacity' AND `key` = 'plan'") not in ("", before), seconds=120, what="a plan"
        )

    def campaign(self, column: str) -> str:
        return self.value(f"SELECT {column} FROM campaigns WHERE `key` = 'fair'")

    def servers(self, *states: str) -> set[str]:
        return {key for key, (state, step, _) in self.provisions().items() if state in states and step == ""}

    def sent(self) -> Counter[str]:
        """Messages at the sink by the server that greeted there."""
        return Counter(how.split()[2].split(".")[0] for how, message in self.installed.world.mail() if SUBJECT in message)

    def log(self) -> str:
        """What a test that waits in vain shows."""
        played = self.installed.centre.run("sh", "-c", f"tail -n 30 {HOME}/log/provisioning/*", check=False).stdout
        units = self.installed.centre.run("journalctl", "--no-pager", "-n", "60", "-u", "mail-pipelines-centre-worker", "-u", "mail-pipelines-daemon").stdout
        return f"{self.provisions()}\n{self.sent()}\n{units}\n{played}"


def bare(stack: ExitStack, installed: Installation, name: str, number: int, tree: Path, folder: Path, size: str = "4G") -> Machine:
    """A host as a hoster hands it over. The Python packages of these tests are where it would install the same ones."""
    host = stack.enter_context(joined(installed.world.host, number))
    files = folder / name
    environment(OWN, Path(FIRST), tree, files)
    # Behind a link, which can be removed as any file.
    (files / "srv").mkdir()
    (files / FIRST.removeprefix("/")).rename(files / "srv/python")
    (files / FIRST.removeprefix("/")).symlink_to("/srv/python")
    equip(files, name, f"{host.address} {name}\n127.0.0.1 localhost\n", installed.world.host.address, installed.folder)
    return stack.enter_context(machine(name, host, tree, files, {"/srv/python": OWN}, size))


def hosts_file(installed: Installation, addresses: Iterable[str], **variables: str) -> str:
    """A source of these hosts, whose addresses have a reputation, and are warmed up all the same."""
    lines = (installed.folder / "known_hosts").read_text(encoding="utf-8").splitlines()
    keys = {line.split()[0]: " ".join(line.split()[1:3]) for line in lines if line}
    key_file = f'key_file = "{HOME}/secrets/ssh"'
    hosts = "".join(f'  {{address = "{one}", {key_file}, host_key = "{keys.get(one, keys[CENTRE])}"}},\n' for one in addresses)
    own = {"centre_addresses": [installed.centre.host.address], **variables}
    return f'[[source]]\nname = "rack"\nkind = "inventory"\ncost_per_hour = 0.01\nwarm = true\ncurve = "normal"\nhosts = [\n{hosts}]\n[variables]\n' + "".join(
        f"{name} = {json.dumps(value)}\n" for name, value in own.items()
    )


def left_on(host: Machine) -> str:
    """What a host still has of a server."""
    places = "/opt/* /etc/mail-pipelines /etc/*/mail-pipelines* /var/*/mail-pipelines /run/mail-pipelines"
    commands = f"ls -d {places}; id mail-pipelines; systemctl list-units --all --plain --no-legend 'mail-pipelines-*'; which exim4; nft list tables"
    return host.run("sh", "-c", commands, check=False).stdout


def put(installed: Installation, path: str, text: str, mode: str = "0600") -> None:
    """A file at the centre, of its own user."""
    installed.centre.run("sh", "-c", f'cat >"{path}" && chown mail-pipelines: "{path}" && chmod {mode} "{path}"', text=text)


@pytest.fixture(scope="module")
def fleet(installed: Installation, tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """A centre that may order hosts, three of which stand in its rack, and a fleet in which nobody sends."""
    folder = tmp_path_factory.mktemp("r")
    with ExitStack() as stack:
        rack = {name: bare(stack, installed, name, number, tree, folder) for number, name in enumerate(("rack1", "rack2", "rack3"), start=21)}
        world = installed.world
        world.publish(
            f"{CENTRE}. 60 IN A {installed.centre.host.address}",
            f"{DATABASE}. 60 IN A {installed.database.host.address}",
            f"{PUBLIC}. 60 IN A {installed.centre.host.address}",
            f"{BOUNCES}. 60 IN A {installed.centre.host.address}",
            "gmail.com. 60 IN MX 10 mx.people.test.",
        )
        put(installed, "/usr/local/bin/publish-records", PUBLISH.format(address=world.host.address), "0755")
        put(installed, f"{HOME}/secrets/ssh", (installed.folder / "key").read_text(encoding="utf-8"))
        put(installed, f"{HOME}/hosts.toml", hosts_file(installed, [one.host.address for one in rack.values()]))
        config = installed.centre.run("cat", f"{HOME}/config.toml").stdout
        changed = config
        for name, value in {**SETTINGS, "provisioning.budget": 1000}.items():
            section, key = name.split(".")
            changed, count = re.subn(rf"(?ms)(^\[{section}\]$.*?)^# {key} = .*?$", rf"\1{key} = {json.dumps(value)}", changed, count=1)
            assert count, name
        put(installed, f"{HOME}/config.toml", changed)
        # Domains that there are already send by the shared record from now on.
        for (name,) in Fleet(installed, rack).sql("SELECT return_path_domain FROM sending_domains"):
            policy = {"name": name, "type": "TXT", "ttl": 60, "values": [f"v=spf1 include:{SETTINGS['dns.spf_include']} ~all"]}
            installed.centre.run("publish-records", text=json.dumps({"action": "publish", "records": [policy]}))
        installed.centre.run("systemctl", "restart", *(f"mail-pipelines-{unit}" for unit in ("daemon", "centre-worker", "web")))
        yield Fleet(installed, rack)


def test_a_campaign_that_nobody_could_send_in_time_is_sent_by_servers_that_were_made_meanwhile(fleet: Fleet) -> None:
    installed, world = fleet.installed, fleet.installed.world
    finish_by = dt.datetime.now(dt.UTC) + dt.timedelta(minutes=20)
    people = {f"person{number}@people.test" for number in range(RECIPIENTS)}
    put(installed, "/tmp/people.csv", "email\n" + "\n".join(sorted(people)), "0644")
    put(installed, "/tmp/visitors.yaml", SEGMENT, "0644")
    put(installed, "/tmp/fair.yaml", CAMPAIGN.format(finish_by=finish_by.isoformat()), "0644")
    others = [key for (key,) in fleet.sql("SELECT `key` FROM servers WHERE state = 'active'")]
    said = fleet.commands(*(f"server pause {key}" for key in others), "domain add fair.test", "server limits * --per-second 1")
    world.publish(*(line for line in said.splitlines() if " IN " in line))
    fleet.commands(
        "domain check fair.test",
        "contact import /tmp/people.csv --list fair",
        "segment refresh",
        "segment save /tmp/visitors.yaml",
        "campaign import /tmp/fair.yaml",
        "campaign start fair",
    )
    # From an empty fleet.
    wait_for(lambda: fleet.campaign("state") == "sending", seconds=300, what=fleet.log)
    assert fleet.sent() == {}
    fleet.plan()
    first = wait_for(lambda: fleet.servers("warming"), seconds=600, what=fleet.log)
    assert len(first) == 1

    # Its provider takes far less from it than was planned, and from nobody more than so much a day: now the deadline is in danger.
    fleet.commands(f"server limits * --server {min(first)} --per-second 0.02", "server limits * --per-second 10 --per-day 160")
    wait_for(lambda: fleet.sent()[min(first)], seconds=120, what=fleet.log)
    fleet.plan()
    wait_for(lambda: len(fleet.servers("warming")) == 3, seconds=600, what=fleet.log)
    wait_for(lambda: fleet.campaign("state") == "finished", seconds=300, what=fleet.log)
    assert fleet.campaign(f"finished_at <= '{finish_by:%Y-%m-%d %H:%M:%S}'") == "1"

    mails = [message for _, message in world.mail() if SUBJECT in message]
    reached = Counter(found[1].decode() for message in mails for found in re.finditer(rb"(?m)^To: .*?([a-z0-9]+@people\.test)", message))
    assert set(reached) == people
    assert set(reached.values()) == {1}
    assert set(fleet.sent()) == fleet.servers("warming")
    caps = fleet.sql("SELECT `key`, curve, step, per_day FROM warm_ups JOIN servers ON servers.id = server_id WHERE provider = '*' ORDER BY `key`")
    assert caps == [[key, "normal", "0", "500"] for key in sorted(fleet.servers("warming"))]


def test_they_retire_and_their_hosts_are_bare_again(fleet: Fleet) -> None:
    made = fleet.servers("warming")
    fleet.commands(*(f"server remove {name} --now" for name in made))
    wait_for(lambda: fleet.servers("retired") >= made, seconds=600, what=fleet.log)
    assert {fleet.value(f"SELECT state FROM servers WHERE `key` = '{name}'") for name in made} == {"retired"}
    for one in fleet.rack.values():
        assert left_on(one) == ""
    assert fleet.value("SELECT COUNT(*) FROM mysql.user WHERE user REGEXP '^mail-[0-9]'") == fleet.value(
        "SELECT COUNT(*) FROM servers WHERE account IS NOT NULL"
    )
    kept = fleet.installed.centre.run("ls", f"{HOME}/secrets/servers", f"{HOME}/secrets/hosts").stdout
    assert not any(f"{name}." in kept or f"{name}\n" in kept for name in made)


def test_each_failure_ends_with_its_reason_and_nothing_is_left(fleet: Fleet, tree: Path, tmp_path: Path) -> None:
    """All at once, each on a host of its own. Those of the login have tests against a real SSH server (`tests/provisioning/test_playing.py`)."""
    installed, centre = fleet.installed, fleet.installed.centre
    # It would take them on, too.
    centre.run("systemctl", "stop", "mail-pipelines-daemon")
    with ExitStack() as stack:
        on = {
            name: bare(stack, installed, name, number, tree, tmp_path, size)
            for number, (name, size) in enumerate({"full": "64M", "lacking": "4G", "killed": "4G", "taken": "4G", "listed": "4G"}.items(), start=31)
        }
        on["lacking"].run("sh", "-c", "rm /var/cache/apt/archives/nftables_*")
        # Of another program of this host, where Exim is to listen.
        on["taken"].run("systemd-run", "--unit", "other", "python3", "-m", "http.server", "--bind", "127.0.0.1", "2525")
        zone = "zen.spamhaus.org. 60 IN A"
        reverse = ".".join(reversed(on["listed"].host.address.split(".")))
        installed.world.publish(f"2.0.0.127.{zone} 127.0.0.2", f"{reverse}.{zone} 127.0.0.2")
        silent = stack.enter_context(joined(installed.world.host, 30)).address
        addresses = {name: one.host.address for name, one in on.items()} | {"silent": silent}
        put(installed, f"{HOME}/hosts.toml", hosts_file(installed, addresses.values(), health_seconds="5"))
        before = set(fleet.provisions())
        with ThreadPoolExecutor(1) as thread:
            making = thread.submit(centre.run, "sh", "-c", AS_UNIT, "sh", MAKE)
            wait_for(lambda: making.done() or on["killed"].run("pgrep", "dpkg", check=False).stdout, seconds=180, what=fleet.log)
            killed = centre.run("sh", "-c", PLAYER, "sh", on["killed"].host.address).stdout.split()
            assert killed
            centre.run("kill", "-KILL", *killed)
            making.result()
        rows = fleet.sql("SELECT `key`, host_id, CONCAT(state, step), reason, ended_at IS NOT NULL FROM provisions ORDER BY id")
        ended = {identity.removesuffix(":22"): row for key, identity, *row in rows if key not in before}
        assert set(ended) == set(addresses.values())
        # No step is left, and with its end it costs nothing any more.
        assert [(state, over) for state, _, over in ended.values()] == [("failed", "1")] * len(ended)
        reasons = {name: ended[address][1] for name, address in addresses.items()}
        for name, words in REASONS.items():
            assert re.search(words, reasons[name]), reasons
        assert centre.run("pgrep", "--list-full", "-f", "ansible|player.py|ssh ", check=False).stdout == ""
        for name, one in on.items():
            assert (name, left_on(one)) == (name, "")
