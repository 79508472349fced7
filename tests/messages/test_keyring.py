"""A server's key leads to no other, and a token under any accepted key is read and names whose it is."""

from __future__ import annotations

import hashlib
import hmac
import itertools
import random

import pytest

from mail_pipelines.messages import tokens
from mail_pipelines.messages.keyring import CENTRE, KeyRing, derive
from mail_pipelines.messages.tokens import DeliveryToken, LinkKind, LinkToken, TokenError, key_id, sign_delivery, sign_link

KEY = b"0f1e2d3c4b5a69788796a5b4c3d2e1f00f1e2d3c4b5a69788796a5b4c3d2e1f0"
DELIVERY = DeliveryToken(7, 12, 1)
LINK = LinkToken(7, 12, 3, LinkKind.UNSUBSCRIBE)
SERVERS = {number: f"mx{number}" for number in range(1, 301)}


def test_a_servers_key_is_hkdf_of_the_installations_by_the_servers_name() -> None:
    """RFC 5869 written out: extract with a salt of zeros, then the first block of expand."""
    extracted = hmac.digest(bytes(32), KEY, hashlib.sha256)
    expected = hmac.digest(extracted, b"mail-pipelines: token key of dispatch server mx1\x01", hashlib.sha256)
    assert derive(KEY, "mx1") == expected.hex().encode()
    assert len({KEY, *(derive(key, name) for key in (KEY, b"another") for name in SERVERS.values())}) == 601


def test_a_token_names_its_key_and_keeps_its_form_and_length() -> None:
    ring = KeyRing.of(KEY, SERVERS)
    for owner, key in ((CENTRE, KEY), *((number, derive(KEY, name)) for number, name in SERVERS.items())):
        delivery, link = sign_delivery(DELIVERY, key), sign_link(LINK, key)
        assert (len(delivery), len(link)) == (48, 48)
        assert tokens.delivery_key_id(delivery.upper()) == tokens.link_key_id(link) == key_id(key)
        assert ring.read_delivery(delivery) == ring.read_delivery(delivery.upper()) == (DELIVERY, owner)
        assert ring.read_link(link) == (LINK, owner)


def test_keys_that_share_their_byte_are_told_apart() -> None:
    by_id = sorted(((key_id(derive(KEY, name)), number) for number, name in SERVERS.items()))
    shared = [(one[1], other[1]) for one, other in itertools.pairwise(by_id) if one[0] == other[0]]
    assert shared
    ring = KeyRing.of(KEY, SERVERS)
    for number in itertools.chain(*shared):
        assert ring.read_delivery(sign_delivery(DELIVERY, derive(KEY, SERVERS[number]))) == (DELIVERY, number)


def test_a_token_under_no_accepted_key_is_refused() -> None:
    ring = KeyRing.of(KEY, SERVERS)
    for key in (b"another", derive(KEY, "mx301"), derive(derive(KEY, "mx1"), "mx1"), derive(derive(KEY, "mx1"), "mx2")):
        with pytest.raises(TokenError, match="with no key that is accepted here"):
            ring.read_delivery(sign_delivery(DELIVERY, key))
        with pytest.raises(TokenError, match="with no key that is accepted here"):
            ring.read_link(sign_link(LINK, key))
    with pytest.raises(TokenError, match="expected 48 characters of base32"):
        ring.read_delivery("x")
    with pytest.raises(TokenError, match="expected 48 characters of URL-safe base64"):
        ring.read_link("x")
    # Neither a server's ring nor the centre's reads for whom it has no key.
    with pytest.raises(TokenError):
        KeyRing([(1, derive(KEY, "mx1"))]).read_delivery(sign_delivery(DELIVERY, KEY))


def test_a_wrong_token_costs_only_the_keys_of_its_byte(monkeypatch: pytest.MonkeyPatch) -> None:
    ring = KeyRing.of(KEY, SERVERS)
    same_byte = [key_id(key) for key in (KEY, *(derive(KEY, name) for name in SERVERS.values()))]
    tried: list[bytes] = []
    read = tokens.read_delivery

    def counted(text: str, key: bytes) -> DeliveryToken:
        tried.append(key)
        return read(text, key)

    monkeypatch.setattr(tokens, "read_delivery", counted)
    draw = random.Random(5)
    for _ in range(500):
        text = "".join(draw.choices("abcdefghijklmnopqrstuvwxyz234567", k=48))
        tried.clear()
        with pytest.raises(TokenError):
            ring.read_delivery(text)
        assert len(tried) == same_byte.count(tokens.delivery_key_id(text)) <= 8
