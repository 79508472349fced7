"""Our judgement of a signature is dkimpy's, whatever was done to the message."""

from __future__ import annotations

import random

import pytest

from mail_pipelines.domains.keys import generate, public_text
from mail_pipelines.messages.composing import compose
from mail_pipelines.messages.verifying import Signature, relaxed_body, verify
from tests.messages.test_composing import message_of, recipient
from tests.messages.test_dkim import SIGNING, key, verdict


def text_of(name: str) -> str | None:
    return f"v=DKIM1; k=rsa; p={public_text(key())}" if name == "mp1._domainkey.example.test" else None


def signed() -> bytes:
    return compose(message_of("Hello  {{ city }}", "a  b\n\n", "<p>{{ city }}</p>\n"), recipient(city="Łódź"), SIGNING()).data


def test_what_was_signed_holds_also_below_the_fields_of_relays() -> None:
    whole = Signature("example.test", "mp1")
    assert verify(signed(), text_of) == whole
    assert verify(b"Received: from a\r\n\tby b; now\r\nReturn-path: <x@y.test>\r\n" + signed(), text_of) == whole


def test_it_agrees_with_dkimpy_about_every_change() -> None:
    draw, data = random.Random(1), signed()
    places = [place for place in draw.sample(range(len(data)), 60) if data[place] not in b"\r\n"]
    changed = [data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :] for place in places]
    changed += [data + b"\r\n\r\n", data + b"x\r\n", data.replace(b"To: ", b"To:   "), data.replace(b"From: ", b"From: x\r\nFrom: ", 1)]
    ours = [(found := verify(one, text_of)) is not None and not found.broken for one in changed]
    assert ours == [verdict(one) for one in changed]
    assert True in ours
    assert False in ours


@pytest.mark.parametrize(
    ("old", "new", "why"),
    [
        (b"The Shop", b"The Ship", "header was changed"),
        (b"<p>", b"<b>", "body was changed"),
        (b"a=rsa-sha256", b"a=rsa-sha1", "not of the kind"),
        (b"s=mp1", b"s=mp2", "the DNS has no key mp2"),
        (b"From:From", b"X-From:X-From", "does not cover From"),
    ],
)
def test_why_a_signature_does_not_hold_is_said(old: bytes, new: bytes, why: str) -> None:
    data = signed()
    assert old in data
    found = verify(data.replace(old, new), text_of)
    assert found is not None
    assert why in found.broken


def test_another_key_or_none_is_said() -> None:
    other = verify(signed(), lambda name: f"v=DKIM1; p={public_text(generate())}")
    assert other is not None
    assert "the key in the DNS is another one" in other.broken
    for text, why in (("v=DKIM1; p=", "cannot be read"), ("v=DKIM1; p=AAAA", "cannot be read")):
        found = verify(signed(), lambda name, text=text: text)
        assert found is not None
        assert why in found.broken
    assert verify(b"From: x\r\n\r\nHello\r\n", text_of) is None


@pytest.mark.parametrize(
    ("body", "relaxed"), [(b"", b""), (b"\r\n\r\n", b""), (b"a \t b \r\n \r\n", b"a b\r\n"), (b"a", b"a\r\n"), (b"\r\na\r\n", b"\r\na\r\n")]
)
def test_any_body_has_its_relaxed_form(body: bytes, relaxed: bytes) -> None:
    assert relaxed_body(body) == relaxed
