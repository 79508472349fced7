"""Two hosts on one wire: network namespaces with an address each, so that one can be asked from the other."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Host:
    """A network namespace. `run` before a command's words runs it there."""

    namespace: str
    address: str

    @property
    def run(self) -> tuple[str, ...]:
        return "ip", "netns", "exec", self.namespace


@contextmanager
def two_hosts(names: str = "") -> Iterator[tuple[Host, Host]]:
    """Two hosts that reach each other and nobody else; `names` are lines of the second one's /etc/hosts, with {address} for the first."""
    hosts = tuple(Host(f"mail-pipelines-{os.getpid()}-{number}", f"10.9.8.{number}") for number in (1, 2))
    first, second = hosts
    files = Path("/etc/netns") / second.namespace
    try:
        for host in hosts:
            _ip("netns", "add", host.namespace)
        _ip("link", "add", "wire", "netns", first.namespace, "type", "veth", "peer", "name", "wire", "netns", second.namespace)
        for host in hosts:
            _ip("-n", host.namespace, "address", "add", f"{host.address}/24", "dev", "wire")
            for device in ("lo", "wire"):
                _ip("-n", host.namespace, "link", "set", device, "up")
        # `ip netns exec` shows this file as /etc/hosts.
        files.mkdir(parents=True)
        (files / "hosts").write_text(names.format(address=first.address))
        yield first, second
    finally:
        for host in hosts:
            subprocess.run(["ip", "netns", "delete", host.namespace], check=False)
        shutil.rmtree(files, ignore_errors=True)


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)
