"""A DNS server on loopback, over real UDP and TCP, that says what a test has published."""

from __future__ import annotations

import socketserver
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import dns.exception
import dns.flags
import dns.message
import dns.name
import dns.rcode
import dns.rdataclass
import dns.rdatatype
import dns.rrset
import dns.zonefile

from tests.parts.processes import free_port

Place = tuple[dns.name.Name, dns.rdatatype.RdataType]


class Zone:
    """What the server knows. Names in `silent` get no answer, those in `failing` SERVFAIL; `asked` counts by transport."""

    def __init__(self) -> None:
        self._records: dict[Place, dns.rrset.RRset] = {}
        self.silent: set[str] = set()
        self.failing: set[str] = set()
        self.asked = {"udp": 0, "tcp": 0}
        self.address = ""

    def publish(self, *lines: str) -> None:
        """Add records, given as lines of a zone file."""
        for rrset in dns.zonefile.read_rrsets("\n".join(lines), rdclass=None, default_ttl=60):
            self._records.setdefault((rrset.name, rrset.rdtype), dns.rrset.RRset(rrset.name, rrset.rdclass, rrset.rdtype)).update(rrset)

    def replace(self, name: str, kind: str, ttl: int, values: Sequence[str]) -> None:
        """Let these be all records of a name's type, as an API of a DNS hoster does it; none: there are none any more."""
        place = dns.name.from_text(name), dns.rdatatype.from_text(kind)
        self._records.pop(place, None)
        if values:
            self._records[place] = dns.rrset.from_text(place[0], ttl, dns.rdataclass.IN, place[1], *values)

    def withdraw(self, name: str, kind: str) -> None:
        del self._records[dns.name.from_text(name), dns.rdatatype.from_text(kind)]

    def text(self, name: bytes | str, timeout: float = 5) -> bytes | None:
        """The TXT record as dkimpy's `dnsfunc` gives it."""
        found = self._records.get((dns.name.from_text(name.decode() if isinstance(name, bytes) else name), dns.rdatatype.TXT))
        return b"".join(found[0].strings) if found else None

    def answer(self, wire: bytes, transport: str) -> bytes | None:
        query = dns.message.from_wire(wire)
        question = query.question[0]
        name = question.name.to_text(omit_final_dot=True)
        self.asked[transport] += 1
        if name in self.silent:
            return None
        response = dns.message.make_response(query)
        response.flags |= dns.flags.AA | dns.flags.RA
        if name in self.failing:
            response.set_rcode(dns.rcode.SERVFAIL)
            return response.to_wire()
        chain = question.name
        while (alias := self._records.get((chain, dns.rdatatype.CNAME))) and question.rdtype != dns.rdatatype.CNAME:
            response.answer.append(alias)
            chain = alias[0].target
        if found := self._records.get((chain, question.rdtype)):
            response.answer.append(found)
        elif not any(known == chain for known, _ in self._records):
            response.set_rcode(dns.rcode.NXDOMAIN)
        try:
            return response.to_wire(max_size=512 if transport == "udp" else 65_535)
        except dns.exception.TooBig:
            response.answer.clear()
            response.flags |= dns.flags.TC
            return response.to_wire()


@contextmanager
def serving(zone: Zone, host: str = "127.0.0.1", port: int = 0) -> Iterator[Zone]:
    """Answer for the zone at `zone.address` (host:port); port 0 takes a free one."""

    class Udp(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            wire, socket = self.request
            if answer := zone.answer(wire, "udp"):
                socket.sendto(answer, self.client_address)

    class Tcp(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            wire = self.rfile.read(int.from_bytes(self.rfile.read(2)))
            if answer := zone.answer(wire, "tcp"):
                self.wfile.write(len(answer).to_bytes(2) + answer)

    class TcpServer(socketserver.ThreadingTCPServer):
        allow_reuse_address = True

    # Nobody else has one of ours, for UDP either.
    port = port or free_port()
    with TcpServer((host, port), Tcp) as tcp, socketserver.ThreadingUDPServer((host, port), Udp) as udp:
        zone.address = f"{host}:{port}"
        threads = [threading.Thread(target=server.serve_forever, args=(0.02,)) for server in (udp, tcp)]
        for thread in threads:
            thread.start()
        try:
            yield zone
        finally:
            for server in (udp, tcp):
                server.shutdown()
            for thread in threads:
                thread.join()
