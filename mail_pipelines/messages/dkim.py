"""DKIM signatures (RFC 6376): rsa-sha256, relaxed/relaxed, over every field of a composed message's header.

What belongs here: the DKIM-Signature field. It is on the send path: a message costs one RSA signature and little else. What does
not: where keys come from and which one signs (`domains`).
"""

from __future__ import annotations

import functools
from binascii import b2a_base64
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from cryptography.hazmat.primitives.asymmetric.padding import PKCS1v15
from cryptography.hazmat.primitives.hashes import SHA256

from mail_pipelines.messages.canonical import relaxed_header

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey

# Fields that are not composed. Naming them in h= makes the signature fail if one is added on the way.
_ABSENT = ("Reply-To", "Cc", "Content-Transfer-Encoding")
_LINE_LENGTH = 78
_PADDING, _HASH = PKCS1v15(), SHA256()


@dataclass(frozen=True)
class Unsigned:
    """A DKIM-Signature field up to the signature: as it is written, and what the key signs."""

    begin: bytes
    octets: bytes


@dataclass(frozen=True)
class Signer:
    """Signs as `domain` (d=) with the key that is published under `selector` (s=); both in ASCII."""

    domain: str
    selector: str
    key: RSAPrivateKey = field(repr=False)

    def prepare(self, header: bytes, body_sha256: bytes, second: int) -> Unsigned:
        """The DKIM-Signature field, to be put before the header, without its signature.

        `header` is whole fields with CRLF, no name twice, without the empty line; all of them are signed, and a second one of any
        name makes the signature fail. `body_sha256` is the digest of the body's relaxed form, `second` the time of signing (t=, epoch seconds).
        """
        names, canonical = relaxed_header(header)
        begin, relaxed_begin = _begin(self.domain, self.selector, second, names)
        body_hash = b2a_base64(body_sha256, newline=False)
        return Unsigned(begin + body_hash, b"%b%b%b; b=" % (canonical, relaxed_begin, body_hash))

    def sign(self, unsigned: Unsigned) -> bytes:
        """The whole field. Nearly all of the time that it takes is the key's, which holds no lock of Python's meanwhile."""
        text = b2a_base64(self.key.sign(unsigned.octets, _PADDING, _HASH), newline=False)
        width = _LINE_LENGTH - len(" b=")
        lines = [text[start : start + width] for start in range(0, len(text), width)]
        return b"%b;\r\n b=%b\r\n" % (unsigned.begin, b"\r\n ".join(lines))


@functools.lru_cache(maxsize=64)
def _begin(domain: str, selector: str, second: int, names: tuple[bytes, ...]) -> tuple[bytes, bytes]:
    """The field up to the value of bh=, as it is written and in relaxed form: the same for all messages of a claim."""
    present = [name.decode("ascii") for name in names]
    known = {name.lower() for name in present}
    # Twice: the second stands for a field that is not there.
    signed = [name for name in present for _ in range(2)] + [name for name in _ABSENT if name.lower() not in known]
    lines = [f"DKIM-Signature: v=1; a=rsa-sha256; c=relaxed/relaxed; d={domain};", f" s={selector}; t={second};", f" h={signed[0]}"]
    for name in signed[1:]:
        if len(lines[-1]) + len(name) + 2 > _LINE_LENGTH:
            lines[-1] += ":"
            lines.append(f" {name}")
        else:
            lines[-1] += f":{name}"
    lines[-1] += ";"
    lines.append(" bh=")
    value = "".join(lines).partition(":")[2].strip()
    return "\r\n".join(lines).encode(), f"dkim-signature:{value}".encode()
