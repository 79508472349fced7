"""Hosts that a command makes and deletes: the operator's own, around the tool of a hoster (`infra/hosts` has examples).

What belongs here: the contract with the command, which docs/provisioning.md describes. What does not: any hoster.

It is run with a verb as its last word, JSON on its standard input and JSON on its standard output. Never by a shell.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mail_pipelines.provisioning import alone, ssh_keys
from mail_pipelines.provisioning.interfaces import Host, NoHost, Order, ProvisioningError

# By this status the command says that the source as a whole has none to give: a quota, an account that is closed.
NO_HOST = 3
_SHOWN = 300


@dataclass(frozen=True)
class Command:
    """`words`: the command and its first arguments. `key_file`: the private SSH key by which its hosts are entered."""

    name: str
    words: Sequence[str]
    user: str
    key_file: str
    cost_per_hour: float = 0.0
    most: int | None = None
    warm: bool = False
    curve: str = "normal"
    seconds: float = 600
    kind: str = "exim"
    reused: bool = False

    def reserve(self, taken: Collection[str]) -> str:
        return ""

    def create(self, order: Order) -> Host:
        asked = {
            "name": order.name,
            "user": self.user,
            "public_key": ssh_keys.public_of_file(Path(self.key_file)),
            "host_key": order.ssh_host_key,
            "cloud_init": ssh_keys.cloud_init(self.user, ssh_keys.public_of_file(Path(self.key_file)), order.ssh_host_key),
        }
        answer = self._run("create", asked)
        if not answer:
            raise ProvisioningError(f"the command of {self.name} has made a host and says nothing of it: expected its id and address as JSON")
        return self._host(answer, order)

    def find(self, order: Order) -> Host | None:
        answer = self._run("find", {"name": order.name})
        return self._host(answer, order) if answer else None

    def delete(self, order: Order, host_id: str) -> None:
        self._run("delete", {"name": order.name, "id": host_id})

    def _host(self, answer: dict[str, Any], order: Order) -> Host:
        try:
            identity, address = str(answer["id"]), str(answer["address"])
            port = int(answer.get("port", 22))
        except (KeyError, TypeError, ValueError):
            raise ProvisioningError(f"the command of {self.name} says {json.dumps(answer)[:_SHOWN]}; expected id and address of the host") from None
        host_key = str(answer.get("host_key") or ssh_keys.public_of(order.ssh_host_key))
        return Host(identity, address, host_key, str(answer.get("user", self.user)), self.key_file, port)

    def _run(self, verb: str, asked: dict[str, Any]) -> dict[str, Any]:
        words = [*self.words, verb]
        try:
            done = alone.run(words, json.dumps(asked), seconds=self.seconds)
        except OSError as error:
            raise ProvisioningError(f"the command of {self.name}, {words[0]}, cannot be run: {error.strerror}") from error
        except subprocess.TimeoutExpired:
            raise ProvisioningError(f"the command of {self.name} has not ended `{verb}` within {self.seconds:.0f} s") from None
        if done.returncode:
            kind = NoHost if done.returncode == NO_HOST else ProvisioningError
            raise kind(f"the command of {self.name} could not {verb} (status {done.returncode}): {_last_line(done.stderr) or 'it says nothing'}")
        try:
            answer = json.loads(done.stdout or "null")
        except ValueError:
            answer = done.stdout
        if answer is not None and not isinstance(answer, dict):
            raise ProvisioningError(f"the command of {self.name} answers {verb} with no JSON object")
        return answer or {}


def _last_line(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[-1].strip()[:_SHOWN] if lines else ""
