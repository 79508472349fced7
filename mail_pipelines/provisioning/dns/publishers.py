"""How records get into the DNS: by dynamic update, by the operator's own command, or by hand.

What belongs here: the implementations of `DnsPublisher`, which raise `DnsError`. All can be repeated. `publish` makes a name's records of a type exactly those
that are given, since the names are the server's own; `withdraw` removes those that are given, and none that somebody else has put there meanwhile.
Whether the world sees them is asked by `missing`, of the resolvers, never of the publisher. What does not belong here: which records (`records`).
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field

import dns.exception
import dns.message
import dns.name
import dns.query
import dns.rcode
import dns.rdatatype
import dns.resolver
import dns.tsig
import dns.tsigkeyring
import dns.update

from mail_pipelines.config import DnsSettings
from mail_pipelines.domains import checking, resolver
from mail_pipelines.domains.domain import Status
from mail_pipelines.domains.records import TTL_SECONDS, Record, zone_value
from mail_pipelines.domains.resolver import Question, ask
from mail_pipelines.provisioning.dns.records import DnsError, sets
from mail_pipelines.provisioning.interfaces import DnsPublisher

# A command of a cloud does several calls over the network.
COMMAND_SECONDS = 120
_SHOWN = 500


def publisher_of(settings: DnsSettings) -> DnsPublisher:
    """The one that the settings name. Raises `DnsError` if they lack something."""
    match settings.publisher:
        case "rfc2136":
            return Rfc2136.of(settings)
        case "command":
            if not settings.command:
                raise DnsError("dns.publisher is command: say in dns.command which one, as a list of words")
            return Command(settings, tuple(settings.command))
        case _:
            return ByHand(settings)


def missing(settings: DnsSettings, records: Sequence[Record]) -> list[Record]:
    """The records that the resolvers of the settings do not see as they are meant. Raises `ResolverError`."""
    answers = ask(settings, list({Question(record.name, record.type) for record in records}))
    return [record for record in records if checking.look(record, answers).status is not Status.PUBLISHED]


@dataclass(frozen=True)
class ByHand:
    """An operator publishes what is missing, as lines of a zone file say it."""

    settings: DnsSettings

    def publish(self, records: Sequence[Record]) -> None:
        """Nothing: it is a person's turn."""

    def withdraw(self, records: Sequence[Record]) -> None:
        """Nothing: it is a person's turn."""

    def missing(self, records: Sequence[Record]) -> list[Record]:
        return missing(self.settings, records)


