"""An installation by the playbooks, run by ansible-runner against machines: a database host, a centre and a dispatch server, and the world around them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ansible_runner

from tests.infra.machine import Machine, machine, swept
from tests.parts.dns import Zone
from tests.parts.hosts import Host, hosts
from tests.parts.processes import stop

ROOT = Path(__file__).resolve().parent.parent.parent
DATABASE, CENTRE, SERVER = "db.example.com", "centre.example.com", "mx1.example.com"
PUBLIC, BOUNCES = "mail.example.com", "mx.example.com"
# At the centre.
SECRETS = "/var/lib/mail-pipelines/secrets"
# As each unit has it: the project's own Python, user, folder and environment.
AS_UNIT = (
    "cd /opt/mail-pipelines; set -a; . /etc/mail-pipelines/environment; "
    'exec setpriv --reuid=mail-pipelines --regid=mail-pipelines --init-groups .venv/bin/python -c "$@"'
)
# One process for several commands: most of the time of each is its start.
COMMANDS = "import json, sys\nfrom mail_pipelines.cli import app\nfor words in json.load(sys.stdin):\n    app(words, standalone_mode=False)"


@dataclass
class Play:
    """What a run of a playbook did: how it ended, and the tasks that changed or failed, of each host."""

    status: str = ""
    changed: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    output: str = ""


@dataclass
class World:
    """Who is not of the installation: its DNS and its mail. `zone` says what is published."""

    host: Host
    folder: Path
    process: subprocess.Popen[str]
    zone: Zone = field(default_factory=Zone)

    def publish(self, *lines: str) -> None:
        self.zone.publish(*lines)
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        for line in lines:
            print(line, file=self.process.stdin, flush=True)
            assert self.process.stdout.readline() == f"{line}\n"

    def mail(self) -> list[tuple[str, bytes]]:
        """Of each message that has come, how it came, and what it is."""
        found = [path.read_bytes().partition(b"\n") for path in sorted(self.folder.glob("*.mail"))]
        return [(how.decode(), message) for how, _, message in found]


@dataclass(frozen=True)
class Installation:
    database: Machine
    centre: Machine
    server: Machine
    world: World
    folder: Path

    def play(self, playbook: str, *options: str, checkout: Path = ROOT, **variables: Any) -> Play:
        """Run one by SSH, as an operator does from another machine; `variables` are those of all hosts."""
        found = Play()

        def on_event(event: dict[str, Any]) -> bool:
            data = event.get("event_data", {})
            where = f"{data.get('host')}: {data.get('task')}"
            if event["event"] == "runner_on_ok" and data["res"].get("changed"):
                found.changed.append(where)
            if event["event"] in ("runner_on_failed", "runner_on_unreachable") and not data.get("ignore_errors"):
                found.failed.append(f"{where}: {data['res']}")
            return True

        # One of its own for each, since there may be several at a time.
        work = Path(tempfile.mkdtemp(dir=self.folder))
        (work / "env").mkdir()
        (work / "env/settings").write_text('{"pexpect_timeout": 1}', encoding="utf-8")
        run = ansible_runner.run(
            private_data_dir=str(work),
            project_dir=str(checkout / "infra/ansible"),
            playbook=playbook,
            cmdline=" ".join(options) or None,
            inventory=self._inventory(variables),
            quiet=True,
            event_handler=on_event,
            cancel_callback=lambda: False,
            suppress_env_files=True,
            envvars={
                "ANSIBLE_CONFIG": str(checkout / "infra/ansible/ansible.cfg"),
                "ANSIBLE_HOME": str(work / "home"),
                "ANSIBLE_PRIVATE_KEY_FILE": str(self.folder / "key"),
                "ANSIBLE_SSH_EXECUTABLE": str(self.folder / "ssh"),
                "ANSIBLE_SSH_ARGS": f"-o ControlMaster=auto -o ControlPersist=10s -o UserKnownHostsFile={self.folder}/known_hosts",
                "ANSIBLE_SSH_CONTROL_PATH_DIR": str(self.folder / "c"),
                "ANSIBLE_SSH_TRANSFER_METHOD": "piped",
                "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            },
        )
        found.status = run.status
        found.output = (Path(run.config.artifact_dir) / "stdout").read_text(encoding="utf-8")
        shutil.rmtree(work)
        return found

    def commands(self, *lines: str) -> str:
        """What `mail-pipelines` commands at the centre say; none of their words has a space."""
        return self.centre.run("sh", "-c", AS_UNIT, "sh", COMMANDS, text=json.dumps([line.split() for line in lines])).stdout

    def _inventory(self, variables: Mapping[str, Any]) -> dict[str, Any]:
        own = {"servers": [{"name": "mx1", "address": self.server.host.address, "hostname": SERVER}], "metrics_address": self.server.host.address}
        groups = {"database": (self.database, {}), "centre": (self.centre, {}), "servers": (self.server, own)}
        shared = {"public_name": PUBLIC, "bounce_host": BOUNCES, "ansible_user": "root", "centre_addresses": [self.centre.host.address]}
        return {
            "all": {
                "vars": shared | dict(variables),
                "children": {group: {"hosts": {on.name: {"ansible_host": on.host.address, **more}}} for group, (on, more) in groups.items()},
            }
        }


@contextmanager
def installation(folder: Path, tree: Path, files: Mapping[str, Path], shown: Mapping[str, Mapping[str, Path]]) -> Iterator[Installation]:
    """Three bare hosts, which reach each other, the world and nobody else. `files` and `shown` are what single ones have beside the tree."""
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / "key")], check=True)
    with ExitStack() as stack:
        stack.enter_context(swept())
        outside, *inside = stack.enter_context(hosts(4))
        stack.callback(_hang_up, outside)
        world = stack.enter_context(_world(outside, folder / "world"))
        places = dict(zip((DATABASE, CENTRE, SERVER), inside, strict=True))
        names = "".join(f"{host.address} {name}\n" for name, host in places.items())
        names += f"{places[CENTRE].address} {PUBLIC} {BOUNCES}\n127.0.0.1 localhost\n"
        # All can be reached from the network of each, and this machine has no part in that.
        (folder / "ssh").write_text(f'#!/bin/sh\nexec {" ".join(outside.run)} ssh "$@"\n', encoding="utf-8")
        (folder / "ssh").chmod(0o755)
        (folder / "known_hosts").touch()
        machines = []
        for name, host in places.items():
            own = files.get(name, folder / name)
            equip(own, name, names, outside.address, folder)
            machines.append(stack.enter_context(machine(name, host, tree, own, shown.get(name, {}))))
        yield Installation(*machines, world, folder)


def _hang_up(host: Host) -> None:
    """End Ansible's connections, which are kept for the next play."""
    subprocess.run(["sh", "-c", 'ip netns pids "$1" | xargs --no-run-if-empty kill', "sh", host.namespace], check=True)


