"""A real authoritative DNS server (Knot) on loopback, with zones that take signed dynamic updates."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import dns.message
import dns.query
import dns.rdatatype

from tests.parts.processes import free_port, stop, wait_for

KEY = "hmac-sha256:publisher:c2VjcmV0IG9mIHRoZSB0ZXN0cyBvbmx5ISEhISEhISE="
_ZONE = """$ORIGIN {zone}.
@ 60 IN SOA ns.{zone}. hostmaster.{zone}. 1 60 60 60 1
@ 60 IN NS ns.{zone}.
ns 60 IN A 127.0.0.1
other 60 IN TXT "somebody else's"
"""


@dataclass(frozen=True)
class Knot:
    """`address` is host:port, `folder` its own."""

    port: int
    folder: Path

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def has(self, name: str, kind: str) -> list[str]:
        """The values that it answers with, as texts."""
        answer = dns.query.tcp(dns.message.make_query(name, dns.rdatatype.from_text(kind)), "127.0.0.1", port=self.port, timeout=60)
        return sorted(record.to_text() for rrset in answer.answer for record in rrset)


@contextmanager
def running(folder: Path, zones: Sequence[str]) -> Iterator[Knot]:
    """Serve these zones until the block ends. Needs Debian's package knot (`script/setup test`)."""
    binary = shutil.which("knotd", path="/usr/sbin:/usr/bin")
    assert binary is not None, "run script/setup test"
    algorithm, name, secret = KEY.split(":")
    port = free_port()
    (folder / "database").mkdir()
    for zone in zones:
        (folder / f"{zone}.zone").write_text(_ZONE.format(zone=zone))
    (folder / "knot.conf").write_text(
        f"""server:
  listen: 127.0.0.1@{port}
  rundir: {folder}
  udp-workers: 1
  tcp-workers: 1
  background-workers: 1
database:
  storage: {folder}/database
  journal-db-max-size: 16M
log:
  - target: stderr
    any: info
key:
  - id: {name}
    algorithm: {algorithm}
    secret: {secret}
acl:
  - id: update
    key: {name}
    action: update
template:
  - id: default
    storage: {folder}
    acl: update
zone:
"""
        + "".join(f"  - domain: {zone}\n" for zone in zones)
    )
    knot = Knot(port, folder)
    with (folder / "output").open("wb") as output:
        process = subprocess.Popen([binary, "-c", str(folder / "knot.conf")], stdout=output, stderr=output)
    try:

        def answers() -> bool:
            assert process.poll() is None, (folder / "output").read_text()
            try:
                return all(knot.has(f"other.{zone}.", "TXT") for zone in zones)
            except OSError:
                return False

        wait_for(answers, what="Knot")
        yield knot
    finally:
        stop(process)
