"""Whether a message as it arrived still carries its DKIM signature (RFC 6376), of the kind that `dkim` makes: rsa-sha256, relaxed/relaxed.

What belongs here: from the octets of a message and the key in the DNS to a verdict. It is for test messages, not on the send path.
"""

from __future__ import annotations

import re
from base64 import b64decode
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from hashlib import sha256

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.padding import PKCS1v15
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import load_der_public_key

_FIELD = re.compile(rb"([!-9;-~]+)[ \t]*:((?:[^\r\n]|\r\n[ \t])*)\r\n")
_SIGNATURE = re.compile(rb"(\bb[ \t\r\n]*=)[^;]*")
_SPACES = re.compile(rb"[ \t]+")
_ENDS = re.compile(rb"[ \t]+(?=\r\n)")
_LAST_LINES = re.compile(rb"(?:\r\n)+\Z")
# Of a From field must be signed (§5.4).
_MUST = "from"


@dataclass(frozen=True)
class Signature:
    """Who signed: d= and s=. `broken` says why the signature does not hold; empty if it does."""

    domain: str
    selector: str
    broken: str = ""


def verify(data: bytes, text_of: Callable[[str], str | None]) -> Signature | None:
    """The verdict about the first DKIM-Signature of a message with CRLF line ends, None if it has none. `text_of` gives the TXT record of a name."""
    header, end, body = data.partition(b"\r\n\r\n")
    fields = _FIELD.findall(header + b"\r\n") if end else []
    signature = next(((name, value) for name, value in fields if name.lower() == b"dkim-signature"), None)
    if signature is None:
        return None
    tags = _tags(signature[1].decode("latin-1"))
    found = Signature(tags.get("d", ""), tags.get("s", ""))
    return Signature(found.domain, found.selector, _broken(fields, signature, tags, body, text_of))


def _broken(
    fields: list[tuple[bytes, bytes]], signature: tuple[bytes, bytes], tags: Mapping[str, str], body: bytes, text_of: Callable[[str], str | None]
) -> str:
    if (tags.get("v"), tags.get("a"), tags.get("c")) != ("1", "rsa-sha256", "relaxed/relaxed") or "l" in tags:
        return "it is not of the kind that is made here (rsa-sha256, relaxed/relaxed, no l=)"
    names = tags.get("h", "").lower().split(":")
    if _MUST not in names:
        return "it does not cover From"
    text = text_of(f"{tags.get('s')}._domainkey.{tags.get('d')}")
    if text is None:
        return f"the DNS has no key {tags.get('s')} of {tags.get('d')}"
    try:
        key = load_der_public_key(b64decode(_tags(text).get("p", "")))
        body_hash, made = b64decode(tags.get("bh", "")), b64decode(tags.get("b", ""))
    except ValueError:
        return "key or signature cannot be read"
    if not isinstance(key, RSAPublicKey):
        return "the key in the DNS is no RSA key"
    if sha256(relaxed_body(body)).digest() != body_hash:
        return "the body was changed on its way"
    try:
        key.verify(made, _signed(fields, signature, names), PKCS1v15(), SHA256())
    except InvalidSignature:
        return "the header was changed on its way, or the key in the DNS is another one"
    return ""


def _signed(fields: list[tuple[bytes, bytes]], signature: tuple[bytes, bytes], names: list[str]) -> bytes:
    """What the key has signed (§3.7): each name of h= stands for the lowest field of that name that is left."""
    left = list(fields)
    octets = b""
    for name in names:
        for number in range(len(left) - 1, -1, -1):
            if left[number][0].lower() == name.encode("latin-1"):
                octets += _relaxed(*left.pop(number)) + b"\r\n"
                break
    return octets + _relaxed(signature[0], _SIGNATURE.sub(rb"\1", signature[1]))


def _relaxed(name: bytes, value: bytes) -> bytes:
    return name.lower() + b":" + _SPACES.sub(b" ", value.replace(b"\r\n", b"")).strip(b" \t")


def relaxed_body(body: bytes) -> bytes:
    """Any body in relaxed form (§3.4.4); `canonical` has the short way for those that are composed here."""
    lines = _LAST_LINES.sub(b"", _ENDS.sub(b"", _SPACES.sub(b" ", body + b"\r\n")))
    return lines + b"\r\n" if lines else b""


def _tags(text: str) -> dict[str, str]:
    """A list of `tag=value;` (§3.2) without white space."""
    pairs = (part.partition("=") for part in text.split(";"))
    return {name.strip(): "".join(value.split()) for name, _, value in pairs if name.strip()}
