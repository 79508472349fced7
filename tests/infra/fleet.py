"""A centre that makes its servers itself, and the bare hosts that it may take: what its tests ask of it, and what they change in it.

What belongs here: an operator's settings, a hoster's hosts, looking at the central database and at the mail. What does not: the promises
(`test_shortage`, `test_unfit_hosts`).
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pymysql

from tests.infra.installing import BOUNCES, CENTRE, DATABASE, PUBLIC, ROOT, Installation, equip
from tests.infra.machine import Machine, environment, machine
from tests.parts.hosts import joined

HOME = "/var/lib/mail-pipelines"
VENV = "/opt/mail-pipelines-1/.venv"
SUBJECT = b"\r\nSubject: The fair begins\r\n"
# What an operator writes into config.toml, so that servers make themselves; and shorter times than one would have.
SETTINGS = {
    "dns.publisher": "command",
    "dns.command": ["/usr/local/bin/publish-records"],
    "dns.spf_include": "spf.example.com",
    "provisioning.mode": "auto",
    "provisioning.domain": "example.com",
    "provisioning.budget": 1000,
    "provisioning.most": 3,
    "provisioning.cool_down_minutes": 0,
    "provisioning.retry_seconds": 3,
    "operation.sensor_seconds": 5,
}
# The command of a DNS hoster.
PUBLISH = """#!/usr/bin/python3
import socket, sys
with socket.create_connection(("{address}", 8053), 10) as hoster:
    hoster.sendall(sys.stdin.buffer.read())
    hoster.shutdown(socket.SHUT_WR)
    sys.exit(0 if hoster.makefile().read() == "done\\n" else 1)
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
    database: pymysql.connections.Connection[Any]

    def sql(self, query: str, *values: object) -> list[tuple[Any, ...]]:
        """What the central database has; cheaper to ask over and over than a command is."""
        with self.database.cursor() as cursor:
            cursor.execute(query, values)
            return list(cursor.fetchall())

    def value(self, query: str, *values: object) -> Any:
        rows = self.sql(query, *values)
        return rows[0][0] if rows else None

    def commands(self, *lines: str) -> str:
        return self.installed.commands(*lines)

    def campaign(self, column: str) -> Any:
        return self.value(f"SELECT {column} FROM campaigns WHERE `key` = 'fair'")

    def servers(self, *states: str) -> set[str]:
        """Servers made here that are in one of these states, with nothing to be done."""
        return {key for (key,) in self.sql("SELECT `key` FROM provisions WHERE state IN %s AND step = ''", states)}

    def plan(self) -> None:
        """Ask for a plan now, instead of within five minutes."""
        said = self.installed.centre.run("python3", "-", "plan_capacity", text=LAUNCH).stdout
        assert json.loads(said)["data"]["launchRun"]["__typename"] == "LaunchRunSuccess", said

    def sent(self) -> Counter[str]:
        """Messages at the sink by the server that greeted there."""
        return Counter(_greeted(how) for how, message in self.installed.world.mail() if SUBJECT in message)

    def first_sent_at(self) -> dict[str, float]:
        """When the first of these came (s since 1970), by server."""
        first: dict[str, float] = {}
        for path in self.installed.world.folder.glob("*.mail"):
            how, _, message = path.read_bytes().partition(b"\n")
            if SUBJECT in message:
                name, at = _greeted(how.decode()), path.stat().st_mtime
                first[name] = min(at, first.get(name, at))
        return first

    def log(self) -> str:
        """What a test that waits in vain shows."""
        provisions = self.sql("SELECT `key`, host_id, state, step, requested_at, state_at, reason FROM provisions ORDER BY id")
        played = self.installed.centre.run("sh", "-c", f"tail -n 30 {HOME}/log/provisioning/*", check=False).stdout
        units = self.installed.centre.run("journalctl", "--no-pager", "-n", "60", "-u", "mail-pipelines-centre-worker", "-u", "mail-pipelines-daemon").stdout
        return f"{provisions}\n{self.sent()}\n{units}\n{played}"


def _greeted(how: str) -> str:
    return how.split()[2].split(".")[0]


def put(installed: Installation, path: str, text: str, mode: str = "0600") -> None:
    """A file at the centre, of its own user."""
    installed.centre.run("sh", "-c", 'cat >"$1" && chown mail-pipelines: "$1" && chmod "$2" "$1"', "sh", path, mode, text=text)


