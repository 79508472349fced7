"""A hoster with real hosts, and what installs and verifies them."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from mail_pipelines import config
from mail_pipelines.database.engine import create_engine, reading, transact
from mail_pipelines.dispatch import accounts, servers
from mail_pipelines.domains.records import Record
from mail_pipelines.provisioning import making, over_ssh, store
from mail_pipelines.provisioning.finding import Finding
from mail_pipelines.provisioning.interfaces import Host, HostSource, Parts, Player, Say, Target, Verify
from mail_pipelines.provisioning.playing import Ansible
from mail_pipelines.provisioning.sources.command import Command
from mail_pipelines.provisioning.store import Provision
from tests.parts.processes import wait_for
from tests.provisioning import hoster

PLAYBOOK = """
- hosts: servers
  gather_facts: false
  tasks:
    - name: Folder
      ansible.builtin.file: {path: "{{ place }}/{{ servers[0].name }}", state: directory, mode: "0700"}
    - name: Token key
      ansible.builtin.copy:
        src: "{{ worker_secrets }}/{{ servers[0].name }}.token_key"
        dest: "{{ place }}/{{ servers[0].name }}/token_key"
        mode: "0600"
      no_log: true
    - name: Careless
      ansible.builtin.debug: {msg: "{{ lookup('file', worker_secrets ~ '/' ~ servers[0].name ~ '.token_key') }}"}
    - name: Slow
      ansible.builtin.shell: 'touch "{{ place }}/playing"; while [ -e "{{ place }}/slow" ]; do sleep 0.05; done'
    - name: Package
      ansible.builtin.command: test ! -e {{ place }}/no-package
    - name: Ready
      ansible.builtin.copy: {content: "{{ servers[0].hostname }} {{ servers[0].address }}", dest: "{{ place }}/{{ servers[0].name }}/ready", mode: "0600"}
"""
# Hosts of a busy machine may take long to answer.
ANSIBLE_CFG = "[defaults]\ninterpreter_python = /usr/bin/python3\ntimeout = 120\n[ssh_connection]\npipelining = True\n"
REMOVAL = """
- hosts: servers
  gather_facts: false
  tasks:
    - name: Everything
      ansible.builtin.file: {path: "{{ place }}/{{ servers[0].name }}", state: absent}
"""


@dataclass(frozen=True)
class Hoster:
    """A hoster's account: `folder` is its, `place` what the hosts of all hosters have in common: they are this machine."""

    name: str
    folder: Path
    key_file: Path
    cost_per_hour: float = 0.0

    def source(self, **options: Any) -> Command:
        words = [sys.executable, hoster.__file__, str(self.folder)]
        given = {"user": "root", "key_file": str(self.key_file), "cost_per_hour": self.cost_per_hour, "seconds": 120} | options
        return Command(self.name, words, **given)

    @property
    def created(self) -> list[str]:
        """Names of all hosts that were ever made."""
        return (self.folder / "created").read_text().split() if (self.folder / "created").exists() else []

    @property
    def hosts(self) -> list[str]:
        """Names of those there are."""
        return sorted(path.name for path in (self.folder / "hosts").glob("*"))

    def trouble(self, text: str) -> None:
        (self.folder / "trouble.json").write_text(text)

    def no_trouble(self) -> None:
        (self.folder / "trouble.json").unlink(missing_ok=True)

    def shut(self) -> None:
        for host in (self.folder / "hosts").glob("*"):
            hoster.delete(host)


@pytest.fixture(scope="session")
def key_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("ssh") / "key"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(path)], check=True)
    return path


@pytest.fixture
def hosters(tmp_path: Path, key_file: Path) -> Iterator[tuple[Hoster, Hoster]]:
    """Two of them."""
    made = tuple(Hoster(name, tmp_path / name, key_file) for name in ("north", "south"))
    for one in made:
        one.folder.mkdir()
    yield made
    for one in made:
        one.shut()


@dataclass(frozen=True)
class Ssh:
    """Installs nothing, but by SSH: as much of a player as the steps around it need."""

    place: Path

    def play(self, target: Target, say: Say) -> None:
        self._run(target, f"mkdir -p {self.place}/{target.name} && touch {self.place}/{target.name}/ready")

    def remove(self, target: Target, say: Say) -> None:
        self._run(target, f"rm -rf {self.place}/{target.name}")

    def _run(self, target: Target, words: str) -> None:
        over_ssh.run(target.host, ["sh", "-c", words], seconds=120).check_returncode()


@dataclass
class Keys:
    """Accounts in a database that has none: only what is secret of a server."""

    engine: sa.Engine
    folder: Path
    # All that were ever given.
    given: list[str] = field(default_factory=list)

    def give(self, name: str, kind: str) -> Sequence[Path]:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.given.append(secrets.token_hex(32))
        (self.folder / f"{name}.token_key").write_text(self.given[-1] + "\n")
        return [self.folder / f"{name}.token_key"]

    def take(self, name: str) -> None:
        accounts.revoke(self.engine, name, hoster_now())

    def clear(self, name: str) -> None:
        (self.folder / f"{name}.token_key").unlink(missing_ok=True)


def hoster_now() -> Any:
    import datetime as dt

    return dt.datetime.now(dt.UTC)


