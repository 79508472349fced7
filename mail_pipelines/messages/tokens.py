"""Signed tokens in return paths, Message-IDs and links.

What belongs here: how a token is packed, signed, written and read. What does not: the addresses and URLs it is put
into (`composing`), and what is done with one that comes back.

Two forms, both with a key id byte, which says under which of several keys a token is (`keyring` has those that are accepted):

- *delivery token*: campaign, contact and attempt in lower-case base32, for places that relays may change to upper case
  (the local part of a return path). 30 bytes, 48 characters: ``campaign u32 · contact u64 · attempt u8 · key id u8 · hash 16``.
- *link token*: campaign, contact, link and kind in URL-safe base64. 36 bytes, 48 characters:
  ``campaign u32 · contact u64 · link u64 · kind u8 · key id u8 · hash 14``.

The hash is BLAKE2b keyed by the token key, with a different personalisation for each form. Both lengths are multiples of
the encodings' groups: there is no padding, and one token has one spelling (besides the letter case of base32).
"""

from __future__ import annotations

import base64
import enum
import functools
import hmac
import re
import struct
from binascii import b2a_base64
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b

from mail_pipelines.errors import MailPipelinesError

# No campaign has this id: the message is a server's test (`provisioning.trial`), and says nothing of a recipient.
TEST_CAMPAIGN = 0
_DELIVERY = struct.Struct(">IQBB")
_DELIVERY_HASH_SIZE = 16
_DELIVERY_TEXT = re.compile(r"[a-z2-7]{48}", re.IGNORECASE | re.ASCII)
_LINK = struct.Struct(">IQQBB")
_LINK_OWNER = struct.Struct(">IQ")
_LINK_REST = struct.Struct(">QBB")
_LINK_HASH_SIZE = 14
_LINK_TEXT = re.compile(r"[A-Za-z0-9_-]{48}")
_TEXT_LENGTH = 48
_URL_SAFE = bytes.maketrans(b"+/", b"-_")


class TokenError(MailPipelinesError):
    """A token is not ours: wrong form, other key, or changed on its way."""


@dataclass(frozen=True)
class DeliveryToken:
    """One offer of one message. `campaign_id` < 2**32, `contact_id` < 2**64, `attempt` < 256, none negative."""

    campaign_id: int
    contact_id: int
    attempt: int


class LinkKind(enum.IntEnum):
    CLICK = 1
    UNSUBSCRIBE = 2


@dataclass(frozen=True)
class LinkToken:
    """One recipient's copy of a link. `link_id` < 2**64 is the id of table `links`, 0 for an unsubscribe link."""

    campaign_id: int
    contact_id: int
    link_id: int
    kind: LinkKind


@dataclass(frozen=True)
class _KeyedHash:
    """A hash with the key already taken in (copying it is cheaper than keying again), and the byte that names the key."""

    start: blake2b
    key_id: int

    def sign(self, packed: bytes) -> bytes:
        keyed = self.start.copy()
        keyed.update(packed)
        return packed + keyed.digest()


@functools.lru_cache(maxsize=64)
def _keyed_hash(key: bytes, purpose: bytes, size: int) -> _KeyedHash:
    if not key:
        raise TokenError("the token key is empty; expected the key that `mail-pipelines init` makes")
    # BLAKE2b takes keys of at most 64 bytes; a configured key may be longer.
    fixed = blake2b(key, person=b"token key").digest()
    return _KeyedHash(blake2b(key=fixed, digest_size=size, person=purpose), blake2b(key, digest_size=1, person=b"token key id").digest()[0])


def key_id(key: bytes) -> int:
    """The byte by which tokens name this key; several keys may have the same. Raises `TokenError` if the key is empty."""
    return _delivery_hash(key).key_id


def fingerprint(key: bytes) -> str:
    """By which two hosts can tell whether they have the same key: 16 hexadecimal digits, which say as much of the key as any token does."""
    return blake2b(key, digest_size=8, person=b"token key name").hexdigest()


def _delivery_hash(key: bytes) -> _KeyedHash:
    return _keyed_hash(key, b"delivery", _DELIVERY_HASH_SIZE)


def _link_hash(key: bytes) -> _KeyedHash:
    return _keyed_hash(key, b"link", _LINK_HASH_SIZE)


def sign_delivery(token: DeliveryToken, key: bytes) -> str:
    """The token as 48 characters of lower-case base32. Raises `TokenError` if a number does not fit or the key is empty."""
    keyed = _delivery_hash(key)
    try:
        return _base32(keyed.sign(_DELIVERY.pack(token.campaign_id, token.contact_id, token.attempt, keyed.key_id)))
    except struct.error as error:
        raise TokenError(f"{token} cannot be packed: {error}; ids must be positive, the attempt at most 255") from error


def read_delivery(text: str, key: bytes) -> DeliveryToken:
    """What `sign_delivery` wrote, in either letter case. Raises `TokenError`."""
    packed = _checked(_signed_delivery(text), _DELIVERY.size, _delivery_hash(key))
    campaign_id, contact_id, attempt, _ = _DELIVERY.unpack(packed)
    return DeliveryToken(campaign_id, contact_id, attempt)


