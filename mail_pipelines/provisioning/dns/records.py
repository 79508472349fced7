"""The DNS records that one server needs: its own, and the one that all servers share.

What belongs here: from rows and addresses to records. What does not: how they are published (`publishers`), and those of a sending domain
(`domains.records`).
"""

from __future__ import annotations

import datetime as dt
import ipaddress
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby

import dns.reversename
import sqlalchemy as sa
from sqlalchemy.engine import Connection

from mail_pipelines.contacts.addresses import normal_domain
from mail_pipelines.database.models import Provision, Server
from mail_pipelines.dispatch.registry import ServerState
from mail_pipelines.domains import store
from mail_pipelines.domains.records import Purpose, Record, dkim_record
from mail_pipelines.errors import MailPipelinesError

_GONE = (ServerState.RETIRED.value, ServerState.LOST.value)


class DnsError(MailPipelinesError):
    """Records of a server cannot be made, or not be published as asked."""


@dataclass(frozen=True)
class ServerRecords:
    """`own` are this server's alone, and go with it. `shared` is the SPF record that the return paths of all domains include; empty if the setting is."""

    own: tuple[Record, ...]
    shared: tuple[Record, ...]

    @property
    def all(self) -> list[Record]:
        return [*self.own, *self.shared]


def of_server(connection: Connection, server_id: int, hostname: str, addresses: Iterable[str], spf_include: str, now: dt.datetime) -> ServerRecords:
    """What the DNS should have while a server of this name sends from `addresses`. Raises `DnsError` for what is no name or no address."""
    texts = tuple(addresses)
    own = (*host_records(hostname, texts), *own_keys(connection, server_id, now))
    return ServerRecords(own, _shared(spf_include, {*of_fleet(connection, without=server_id), *texts}))


def of_gone_server(connection: Connection, server_id: int, hostname: str, addresses: Iterable[str], spf_include: str) -> ServerRecords:
    """What has to go with a server, also keys that were retired long ago; and the shared record as it should be then."""
    own = (*host_records(hostname, addresses), *own_keys(connection, server_id, None))
    return ServerRecords(own, _shared(spf_include, of_fleet(connection, without=server_id)))


def _shared(spf_include: str, addresses: Iterable[str]) -> tuple[Record, ...]:
    return (spf_record(spf_include, addresses),) if spf_include else ()


def host_records(hostname: str, addresses: Iterable[str]) -> list[Record]:
    """The name's addresses, and each address's name: large providers want both to agree."""
    try:
        name = normal_domain(hostname.strip().removesuffix("."))
    except ValueError as error:
        raise DnsError(f"{hostname!r} is no host name: {error}") from error
    records = []
    for text in addresses:
        try:
            address = ipaddress.ip_address(text)
        except ValueError as error:
            raise DnsError(f"{text!r} is no IP address") from error
        records.append(Record(Purpose.HOST, name, "A" if address.version == 4 else "AAAA", str(address)))
        records.append(Record(Purpose.REVERSE, dns.reversename.from_address(str(address)).to_text(omit_final_dot=True), "PTR", name))
    return records


def spf_record(name: str, addresses: Iterable[str]) -> Record:
    """The one record that lists all servers (RFC 7208 §5.6), neighbouring addresses as one network: return paths include it by name."""
    texts = set(addresses)
    four = ipaddress.collapse_addresses(ipaddress.IPv4Network(text) for text in texts if ":" not in text)
    six = ipaddress.collapse_addresses(ipaddress.IPv6Network(text) for text in texts if ":" in text)
    # A network of one address is written as the address.
    terms = [f"ip4:{network}".removesuffix("/32") for network in four] + [f"ip6:{network}".removesuffix("/128") for network in six]
    return Record(Purpose.SPF, name, "TXT", " ".join(("v=spf1", *terms, "~all")))


def own_keys(connection: Connection, server_id: int, now: dt.datetime | None) -> list[Record]:
    """The records of the DKIM keys that only this server signs with; a retired one until its mail has arrived, or (without `now`) for ever."""
    return [
        dkim_record(domain.names.domain, key)
        for domain in store.all_domains(connection)
        for key in domain.keys
        if key.server_id == server_id and (now is None or key.published_until is None or key.published_until > now)
    ]


def of_fleet(connection: Connection, *, without: int = 0) -> set[str]:
    """The addresses that servers send from, as their heartbeats tell and their hosts were made, but for one server's."""
    hosts = sa.select(Provision.host).join(Server, Server.id == Provision.server_id)
    hosts = hosts.where(Provision.host.is_not(None), Server.state.not_in(_GONE), Server.id != without)
    found = {host["address"] for host in connection.execute(hosts).scalars() if is_public(host["address"])}
    rows = connection.execute(sa.select(Server.health, Server.host).where(Server.state.not_in(_GONE), Server.id != without))
    for health, host in rows:
        for text in (*(health or {}).get("addresses", ()), host):
            if is_public(text):
                found.add(text)
    return found


def is_public(text: str) -> bool:
    """Whether this is an address that the world could see: neither a name, nor of this host or a private network."""
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return False
    # Networks of documentation count: tests send from them, and nobody else has them.
    return address.is_global or any(address in network for network in _DOCUMENTATION if network.version == address.version)


_DOCUMENTATION = tuple(map(ipaddress.ip_network, ("192.0.2.0/24", "198.51.100.0/24", "203.0.113.0/24", "2001:db8::/32")))


def sets(records: Iterable[Record]) -> list[tuple[str, str, list[str]]]:
    """Records as (name, type, values), those of one name and type together, in zone order."""
    ordered = sorted(records, key=lambda record: (record.name, record.type, record.value))
    grouped = groupby(ordered, key=lambda record: (record.name, record.type))
    return [(name, kind, [record.value for record in group]) for (name, kind), group in grouped]
