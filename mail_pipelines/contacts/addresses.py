"""E-mail addresses: what is accepted, the normal form, the hash by which an address is known everywhere.

The local part is lower-cased (a policy: no large provider tells cases apart), the domain is lower-case A-labels. Syntax is
narrower than RFC 5321 allows: no quoted local parts, no address literals, at least two labels, and no local part beyond
ASCII, for only SMTPUTF8 hosts take one. Whether a domain exists is not asked here.
"""

from __future__ import annotations

import functools
import hashlib
import re
from typing import NamedTuple

from mail_pipelines.errors import MailPipelinesError

# RFC 5321 §4.5.3.1: octets of a local part, and of a path without its angle brackets.
LOCAL_LENGTH = 64
ADDRESS_LENGTH = 254
HASH_BYTES = 16
_HASH_PERSON = b"mail-pipelines"
ATOM = r"[a-z0-9!#$%&'*+/=?^_`{|}~-]+"
_LOCAL = re.compile(rf"{ATOM}(?:\.{ATOM})*")
_LABEL = r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?"
# A domain that ends in a number would be read as an IPv4 address.
_DOMAIN = re.compile(rf"(?=.{{4,253}}\Z)(?:{_LABEL}\.)+(?![0-9]+\Z){_LABEL}")


class AddressError(MailPipelinesError):
    """Not an address we can mail. `reason` says why and holds nothing personal; the message adds the masked address."""

    def __init__(self, email: str, reason: str) -> None:
        super().__init__(f"{mask(email)} is no usable address: {reason}")
        self.reason = reason


class Address(NamedTuple):
    """`email` as given without surrounding blanks, `address` its normal form, `domain` in A-labels, `hash` of 16 bytes."""

    email: str
    address: str
    domain: str
    hash: bytes


def parse(email: str) -> Address:
    """The normal form of an address; about 1.5 µs for plain ASCII. Raises `AddressError`."""
    given = email.strip()
    local, at, domain = given.rpartition("@")
    folded = local.lower()
    if not at or not local.isascii() or len(local) > LOCAL_LENGTH or not _LOCAL.fullmatch(folded):
        raise AddressError(given, _local_reason(local, at))
    try:
        domain = normal_domain(domain)
    except ValueError as error:
        raise AddressError(given, str(error)) from None
    address = f"{folded}@{domain}"
    if len(address) > ADDRESS_LENGTH or len(given) > ADDRESS_LENGTH:
        raise AddressError(given, f"it is longer than {ADDRESS_LENGTH} characters")
    return Address(given, address, domain, address_hash(address))


def address_hash(address: str) -> bytes:
    """16 bytes of BLAKE2b over a normal form. Suppressions keep only this."""
    return hashlib.blake2b(address.encode(), digest_size=HASH_BYTES, person=_HASH_PERSON).digest()


@functools.lru_cache(maxsize=65_536)
def normal_domain(domain: str) -> str:
    """A domain as lower-case A-labels (UTS 46, IDNA 2008). Raises `ValueError` with a reason."""
    if not domain:
        raise ValueError("nothing follows the '@'")
    normal = domain.lower()
    if not normal.isascii() or "xn--" in normal:
        import idna

        try:
            normal = idna.encode(domain, uts46=True, std3_rules=True).decode()
        except (idna.IDNAError, UnicodeError):
            raise ValueError("the domain is no valid internationalised domain name") from None
    if not _DOMAIN.fullmatch(normal):
        raise ValueError(_domain_reason(normal))
    return normal


def mask(email: str) -> str:
    """`a***@domain`: enough to recognise an address one knows, too little to learn one."""
    local, at, domain = email.strip().rpartition("@")
    first = (local if at else domain)[:1]
    # What is no domain at all (two columns mixed up, a whole sentence) may be anything, a name too.
    shown = domain if len(domain) <= 253 and re.fullmatch(r"[\w.-]+", domain) else "***"
    return f"{first if first.isprintable() else ''}***" + (f"@{shown}" if at else "")


def _local_reason(local: str, at: str) -> str:
    if not at:
        return "it has no '@'"
    if not local:
        return "nothing stands before the '@'"
    if not local.isascii():
        return "letters beyond ASCII before the '@' are not supported"
    if len(local) > LOCAL_LENGTH:
        return f"more than {LOCAL_LENGTH} characters stand before the '@'"
    if local.startswith('"'):
        return "quoted local parts are not supported"
    if local.startswith(".") or local.endswith(".") or ".." in local:
        return "a dot before the '@' must stand between other characters"
    if "@" in local:
        return "it has more than one '@'"
    wrong = next(letter for letter in local.lower() if not re.fullmatch(ATOM + r"|\.", letter))
    return f"{wrong!r} cannot stand before the '@'"


def _domain_reason(domain: str) -> str:
    if "." not in domain:
        return "the domain has no dot"
    if len(domain) > 253:
        return "the domain is longer than 253 characters"
    if domain.startswith(".") or domain.endswith(".") or ".." in domain:
        return "a dot of the domain must stand between labels"
    if domain.startswith("["):
        return "address literals are not supported"
    if re.fullmatch(r"[0-9]+", domain.rpartition(".")[2]):
        return "the domain ends in a number"
    wrong = next((letter for letter in domain if not re.fullmatch(r"[a-z0-9.-]", letter)), None)
    return f"{wrong!r} cannot stand in a domain" if wrong else "a label of the domain begins or ends with '-' or is longer than 63 characters"
