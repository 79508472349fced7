"""Whose keys tokens are accepted under: the installation's token key, and the one of each dispatch server that is derived from it.

What belongs here: deriving a server's key, and reading a token under any of several keys, which tells whose it is. What does not: the tokens
themselves (`tokens`), which servers there are (`dispatch.token_keys`), and what the word of a server is worth (`delivery.evidence`).

A server has its own key in the place of the installation's, and uses it as that. Nothing leads from it to the installation's key or to another
server's, so that whoever steals the server speaks for that server alone.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import TypeVar

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from mail_pipelines.messages import tokens
from mail_pipelines.messages.tokens import DeliveryToken, LinkToken, TokenError

# The owner of the installation's key; others are ids of servers.
CENTRE = 0
_INFO = b"mail-pipelines: token key of dispatch server "
_OCTETS = 32
_Token = TypeVar("_Token", DeliveryToken, LinkToken)


def derive(token_key: bytes, server: str) -> bytes:
    """The token key of a server by its name, as its file holds it: 64 hexadecimal digits (HKDF-SHA256, RFC 5869)."""
    return HKDF(algorithm=hashes.SHA256(), length=_OCTETS, salt=None, info=_INFO + server.encode("ascii")).derive(token_key).hex().encode()


class KeyRing:
    """The keys that tokens are accepted under. A wrong token costs one hash for each key that has the byte it names: hardly ever more than one or two."""

    def __init__(self, keys: Iterable[tuple[int, bytes]]) -> None:
        """`keys`: each with its owner."""
        self._by_id: defaultdict[int, list[tuple[int, bytes]]] = defaultdict(list)
        for owner, key in keys:
            self._by_id[tokens.key_id(key)].append((owner, key))

    @classmethod
    def of(cls, token_key: bytes, servers: Mapping[int, str]) -> KeyRing:
        """The key of an installation, and those of its `servers` (id → name)."""
        return cls([(CENTRE, token_key), *((number, derive(token_key, name)) for number, name in servers.items())])

    def read_delivery(self, text: str) -> tuple[DeliveryToken, int]:
        """A delivery token, and whose key it is under. Raises `TokenError`."""
        return self._read(text, tokens.delivery_key_id(text), tokens.read_delivery)

    def read_link(self, text: str) -> tuple[LinkToken, int]:
        """A link token, and whose key it is under. Raises `TokenError`."""
        return self._read(text, tokens.link_key_id(text), tokens.read_link)

    def _read(self, text: str, key_id: int, read: Callable[[str, bytes], _Token]) -> tuple[_Token, int]:
        for owner, key in self._by_id.get(key_id, ()):
            try:
                return read(text, key), owner
            except TokenError:
                continue
        raise TokenError(f"the token was signed with no key that is accepted here: it names key {key_id}")