@dataclass
class Zone:
    """A DNS: a file of lines. What is published is seen at once if `quick`, else when a test says so."""

    file: Path
    quick: bool = True

    @property
    def lines(self) -> set[str]:
        return set(self.file.read_text().splitlines()) if self.file.exists() else set()

    def write(self, lines: set[str]) -> None:
        self.file.write_text("".join(f"{line}\n" for line in sorted(lines)))

    def publish(self, records: Sequence[Record]) -> None:
        if self.quick:
            self.write(self.lines | {record.zone_line() for record in records})

    def withdraw(self, records: Sequence[Record]) -> None:
        self.write(self.lines - {record.zone_line() for record in records})

    def missing(self, records: Sequence[Record]) -> Sequence[Record]:
        return [record for record in records if record.zone_line() not in self.lines]


@dataclass
class Verifier:
    """Looks whether the host is installed; tests give findings of their own."""

    place: Path
    findings: Sequence[Finding] = ()

    def __call__(self, target: Target) -> Sequence[Finding]:
        ready = (self.place / target.name / "ready").exists()
        return [Finding("host", ready, "is installed" if ready else "is not installed"), *self.findings]


@dataclass
class World:
    """All parts, and what happened. `place` is a folder that every host of the tests has."""

    parts: Parts
    hosters: tuple[Hoster, Hoster]
    place: Path
    keys: Keys
    zone: Zone
    verifier: Verifier
    said: list[str] = field(default_factory=list)

    @property
    def engine(self) -> sa.Engine:
        return self.parts.engine

    @property
    def settings(self) -> config.Settings:
        return self.parts.settings

    def set(self, **values: Any) -> None:
        """Change settings of provisioning."""
        changed = self.settings.provisioning.model_copy(update=values)
        self.parts = replace(self.parts, settings=self.settings.model_copy(update={"provisioning": changed}))

    def use(self, *sources: HostSource) -> None:
        self.parts = replace(self.parts, sources=sources)

    def players(self, **players: Player) -> None:
        self.parts = replace(self.parts, players=players)

    def verify(self, **verify: Verify) -> None:
        self.parts = replace(self.parts, verify=verify)

    def ansible(self) -> None:
        """Hosts are installed by Ansible's own playbook of the tests."""
        project = self.place / "project"
        project.mkdir(exist_ok=True)
        (project / "server.yml").write_text(PLAYBOOK)
        (project / "remove.yml").write_text(REMOVAL)
        (project / "ansible.cfg").write_text(ANSIBLE_CFG)
        self.players(exim=Ansible(self.settings, project, {"place": str(self.place)}))

    def request(self, why: str = "for a test") -> str:
        return transact(self.engine, lambda connection: store.request(connection, self.settings.provisioning, why)).key

    def advance(self, key: str) -> Provision:
        return making.advance(self.parts, key, self.said.append)

    def killed_at(self, key: str, database_url: str, reached: Path, what: str) -> None:
        """Have a process of its own take a server on, and kill it once the file that it makes on the way is there; `what` is then true."""
        pid = os.fork()
        if pid == 0:
            try:
                making.advance(replace(self.parts, engine=create_engine(database_url)), key, lambda _: None)
            finally:
                os._exit(1)
        wait_for(reached.exists, what=what)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)

    def to_the_end(self, key: str) -> Provision:
        """Until it is in service, waits or has ended, with all attempts."""
        while True:
            try:
                return self.advance(key)
            except making.TryAgain:
                continue

    def provision(self, key: str) -> Provision:
        with reading(self.engine) as connection:
            return store.find(connection, key)

    def all(self) -> Mapping[str, Provision]:
        with reading(self.engine) as connection:
            return {one.key: one for one in store.all_provisions(connection, since=one_of_old())}

    def server_state(self, key: str) -> str | None:
        with reading(self.engine) as connection:
            return next((server.state for server in servers.all_servers(connection) if server.key == key), None)

    def host(self, key: str) -> Host:
        found = self.provision(key).host
        assert found is not None
        return found

    def nothing_is_left(self, key: str) -> None:
        """Of a server that is gone: no host, no secret, no record, no account."""
        assert all(key not in one.hosts for one in self.hosters)
        assert not (self.keys.folder / f"{key}.token_key").exists()
        assert not (self.settings.home / "secrets" / "hosts" / key).exists()
        assert not any(f"{key}." in line for line in self.zone.lines)
        assert self.server_state(key) in (None, "retired")
        assert self.provision(key).ended_at is not None


def one_of_old() -> Any:
    import datetime as dt

    return dt.datetime.fromtimestamp(0, dt.UTC)


@pytest.fixture
def world(engine: sa.Engine, tmp_path: Path, hosters: tuple[Hoster, Hoster]) -> Iterator[World]:
    (tmp_path / "home" / "secrets").mkdir(parents=True)
    settings = config.load()
    given = {"domain": "example.com", "retry_seconds": 0, "attempts": 2, "minimum_hours": 0}
    sending = settings.sending.model_copy(update={"allow_unverified": False})
    settings = settings.model_copy(update={"provisioning": settings.provisioning.model_copy(update=given), "sending": sending})
    place = tmp_path / "place"
    place.mkdir()
    keys, zone, verifier = Keys(engine, settings.home / "secrets" / "servers"), Zone(tmp_path / "zone"), Verifier(place)
    sources = [one.source() for one in hosters]
    parts = Parts(engine, settings, sources, {"exim": Ssh(place)}, keys, zone, {"exim": verifier})
    yield World(parts, hosters, place, keys, zone, verifier)
    shutil.rmtree(place, ignore_errors=True)
