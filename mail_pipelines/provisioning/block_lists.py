"""DNS block lists (RFC 5782): whether an address is on one, told apart from lists that do not answer.

What belongs here: asking, and reading what is answered. What does not: what follows from it (`provisioning.verify`, `provisioning.listing`).
"""

from __future__ import annotations

import enum
import functools
import ipaddress
import tomllib
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dns.reversename

from mail_pipelines.config import DnsSettings
from mail_pipelines.domains.resolver import Answer, Question, ask

DATA = Path(__file__).with_name("checks.toml")
# Not a listing: the list does not serve this resolver (an open one, or too many questions).
_REFUSED = ipaddress.ip_network("127.255.255.0/24")
_LISTINGS = ipaddress.ip_network("127.0.0.0/8")
# RFC 5782 §5: every list has the first and none the second.
_ALWAYS, _NEVER = "127.0.0.2", "127.0.0.1"


@dataclass(frozen=True)
class BlockList:
    """One list: the zone it is asked in, where one asks to be removed, and the answers for which a server is drained."""

    zone: str
    remedy: str
    source: str = ""
    drains: Sequence[str] = ()


class Standing(enum.StrEnum):
    """What a list says of an address. `unknown`: it does not answer, or not to this resolver, or is out of order."""

    CLEAR = "clear"
    LISTED = "listed"
    UNKNOWN = "unknown"


@dataclass(frozen=True)
class Look:
    """What one list said of one address, and how; `drains`: a server of that address is to be taken out of service."""

    address: str
    zone: str
    standing: Standing
    text: str
    drains: bool = False


@functools.cache
def data() -> dict[str, Any]:
    return tomllib.loads(DATA.read_text(encoding="utf-8"))


def block_lists() -> tuple[BlockList, ...]:
    return tuple(BlockList(**entry) for entry in data()["block_list"])


def look(settings: DnsSettings, addresses: Collection[str], lists: Collection[BlockList]) -> list[Look]:
    """What each list says of each address, in the order given. Raises `ResolverError`."""
    names = {(address, a_list.zone): _name(address, a_list.zone) for address in (*addresses, _ALWAYS, _NEVER) for a_list in lists}
    answers = ask(settings, [Question(name, "A") for name in dict.fromkeys(names.values())])

    def answer(address: str, zone: str) -> Answer:
        return answers[Question(names[address, zone], "A")]

    doubts = {a_list.zone: _doubt(answer(_ALWAYS, a_list.zone), answer(_NEVER, a_list.zone)) for a_list in lists}
    return [_read(address, a_list, answer(address, a_list.zone), doubts[a_list.zone]) for address in addresses for a_list in lists]


def _name(address: str, zone: str) -> str:
    reverse = dns.reversename.from_address(address).to_text(omit_final_dot=True)
    return f"{reverse.removesuffix('.in-addr.arpa').removesuffix('.ip6.arpa')}.{zone}"


def _codes(answer: Answer) -> list[str]:
    """The answers that mean a listing."""
    found = [ipaddress.ip_address(value) for value in answer.values]
    return [str(code) for code in found if code in _LISTINGS and code not in _REFUSED]


def _refused(answer: Answer) -> bool:
    return any(ipaddress.ip_address(value) in _REFUSED for value in answer.values)


def _doubt(always: Answer, never: Answer) -> str:
    """Why a list is not to be believed; empty if it is in order."""
    if always.failure:
        return f"it does not answer: {always.failure}"
    if _refused(always):
        return "it refuses this resolver: ask by one of your own (dns.servers)"
    if _codes(never):
        return "it lists everything, so it has been given up"
    return "" if _codes(always) else "it lists nothing, so it has been given up, or does not answer this resolver"


def _read(address: str, a_list: BlockList, answer: Answer, doubt: str) -> Look:
    if doubt or answer.failure or _refused(answer):
        return Look(address, a_list.zone, Standing.UNKNOWN, f"{a_list.zone}: {doubt or answer.failure or 'it refuses this resolver'}")
    if codes := _codes(answer):
        text = f"{address} is listed by {a_list.zone} ({', '.join(codes)}): find the cause, then ask to be removed at {a_list.remedy}"
        return Look(address, a_list.zone, Standing.LISTED, text, drains=any(code in a_list.drains for code in codes))
    return Look(address, a_list.zone, Standing.CLEAR, f"{address} is not listed by {a_list.zone}")
