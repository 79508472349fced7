"""The DNS records that a sending domain needs, ready to be pasted into a zone.

Pure: from a domain and this installation's hosts to records. What does not belong here: looking them up (`checking`).
"""

from __future__ import annotations

import datetime as dt
import enum
import ipaddress
from dataclasses import dataclass
from urllib.parse import urlsplit

from mail_pipelines.config import Settings
from mail_pipelines.domains.domain import DkimKey, KeyState, SendingDomain

TTL_SECONDS = 3600
MX_PREFERENCE = 10
# RFC 1035 §3.3: a TXT record is strings of at most so many octets.
_STRING_OCTETS = 255


class Purpose(enum.StrEnum):
    """What a record is for."""

    DKIM = "DKIM"
    DMARC = "DMARC"
    SPF = "SPF"
    BOUNCES = "bounces"
    LINKS = "links"
    # Of a server (`provisioning.dns.records`).
    HOST = "host"
    REVERSE = "reverse"


@dataclass(frozen=True)
class Hosts:
    """This installation: `bounces` takes the mail of return paths, `web` serves links, `senders` (names or addresses) send.

    `spf_include` is the name of a record that lists the senders, which then takes their place.
    """

    bounces: str
    web: str
    senders: tuple[str, ...]
    spf_include: str = ""

    @staticmethod
    def of(settings: Settings, senders: tuple[str, ...]) -> Hosts:
        return Hosts(settings.sending.bounce_host, urlsplit(settings.sending.public_url).hostname or "", senders, settings.dns.spf_include)


@dataclass(frozen=True)
class Record:
    """One record; `name` without the final dot, `value` of a TXT record in one piece. No mail may leave without a `required` one."""

    purpose: Purpose
    name: str
    type: str
    value: str
    required: bool = False

    def zone_line(self) -> str:
        """As a line of a zone file."""
        return f"{self.name}. {TTL_SECONDS} IN {self.type} {zone_value(self.type, self.value)}"


def zone_value(kind: str, value: str) -> str:
    """The value of a record as a zone file has it: texts in strings that are not too long, names with the final dot."""
    if kind == "TXT":
        return " ".join(f'"{value[start : start + _STRING_OCTETS]}"' for start in range(0, len(value), _STRING_OCTETS))
    return value if kind in ("A", "AAAA") else f"{value}."


def records_of(domain: SendingDomain, hosts: Hosts, now: dt.datetime) -> list[Record]:
    """All records, the required ones first. A retired key is among them until mail signed with it has arrived."""
    names = domain.names
    records = [dkim_record(names.domain, key) for key in domain.keys if key.published_until is None or key.published_until > now]
    records += [
        Record(Purpose.DMARC, f"_dmarc.{names.domain}", "TXT", "v=DMARC1; p=none", required=True),
        Record(Purpose.SPF, names.return_path_domain, "TXT", " ".join(("v=spf1", *_senders(hosts), "~all"))),
        Record(Purpose.BOUNCES, names.return_path_domain, "MX", f"{MX_PREFERENCE} {hosts.bounces}"),
    ]
    if hosts.web != names.tracking_domain:
        records.append(Record(Purpose.LINKS, names.tracking_domain, "CNAME", hosts.web))
    return records


def dkim_record(domain: str, key: DkimKey) -> Record:
    """The record of a key (RFC 6376 §3.6.1). Mail is signed with active keys only, so only these are required."""
    return Record(Purpose.DKIM, f"{key.selector}._domainkey.{domain}", "TXT", f"v=DKIM1; k=rsa; p={key.public_key}", required=key.state is KeyState.ACTIVE)


def _senders(hosts: Hosts) -> list[str]:
    return [f"include:{hosts.spf_include}"] if hosts.spf_include else spf_mechanisms(hosts.senders)


def spf_mechanisms(senders: tuple[str, ...]) -> list[str]:
    """The terms of an SPF record (RFC 7208 §5) that allow these hosts; `mx` while none is known that is not this machine itself."""
    terms = []
    for host in senders:
        try:
            address = ipaddress.ip_address(host)
        except ValueError:
            terms.append(f"a:{host}")
        else:
            if not address.is_loopback:
                terms.append(f"ip{address.version}:{address}")
    return terms or ["mx"]