def delivery_key_id(text: str) -> int:
    """The byte by which a delivery token names its key, whoever has written it there. Raises `TokenError`."""
    return _signed_delivery(text)[_DELIVERY.size - 1]


def _signed_delivery(text: str) -> bytes:
    if not _DELIVERY_TEXT.fullmatch(text):
        raise TokenError(f"not a delivery token: expected 48 characters of base32, got {len(text)} characters")
    return _from_base32(text)


def sign_link(token: LinkToken, key: bytes) -> str:
    """The token as 48 characters of URL-safe base64. Raises `TokenError` if a number does not fit or the key is empty."""
    return sign_links(token.campaign_id, token.contact_id, (token.link_id,), token.kind, key)[0]


def sign_links(campaign_id: int, contact_id: int, link_ids: Sequence[int], kind: LinkKind, key: bytes) -> list[str]:
    """The tokens of all links of one recipient, in the order of `link_ids`. Raises `TokenError` as `sign_link` does."""
    keyed = _link_hash(key)
    signed: list[bytes] = []
    try:
        owner = _LINK_OWNER.pack(campaign_id, contact_id)
        hashed_owner = keyed.start.copy()
        hashed_owner.update(owner)
        for link_id in link_ids:
            rest = _LINK_REST.pack(link_id, kind, keyed.key_id)
            hashed = hashed_owner.copy()
            hashed.update(rest)
            signed += (owner, rest, hashed.digest())
    except struct.error as error:
        raise TokenError(f"links {list(link_ids)} of campaign {campaign_id}, contact {contact_id} cannot be packed: {error}; ids must be positive") from error
    # A token is a whole number of base64 groups, so all can be encoded as one.
    text = b2a_base64(b"".join(signed), newline=False).translate(_URL_SAFE).decode()
    return [text[begin : begin + _TEXT_LENGTH] for begin in range(0, len(text), _TEXT_LENGTH)]


def read_link(text: str, key: bytes) -> LinkToken:
    """What `sign_link` wrote. Raises `TokenError`."""
    packed = _checked(_signed_link(text), _LINK.size, _link_hash(key))
    campaign_id, contact_id, link_id, kind, _ = _LINK.unpack(packed)
    try:
        return LinkToken(campaign_id, contact_id, link_id, LinkKind(kind))
    except ValueError as error:
        raise TokenError(f"link token of unknown kind {kind}: it was made by a newer version") from error


def link_key_id(text: str) -> int:
    """The byte by which a link token names its key, whoever has written it there. Raises `TokenError`."""
    return _signed_link(text)[_LINK.size - 1]


def _signed_link(text: str) -> bytes:
    if not _LINK_TEXT.fullmatch(text):
        raise TokenError(f"not a link token: expected 48 characters of URL-safe base64, got {len(text)} characters")
    return base64.urlsafe_b64decode(text)


def _checked(signed: bytes, size: int, keyed: _KeyedHash) -> bytes:
    """The packed part of `signed`, whose last byte is the key id. Raises `TokenError` if it was signed otherwise."""
    packed = signed[:size]
    if not hmac.compare_digest(keyed.sign(packed), signed):
        reason = "its hash is wrong" if packed[-1] == keyed.key_id else f"it names key {packed[-1]}, this is key {keyed.key_id}"
        raise TokenError(f"the token was not signed with this key: {reason}")
    return packed


def _mask(width: int, stride: int) -> int:
    """The low `width` bits of each `stride` bits, over the 384 bits of a spread token."""
    return sum(((1 << width) - 1) << offset for offset in range(0, 384, stride))


# `base64.b32encode` takes 4 µs for 30 bytes, a third of all other work for one message. Here the 240 bits are spread as one
# integer: into three lanes of 128 bits with 80 used, then each lane is halved until 48 lanes of 8 bits hold 5 bits each.
_LOW_80 = (1 << 80) - 1
_HALVINGS = tuple((_mask(half, stride), _mask(half, stride) << half, stride // 2 - half) for half, stride in ((40, 128), (20, 64), (10, 32), (5, 16)))
_LETTERS = b"abcdefghijklmnopqrstuvwxyz234567"
_ALPHABET = _LETTERS.ljust(256, b"\0")
_DIGITS = bytes.maketrans(_LETTERS, b"0123456789abcdefghijklmnopqrstuv")


def _base32(signed: bytes) -> str:
    """30 bytes as 48 characters of lower-case base32."""
    bits = int.from_bytes(signed, "big")
    bits = bits & _LOW_80 | (bits >> 80 & _LOW_80) << 128 | (bits >> 160) << 256
    for low, high, distance in _HALVINGS:
        bits = bits & low | (bits & high) << distance
    return bits.to_bytes(48, "big").translate(_ALPHABET).decode()


def _from_base32(text: str) -> bytes:
    """48 characters of base32 in either letter case as 30 bytes: as one number, a sixth of the time of `base64.b32decode`."""
    return int(text.lower().encode().translate(_DIGITS), 32).to_bytes(30, "big")