def bare(stack: ExitStack, installed: Installation, name: str, number: int, tree: Path, files: Path, *, size: str = "4G", python: bool = False) -> Machine:
    """A host as a hoster hands it over; with `python`, the Python packages of these tests are where it would install the same ones."""
    host = stack.enter_context(joined(installed.world.host, number))
    shown = {}
    if python:
        own, place = (ROOT / ".venv").resolve(), files / VENV.removeprefix("/")
        environment(own, Path(VENV), tree, files)
        # By a link, which goes with all else of a server.
        (files / "srv").mkdir()
        place.rename(files / "srv/python")
        place.symlink_to("/srv/python")
        shown["/srv/python"] = own
    equip(files, name, f"{host.address} {name}\n127.0.0.1 localhost\n", installed.world.host.address, installed.folder)
    return stack.enter_context(machine(name, host, tree, files, shown, size))


def hosts_file(installed: Installation, addresses: Iterable[str]) -> str:
    """A source of these hosts, whose addresses are warmed up by the shortest curve."""
    lines = (installed.folder / "known_hosts").read_text(encoding="utf-8").splitlines()
    keys = {line.split()[0]: " ".join(line.split()[1:3]) for line in lines if line}
    hosts = "".join(f'  {{address = "{one}", key_file = "{HOME}/secrets/ssh", host_key = "{keys[one]}"}},\n' for one in addresses)
    centre = json.dumps([installed.centre.host.address])
    source = '[[source]]\nname = "rack"\nkind = "inventory"\ncost_per_hour = 0.01\ncurve = "fast"\n'
    return f"{source}hosts = [\n{hosts}]\n[variables]\ncentre_addresses = {centre}\n"


def left_on(host: Machine) -> str:
    """What a host still has of a server."""
    places = "/opt/* /etc/mail-pipelines /etc/*/mail-pipelines* /var/*/mail-pipelines /run/mail-pipelines"
    commands = f"ls -d {places}; id mail-pipelines; systemctl list-units --all --plain --no-legend 'mail-pipelines-*'; which exim4; nft list tables"
    return host.run("sh", "-c", commands, check=False).stdout


@contextmanager
def making_itself(installed: Installation, tree: Path, folder: Path) -> Iterator[Fleet]:
    """The centre of this installation may order hosts, three of which stand in its rack; what the first plays have made sends nothing meanwhile."""
    world, centre = installed.world, installed.centre
    with ExitStack() as stack:
        names = ("rack1", "rack2", "rack3")
        rack = {name: bare(stack, installed, name, number, tree, folder / name, python=True) for number, name in enumerate(names, start=21)}
        # As root of that host, by its socket.
        socket = str(Path("/proc", str(installed.database.pid), "root", "run/mysqld/mysqld.sock"))
        fleet = Fleet(installed, rack, stack.enter_context(pymysql.connect(unix_socket=socket, user="root", database="mail", autocommit=True)))
        addresses = {DATABASE: installed.database, CENTRE: centre, PUBLIC: centre, BOUNCES: centre}
        world.publish(*(f"{name}. 60 IN A {on.host.address}" for name, on in addresses.items()), "gmail.com. 60 IN MX 10 mx.people.test.")
        put(installed, "/usr/local/bin/publish-records", PUBLISH.format(address=world.host.address), "0755")
        put(installed, f"{HOME}/secrets/ssh", (installed.folder / "key").read_text(encoding="utf-8"))
        put(installed, f"{HOME}/hosts.toml", hosts_file(installed, [one.host.address for one in rack.values()]))
        put(installed, f"{HOME}/config.toml", _set(centre.run("cat", f"{HOME}/config.toml").stdout))
        # Domains that there are already send by the shared record from now on.
        for (name,) in fleet.sql("SELECT return_path_domain FROM sending_domains"):
            policy = {"name": name, "type": "TXT", "ttl": 60, "values": [f"v=spf1 include:{SETTINGS['dns.spf_include']} ~all"]}
            centre.run("publish-records", text=json.dumps({"action": "publish", "records": [policy]}))
        # Nobody looks at these, and they take from the processor.
        idle = {"mail-pipelines-viewer.service", "mail-pipelines-metrics.service"}
        centre.run("systemctl", "stop", *idle)
        units = centre.run("sh", "-c", "cd /etc/systemd/system && ls mail-pipelines-*.service").stdout.split()
        centre.run("systemctl", "restart", *(unit for unit in units if unit not in idle))
        fleet.commands(*(f"server pause {key}" for (key,) in fleet.sql("SELECT `key` FROM servers WHERE state = 'active'")))
        yield fleet


def _set(config: str) -> str:
    """The operator's settings in place of the defaults, which are there as comments."""
    for name, value in SETTINGS.items():
        section, key = name.split(".")
        config, count = re.subn(
            rf"(?ms)(^\[{section}\]$.*?)^# {key} = .*?$", lambda found, key=key, value=value: f"{found[1]}{key} = {json.dumps(value)}", config, count=1
        )
        assert count, name
    return config
