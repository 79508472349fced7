"""Tokens come back as they went out, and nobody without the key can make one."""

from __future__ import annotations

import base64
import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mail_pipelines.messages import tokens
from mail_pipelines.messages.tokens import DeliveryToken, LinkKind, LinkToken, TokenError, read_delivery, read_link, sign_delivery, sign_link, sign_links

KEY = b"a key of the tests"
deliveries = st.builds(DeliveryToken, campaign_id=st.integers(0, 2**32 - 1), contact_id=st.integers(0, 2**64 - 1), attempt=st.integers(0, 255))
links = st.builds(
    LinkToken,
    campaign_id=st.integers(0, 2**32 - 1),
    contact_id=st.integers(0, 2**64 - 1),
    link_id=st.integers(0, 2**64 - 1),
    kind=st.sampled_from(LinkKind),
)


@given(deliveries, st.binary(min_size=1, max_size=200))
def test_a_delivery_token_names_campaign_contact_and_attempt(token: DeliveryToken, key: bytes) -> None:
    text = sign_delivery(token, key)
    assert read_delivery(text, key) == token
    assert len(text) <= 50
    assert set(text) <= set(string.ascii_lowercase + "234567")


@given(deliveries)
def test_a_delivery_token_survives_relays_that_change_letter_case(token: DeliveryToken) -> None:
    text = sign_delivery(token, KEY)
    assert read_delivery(text.upper(), KEY) == token
    assert read_delivery(text.title(), KEY) == token


@given(st.binary(min_size=30, max_size=30))
def test_our_base32_is_the_standard_one(data: bytes) -> None:
    assert tokens._base32(data) == base64.b32encode(data).decode().lower()


@given(links)
def test_a_link_token_names_its_link_and_fits_into_a_url(token: LinkToken) -> None:
    text = sign_link(token, KEY)
    assert read_link(text, KEY) == token
    assert set(text) <= set(string.ascii_letters + string.digits + "-_")


def test_the_links_of_one_recipient_are_signed_as_one_by_one() -> None:
    together = sign_links(7, 8, [1, 2, 3], LinkKind.CLICK, KEY)
    assert together == [sign_link(LinkToken(7, 8, link_id, LinkKind.CLICK), KEY) for link_id in (1, 2, 3)]


@given(deliveries, st.integers(0, 47), st.sampled_from(string.ascii_lowercase + "234567"))
def test_a_changed_delivery_token_is_refused(token: DeliveryToken, position: int, character: str) -> None:
    text = sign_delivery(token, KEY)
    changed = text[:position] + character + text[position + 1 :]
    if changed != text:
        with pytest.raises(TokenError):
            read_delivery(changed, KEY)


@given(links, st.integers(0, 47), st.sampled_from(string.ascii_letters + string.digits + "-_"))
def test_a_changed_link_token_is_refused(token: LinkToken, position: int, character: str) -> None:
    text = sign_link(token, KEY)
    changed = text[:position] + character + text[position + 1 :]
    if changed != text:
        with pytest.raises(TokenError):
            read_link(changed, KEY)


@given(st.text(max_size=60))
def test_foreign_text_is_refused(text: str) -> None:
    with pytest.raises(TokenError):
        read_delivery(text, KEY)
    with pytest.raises(TokenError):
        read_link(text, KEY)


@pytest.mark.parametrize("text", ["\u017f" * 48, "\u212a" * 48, "a" * 47, "a" * 49, "a" * 48 + "\n", "=" * 48])
def test_letters_that_only_look_like_base32_are_refused(text: str) -> None:
    with pytest.raises(TokenError, match="expected 48 characters of base32"):
        read_delivery(text, KEY)


def test_another_key_is_named_as_the_reason() -> None:
    text = sign_delivery(DeliveryToken(1, 2, 0), KEY)
    with pytest.raises(TokenError, match="it names key"):
        read_delivery(text, b"another key")


def test_a_token_of_one_form_is_no_token_of_the_other() -> None:
    with pytest.raises(TokenError, match="not signed"):
        read_link(sign_delivery(DeliveryToken(1, 2, 0), KEY), KEY)


@pytest.mark.parametrize("token", [DeliveryToken(2**32, 1, 0), DeliveryToken(1, -1, 0), DeliveryToken(1, 1, 256)])
def test_numbers_that_do_not_fit_are_refused(token: DeliveryToken) -> None:
    with pytest.raises(TokenError, match="cannot be packed"):
        sign_delivery(token, KEY)


def test_link_ids_that_do_not_fit_are_refused() -> None:
    with pytest.raises(TokenError, match="cannot be packed"):
        sign_link(LinkToken(1, 2, -1, LinkKind.CLICK), KEY)


def test_an_empty_key_is_refused() -> None:
    with pytest.raises(TokenError, match="empty"):
        sign_delivery(DeliveryToken(1, 2, 0), b"")
