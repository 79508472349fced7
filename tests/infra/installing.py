"""The playbook for a centre, run by ansible-runner against two machines: a database host and a centre."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ansible_runner

from tests.infra.machine import Machine, machine
from tests.parts.hosts import two_hosts

ROOT = Path(__file__).resolve().parent.parent.parent
DATABASE, CENTRE = "db.example.com", "centre.example.com"
PUBLIC, BOUNCES = "mail.example.com", "mx.example.com"


@dataclass
class Play:
    """What a run of the playbook did: how it ended, and the tasks that changed or failed, of each host."""

    status: str = ""
    changed: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    output: str = ""


@dataclass(frozen=True)
class Installation:
    database: Machine
    centre: Machine
    folder: Path

    def play(self, **variables: Any) -> Play:
        """Run centre.yml by SSH, as an operator does from a third machine; `variables` take the place of the roles' own."""
        found = Play()

        def on_event(event: dict[str, Any]) -> bool:
            data = event["event_data"]
            where = f"{data.get('host')}: {data.get('task')}"
            if event["event"] == "runner_on_ok" and data["res"].get("changed"):
                found.changed.append(where)
            if event["event"] in ("runner_on_failed", "runner_on_unreachable") and not data.get("ignore_errors"):
                found.failed.append(f"{where}: {data['res']}")
            return True

        work = self.folder / "play"
        (work / "env").mkdir(parents=True)
        (work / "env/settings").write_text('{"pexpect_timeout": 1}', encoding="utf-8")
        hosts = {
            group: {"hosts": {machine.name: {"ansible_host": machine.host.address}}}
            for group, machine in (("database", self.database), ("centre", self.centre))
        }
        run = ansible_runner.run(
            private_data_dir=str(work),
            project_dir=str(ROOT / "infra/ansible"),
            playbook="centre.yml",
            inventory={"all": {"vars": {"public_name": PUBLIC, "bounce_host": BOUNCES, "ansible_user": "root", **variables}, "children": hosts}},
            quiet=True,
            event_handler=on_event,
            cancel_callback=lambda: False,
            suppress_env_files=True,
            envvars={
                "ANSIBLE_CONFIG": str(ROOT / "infra/ansible/ansible.cfg"),
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


@contextmanager
def two_machines(folder: Path, tree: Path, files: Path, shown: Mapping[Path, str]) -> Iterator[Installation]:
    """A database host and a centre, bare, which reach each other and nobody else. `files` and `shown` are the centre's."""
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / "key")], check=True)
    with ExitStack() as stack:
        hosts = dict(zip((DATABASE, CENTRE), stack.enter_context(two_hosts()), strict=True))
        names = "".join(f"{host.address} {name}\n" for name, host in hosts.items())
        names += f"{hosts[CENTRE].address} {PUBLIC} {BOUNCES}\n127.0.0.1 localhost\n"
        # Both can be reached from the network of either, and this machine has no part in that.
        (folder / "ssh").write_text(f'#!/bin/sh\nexec {" ".join(hosts[CENTRE].run)} ssh "$@"\n', encoding="utf-8")
        (folder / "ssh").chmod(0o755)
        (folder / "known_hosts").touch()
        machines = []
        for name, host in hosts.items():
            own = files if name == CENTRE else folder / name
            _equip(own, name, names, folder)
            machines.append(stack.enter_context(machine(name, host, tree, own, shown if name == CENTRE else {})))
        yield Installation(*machines, folder)


def _equip(files: Path, name: str, names: str, folder: Path) -> None:
    """What a provider puts on a new host: its name, its key, and the key of whoever may log in."""
    (files / "etc/ssh").mkdir(parents=True)
    (files / "etc/hostname").write_text(f"{name}\n", encoding="utf-8")
    (files / "etc/hosts").write_text(names, encoding="utf-8")
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