@dataclass(frozen=True)
class Command:
    """The operator's command, with JSON on its standard input; docs/domains.md has it with examples."""

    settings: DnsSettings
    words: tuple[str, ...]

    def publish(self, records: Sequence[Record]) -> None:
        self._run("publish", records)

    def withdraw(self, records: Sequence[Record]) -> None:
        self._run("withdraw", records)

    def missing(self, records: Sequence[Record]) -> list[Record]:
        return missing(self.settings, records)

    def _run(self, action: str, records: Sequence[Record]) -> None:
        if not records:
            return
        asked = [{"name": name, "type": kind, "ttl": TTL_SECONDS, "values": values} for name, kind, values in sets(records)]
        try:
            done = subprocess.run(
                self.words, input=json.dumps({"action": action, "records": asked}), capture_output=True, text=True, timeout=COMMAND_SECONDS, check=False
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise DnsError(f"the command of dns.command, {self.words[0]}, did not run to its end: {getattr(error, 'strerror', None) or error}") from error
        if done.returncode:
            said = (done.stderr or done.stdout).strip()[-_SHOWN:]
            raise DnsError(
                f"the command of dns.command, {self.words[0]}, could not {action} the records: status {done.returncode}{f', {said}' if said else ''}"
            )


@dataclass(frozen=True)
class Rfc2136:
    """Dynamic updates (RFC 2136), signed by a key that both sides have (RFC 8945), over TCP."""

    settings: DnsSettings = field(repr=False)
    address: str
    port: int
    key: dns.tsig.Key = field(repr=False)

    @staticmethod
    def of(settings: DnsSettings) -> Rfc2136:
        if not (settings.update_server and settings.update_key):
            raise DnsError(
                "dns.publisher is rfc2136: give dns.update_server, the address of the zones' primary, and dns.update_key_file, the file of its TSIG key"
            )
        server = resolver.server(settings.update_server, "dns.update_server")
        algorithm, name, secret = (["hmac-sha256", *settings.update_key.split(":")])[-3:] if settings.update_key.count(":") in (1, 2) else ("", "", "")
        try:
            key = dns.tsig.Key(name, secret, algorithm)
            if key.algorithm not in dns.tsig.mac_sizes:
                raise ValueError("an algorithm that nobody knows")
        except (ValueError, dns.exception.DNSException):
            # Without the cause, which would quote the key.
            raise DnsError("dns.update_key is no TSIG key: expected [ALGORITHM:]NAME:SECRET, the secret in base64, as `nsupdate -y` takes it") from None
        return Rfc2136(settings, server.address, server.port, key)

    def publish(self, records: Sequence[Record]) -> None:
        for zone, of_zone in self._by_zone(records).items():
            update = self._update(zone)
            for name, kind, values in sets(of_zone):
                update.delete(_name(name), kind)
                for value in values:
                    update.add(_name(name), TTL_SECONDS, kind, zone_value(kind, value))
            self._send(update, zone)

    def withdraw(self, records: Sequence[Record]) -> None:
        for zone, of_zone in self._by_zone(records).items():
            update = self._update(zone)
            for name, kind, values in sets(of_zone):
                for value in values:
                    update.delete(_name(name), kind, zone_value(kind, value))
            self._send(update, zone)

    def missing(self, records: Sequence[Record]) -> list[Record]:
        return missing(self.settings, records)

    def _update(self, zone: dns.name.Name) -> dns.update.UpdateMessage:
        return dns.update.UpdateMessage(zone, keyring=self.key, keyalgorithm=self.key.algorithm)

    def _by_zone(self, records: Sequence[Record]) -> dict[dns.name.Name, list[Record]]:
        """The records of each zone that the server has; those of other servers' zones, such as often the reverse ones, are left out."""
        found: dict[dns.name.Name, list[Record]] = {}
        for record in records:
            if (zone := self._zone(_name(record.name))) is not None:
                found.setdefault(zone, []).append(record)
        return found

    def _zone(self, name: dns.name.Name) -> dns.name.Name | None:
        answer = self._ask(dns.message.make_query(name, dns.rdatatype.SOA), f"where {name} is")
        if answer.rcode() == dns.rcode.REFUSED or not answer.flags & dns.flags.AA:
            return None
        owners = [rrset.name for rrset in (*answer.answer, *answer.authority) if rrset.rdtype == dns.rdatatype.SOA]
        return owners[0] if owners else None

    def _send(self, update: dns.update.UpdateMessage, zone: dns.name.Name) -> None:
        answer = self._ask(update, f"an update of {zone}")
        if answer.rcode() != dns.rcode.NOERROR:
            raise DnsError(
                f"the DNS server {self.address}:{self.port} refuses an update of {zone}: {dns.rcode.to_text(answer.rcode())}; let its policy allow the key "
                f"{self.key.name} to change A, AAAA, PTR and TXT there"
            )

    def _ask(self, query: dns.message.Message, what: str) -> dns.message.Message:
        place = f"the DNS server {self.address}:{self.port}"
        try:
            return dns.query.tcp(query, self.address, timeout=self.settings.timeout_seconds, port=self.port)
        except dns.tsig.PeerBadKey as error:
            raise DnsError(f"{place} does not know the key {self.key.name} (dns.update_key), asked for {what}") from error
        except dns.tsig.PeerError as error:
            raise DnsError(f"{place} does not take the signature of {what}: the secret of dns.update_key differs, or a clock is off ({error})") from error
        except (dns.exception.DNSException, OSError, EOFError) as error:
            raise DnsError(f"{place} (dns.update_server) does not answer, asked for {what}: {type(error).__name__}") from error


def _name(name: str) -> dns.name.Name:
    return dns.name.from_text(name)
