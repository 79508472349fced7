"""Installing a host by Ansible: what happens is told task by task, what is kept has no secret in it, how it ended decides by Ansible's
statistics (never by its status code, which is the same for an error in a file and a host that does not answer).

What belongs here: what the playbook gets, and what becomes of its events. What does not: ansible-runner (`player`), and the roles (`infra/ansible`).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import sqlalchemy as sa

from mail_pipelines.config import Settings
from mail_pipelines.provisioning import alone, credentials, over_ssh
from mail_pipelines.provisioning.interfaces import CannotBeMade, ProvisioningError, Say, Target
from mail_pipelines.provisioning.secret_values import Secrets

INSTALL, REMOVE = "server.yml", "remove.yml"
_LOOPBACK = ("localhost", "127.0.0.1", "::1")
_END_SECONDS = 30
_LOGIN_SECONDS = 60


class PlayFailed(ProvisioningError):
    """The host is not installed; the message names the task, or why there was none."""


@dataclass
class Played:
    """`failed`: task and message of the host; `broken`: nothing ran, or it was stopped."""

    status: str = "failed"
    broken: bool = True
    changed: int = 0
    unreachable: bool = False
    failed: list[tuple[str, str]] = field(default_factory=list)
    said: str = ""


def inventory(target: Target, settings: Settings, own: Mapping[str, Any]) -> dict[str, Any]:
    """What the playbook knows, as the head of `infra/ansible/server.yml` has it; `own` variables of the operator come before ours. Nothing of it is secret.

    What is not known here is left to the defaults of the roles.
    """
    host = target.host
    login = {
        "ansible_host": host.address,
        "ansible_port": host.port,
        "ansible_user": host.user,
        "ansible_ssh_private_key_file": host.key_file,
    }
    servers = [{"name": target.name, "port": target.port, "address": host.address, "hostname": target.hostname}]
    broker = urlsplit(settings.broker.url or "").hostname
    authority = settings.broker.ca or sa.make_url(settings.database.url).query.get("ssl_ca")
    common = {
        "public_name": urlsplit(settings.sending.public_url).hostname,
        "bounce_host": settings.sending.bounce_host,
        "worker_secrets_host": "localhost",
        "worker_secrets": str(credentials.folder(settings)),
        "worker_verify_key": settings.broker.verify_key,
        # The centre's own way to its broker may be one that no other host has.
        **({"broker_host": broker} if broker not in (None, *_LOOPBACK) else {}),
        **({"worker_authority": authority} if authority else {}),
    }
    return {"all": {"vars": {**common, **own}, "children": {"centre": {}, "servers": {"hosts": {target.name: {**login, "servers": servers}}}}}}


@dataclass(frozen=True)
class Ansible:
    """`project`: the folder with the playbooks; `variables`: the operator's own for them."""

    settings: Settings
    project: Path
    variables: Mapping[str, Any] = field(default_factory=dict)

    def play(self, target: Target, say: Say) -> None:
        self._play(INSTALL, target, say)

    def remove(self, target: Target, say: Say) -> None:
        self._play(REMOVE, target, say)

    def _play(self, playbook: str, target: Target, say: Say) -> None:
        if not (self.project / playbook).is_file():
            raise CannotBeMade(f"there is no playbook {self.project / playbook}: run the centre from a whole checkout")
        if not target.host.host_key:
            raise CannotBeMade(f"the SSH key of the host {target.host.id} is not known, so another one could take its place: its source has to give it")
        secrets = Secrets.of([*target.files, Path(target.host.key_file)])
        log = self.settings.home / "log" / "provisioning" / f"{target.name}.log"
        log.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with log.open("a", encoding="utf-8") as kept:
            played = self._run(playbook, target, secrets, say, kept.write)
        self._judge(played, target, say)

    def _run(self, playbook: str, target: Target, secrets: Secrets, say: Say, keep: Callable[[str], object]) -> Played:
        given = {
            # With whom it ends, also if that has ended before it looks.
            "caller": os.getpid(),
            "project": str(self.project),
            "playbook": playbook,
            "inventory": inventory(target, self.settings, self.variables),
            "known_hosts": over_ssh.known_hosts(target.host),
            "seconds": int(self.settings.provisioning.play_minutes * 60),
        }
        played = Played()
        process = subprocess.Popen(
            [sys.executable, "-P", str(Path(__file__).with_name("player.py"))],
            env=self._environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            pass_fds=alone.locks(),
            start_new_session=True,
        )
        try:
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write(json.dumps(given) + "\n")
            process.stdin.close()
            for line in process.stdout:
                self._heard(played, secrets.masked(line), target.name, say, keep)
            if process.wait() < 0:
                played.said = f"it was ended by signal {-process.returncode}"
        finally:
            # A run that is cancelled comes here with an exception. The player ends Ansible and all below it.
            process.terminate()
            try:
                process.wait(_END_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        return played

    def _environment(self) -> dict[str, str]:
        """No more than Ansible needs: its tasks at the centre see it, and runner writes it down."""
        return {
            "PATH": f"{Path(sys.executable).parent}:{os.environ.get('PATH', os.defpath)}",
            "LANG": "C.UTF-8",
            "ANSIBLE_CONFIG": str(self.project / "ansible.cfg"),
        }

    def _heard(self, played: Played, line: str, name: str, say: Say, keep: Callable[[str], object]) -> None:
        try:
            told: Mapping[str, Any] = json.loads(line)
        except ValueError:
            told = {"kind": "output", "text": line.rstrip()}
        match told["kind"]:
            case "output":
                keep(f"{told['text']}\n")
                played.said = str(told["text"])[-500:]
            case "task":
                say(f"{name}: {told['task']}: {told['what']}" + (f", {told['message']}" if told["message"] else ""))
                if told["what"] in ("failed", "unreachable"):
                    played.failed.append((str(told["task"]), str(told["message"])))
            case "end":
                played.status, stats = str(told["status"]), told["stats"]
                if stats is not None:
                    played.broken, played.changed, played.unreachable = False, sum(stats["changed"].values()), bool(stats["dark"])

    def _judge(self, played: Played, target: Target, say: Say) -> None:
        host = target.host
        if played.unreachable:
            # Why, SSH itself says; Ansible may have got no further than a pipe that broke.
            over_ssh.run(host, ["true"], seconds=_LOGIN_SECONDS)
            said = played.failed[-1][1] if played.failed else ""
            raise PlayFailed(f"the host {host.id} does not let us in at {host.user}@{host.address} port {host.port}: {said}")
        if played.status == "timeout":
            raise PlayFailed(f"the playbook was not done within {self.settings.provisioning.play_minutes:g} minutes (provisioning.play_minutes)")
        if played.failed:
            raise PlayFailed(f"the task {played.failed[-1][0]!r} failed: {played.failed[-1][1]}")
        if played.status != "successful" or played.broken:
            raise PlayFailed(f"the playbook was {played.status if played.status == 'canceled' else 'not played'}: {played.said.strip() or 'it says nothing'}")
        say(f"{target.name}: done, {played.changed} tasks changed something")
