"""Hosts on one wire: network namespaces with an address each, so that one can be asked from the other."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
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
def hosts(count: int) -> Iterator[tuple[Host, ...]]:
    """Hosts that reach each other and nobody else, each by its device `wire`."""
    with ExitStack() as stack:
        first = stack.enter_context(_host(1))
        # Its device is also what connects them; of its own address, or it would take on the lowest of its ports' whenever one is added, and those who know
        # the one before would not reach it for half a minute and more.
        _ip("-n", first.namespace, "link", "add", "wire", "address", "02:00:00:00:00:01", "type", "bridge")
        _up(first)
        yield first, *(stack.enter_context(joined(first, number)) for number in range(2, count + 1))


@contextmanager
def joined(first: Host, number: int) -> Iterator[Host]:
    """One more on the wire of the first; its address ends in `number`, which no other one has."""
    with _host(number) as host:
        port = f"port{number}"
        _ip("-n", first.namespace, "link", "add", port, "type", "veth", "peer", "name", "wire", "netns", host.namespace)
        _ip("-n", first.namespace, "link", "set", port, "master", "wire", "up")
        _up(host)
        yield host


@contextmanager
def _host(number: int) -> Iterator[Host]:
    # Of a network for documentation: the program takes such addresses for public ones, and nobody else has them.
    host = Host(f"mail-pipelines-{os.getpid()}-{number}", f"192.0.2.{number}")
    # One of this name that is there already is somebody else's, and stays.
    _ip("netns", "add", host.namespace)
    try:
        yield host
    finally:
        subprocess.run(["ip", "netns", "delete", host.namespace], check=False)


def _up(host: Host) -> None:
    _ip("-n", host.namespace, "address", "add", f"{host.address}/24", "dev", "wire")
    for device in ("lo", "wire"):
        _ip("-n", host.namespace, "link", "set", device, "up")


@contextmanager
def two_hosts(names: str) -> Iterator[tuple[Host, Host]]:
    """Two of them; `names` are lines of the second one's /etc/hosts, with {address} for the first."""
    with hosts(2) as (first, second):
        files = Path("/etc/netns") / second.namespace
        try:
            # `ip netns exec` shows this file as /etc/hosts.
            files.mkdir(parents=True)
            (files / "hosts").write_text(names.format(address=first.address))
            yield first, second
        finally:
            shutil.rmtree(files, ignore_errors=True)


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)