@contextmanager
def _world(host: Host, folder: Path) -> Iterator[World]:
    folder.mkdir()
    words = [*host.run, sys.executable, "-m", "tests.infra.world", host.address, str(folder)]
    process = subprocess.Popen(words, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        world = World(host, folder, process)
        world.publish("people.test. 60 IN MX 10 mx.people.test.", f"mx.people.test. 60 IN A {host.address}")
        yield world
    finally:
        stop(process)


def with_any_of(machine: Machine, secrets: set[str], *conditions: str) -> list[str]:
    """Files of what the project has there, and of what others leave lying about, in which one of these is."""
    machine.run("sh", "-c", "umask 077 && cat >/dev/shm/secrets", text="\n".join(secrets))
    folders = ["/etc", "/run", "/tmp", "/var/lib/mail-pipelines", "/var/log", "/root"]
    look = ["-type", "f", *conditions, "-exec", "grep", "--files-with-matches", "--fixed-strings", "--no-messages", "--file", "/dev/shm/secrets", "{}", "+"]
    found = machine.run("find", *folders, "-xdev", *look, check=False).stdout.split()
    machine.run("rm", "/dev/shm/secrets")
    return sorted(found)


def equip(files: Path, name: str, names: str, resolver: str, folder: Path) -> None:
    """What a provider puts on a new host: its name, its key, and the key of whoever may log in."""
    (files / "etc/ssh").mkdir(parents=True)
    (files / "etc/hostname").write_text(f"{name}\n", encoding="utf-8")
    (files / "etc/hosts").write_text(names, encoding="utf-8")
    (files / "etc/resolv.conf").write_text(f"nameserver {resolver}\n", encoding="utf-8")
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(files / "etc/ssh/ssh_host_ed25519_key")], check=True)
    address = next(line.split()[0] for line in names.splitlines() if name in line.split())
    with (folder / "known_hosts").open("a", encoding="utf-8") as known:
        for called in (name, address):
            known.write(f"{called} {(files / 'etc/ssh/ssh_host_ed25519_key.pub').read_text(encoding='utf-8')}")
    login = files / "root/.ssh"
    login.mkdir(parents=True)
    login.chmod(0o700)
    login.parent.chmod(0o700)
    shutil.copy(folder / "key.pub", login / "authorized_keys")
    (files / "etc/systemd/system").mkdir(parents=True)
    (files / "etc/systemd/system/console-getty.service").symlink_to("/dev/null")
