"""Signatures hold for whatever is composed, by the judgement of dkimpy, and break with every change that means anything."""

from __future__ import annotations

import dataclasses
import datetime as dt
import email
import functools
import hashlib
import re
from collections.abc import Iterator
from typing import Any

import dkim
import pytest
from cryptography.hazmat.primitives.asymmetric import rsa
from dkim.canonicalization import Relaxed
from hypothesis import example, given

from mail_pipelines.domains.keys import generate, public_text
from mail_pipelines.messages.canonical import relaxed_body, relaxed_header
from mail_pipelines.messages.compilation import compile_content
from mail_pipelines.messages.composing import compose
from mail_pipelines.messages.content import Content
from mail_pipelines.messages.dkim import Signer
from tests.messages.test_composing import END, FIELDS, SENDER, message_of, parse, recipient, subjects, templates, values_of


@functools.cache
def key() -> rsa.RSAPrivateKey:
    return generate()


SIGNER = functools.cache(lambda: Signer("example.test", "mp1", key()))
# dkimpy, rightly, does not take signatures from the future.
SIGNING = functools.cache(lambda: dataclasses.replace(SENDER, date=dt.datetime(2025, 3, 2, 9, 0, tzinfo=dt.UTC), signer=SIGNER()))


def published(name: bytes, timeout: float = 5) -> bytes | None:
    return f"v=DKIM1; k=rsa; p={public_text(key())}".encode() if name == b"mp1._domainkey.example.test." else None


def verifies(data: bytes) -> bool:
    return bool(dkim.verify(data, dnsfunc=published))


@pytest.mark.slow
@given(subjects, templates, templates, values_of)
@example("a  b \t c", "a  b\t\tc  \n \n", "<pre>\n  a \t b  </pre>  \n\n\n", {})
@example("{{ city }}", "{{ city }}", "{{ city }}{{ city }}", {"city": "a  b\t\tc "})
@example("{{ city }}", "{{ city }}", "{{ city }}", {"city": "\t"})
@example("{{ city }}", " {{ city }} ", " {{ city }} ", {"city": ""})
@example("{% if city %}a  b{% endif %}", "{% if city %}\t a  b{% endif %}", "{% if city %} \t a  b{% endif %}", {"city": "x"})
@example("{{ city }}", "x", "x", {"city": "long words  " * 30})
@example("{{ city }}", "x", "x", {"city": "Łódź  " * 30})
@example("", "", "", {})
def test_whatever_is_composed_verifies(subject: str, text: str, html: str, values: dict[str, Any]) -> None:
    compiled = message_of(subject, f"{text}\n", f"{html}\n")
    signed = compose(compiled, recipient(**values), SIGNING()).data
    assert verifies(signed)
    plain = compose(compiled, recipient(**values), dataclasses.replace(SIGNING(), signer=None)).data
    field, rest = signed[: -len(plain)], signed[-len(plain) :]
    assert rest == plain
    assert field.endswith(b"\r\n")
    assert field.count(b"DKIM-Signature:") == 1
    assert max(map(len, field.split(b"\r\n"))) <= 78
    header, _, body = plain.partition(b"\r\n\r\n")
    assert hashlib.sha256(Relaxed.canonicalize_body(body)).digest() == hashlib.sha256(relaxed_body(body)).digest()
    pairs = [(name, value) for name, value in dkim.rfc822_parse(plain)[0]]
    assert relaxed_header(header + b"\r\n")[1] == b"".join(name + b":" + value for name, value in Relaxed.canonicalize_headers(pairs))


def test_a_compiled_content_verifies_with_links_and_an_answering_address() -> None:
    body = f'<style>p {{color:  red}}</style><p>Hi  {{{{ first_name }}}}, <a href="https://shop.test/a?b=1&amp;c=2">see</a></p>{END}'
    content = Content("Hi {{ first_name }}", "news@example.test", body, from_name="Läden,  Söhne", reply_to="answers@example.test", preheader="Now")
    compiled = compile_content(content, FIELDS, lambda urls: range(1, len(urls) + 1))
    data = compose(compiled, recipient(first_name="Ada"), SIGNING()).data
    assert verifies(data)
    assert compiled.from_domain == content.from_domain == "example.test"
    assert _tags(data)["h"].count("Reply-To") == 2


def _message() -> bytes:
    compiled = message_of("Hello {{ city }}", "Dear {{ first_name }}\n{{ unsubscribe_url }}\n", "<p>Dear {{ first_name }}</p>{{ unsubscribe_url }}\n")
    return compose(compiled, recipient(first_name="Ada", city="Rome"), SIGNING()).data


def _tags(data: bytes) -> dict[str, str]:
    field = parse_field(data)
    return {name.strip(): re.sub(r"\s", "", value) for name, _, value in (tag.partition("=") for tag in field.split(";"))}


def parse_field(data: bytes) -> str:
    field = re.match(rb"DKIM-Signature: ((?:.*\r\n)(?:[ ].*\r\n)*)", data)
    assert field is not None
    return field[1].decode()


def test_the_signature_says_what_it_covers() -> None:
    data = _message()
    tags = _tags(data)
    assert {name: tags[name] for name in ("v", "a", "c", "d", "s", "t")} == {
        "v": "1", "a": "rsa-sha256", "c": "relaxed/relaxed", "d": "example.test", "s": "mp1", "t": "1740906000",
    }  # fmt: skip
    signed = tags["h"].split(":")
    # Each twice, so that no second one can be put in; absent ones once, for the same reason.
    for name in (
        "From", "To", "Subject", "Date", "Message-ID", "List-Unsubscribe", "List-Unsubscribe-Post", "Feedback-ID", "MIME-Version", "Content-Type",
    ):  # fmt: skip
        assert signed.count(name) == 2
    for name in ("Reply-To", "Cc", "Content-Transfer-Encoding"):
        assert signed.count(name) == 1
    assert {name for name, _ in email_items(data)} - {"DKIM-Signature"} <= set(signed)
    assert len(tags["b"]) == 344


def email_items(data: bytes) -> list[tuple[str, str]]:
    return email.message_from_bytes(data).items()


def _changes(data: bytes) -> Iterator[tuple[str, bytes]]:
    """Every octet after the signature changed and every one left out, unless relaxed canonicalisation makes the two the same.

    Not the CR of line ends: dkimpy reads a bare LF as a line end too.
    """
    begin = data.index(b"From: ")
    for place in (place for place in range(begin, len(data)) if data[place] != 0x0D):
        around = data[max(0, place - 1) : place + 2]
        yield f"changed at {place} {around!r}", data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]
        if not (data[place : place + 1] == b" " and (around.startswith((b": ", b"\n ")) or b"\r" in around)):
            yield f"left out at {place} {around!r}", data[:place] + data[place + 1 :]


def verdict(data: bytes) -> bool:
    """What is no message any more does not verify either."""
    try:
        return verifies(data)
    except dkim.DKIMException:
        return False


@pytest.mark.slow
def test_every_change_of_an_octet_breaks_the_signature() -> None:
    data = _message()
    assert verifies(data)
    changes = list(_changes(data))
    assert len(changes) > 1_800
    unnoticed = [what for what, changed in changes if verdict(changed)]
    assert unnoticed == []


def test_no_field_can_be_added_taken_away_or_doubled() -> None:
    data = _message()
    begin = data.index(b"From: ")
    signature, header, body = data[:begin], data[begin : data.index(b"\r\n\r\n") + 2], data[data.index(b"\r\n\r\n") + 2 :]
    fields = re.findall(rb"[^ \r\n].*\r\n(?: .*\r\n)*", header)
    assert b"".join(fields) == header
    for field in fields:
        name = field.partition(b":")[0]
        other = name + b": other\r\n"
        assert not verdict(signature + header.replace(field, b"") + body), name
        assert not verdict(signature + header.replace(field, other) + body), name
        for added in (field, other):
            assert not verdict(signature + added + header + body), name
            assert not verdict(signature + header + added + body), name
    for absent in (b"Reply-To", b"Cc", b"Content-Transfer-Encoding"):
        assert not verdict(signature + header + absent + b": evil@example.test\r\n" + body), absent
    assert not verdict(data + b"more\r\n")
    assert not verdict(data[: data.index(b"</p>")])


def test_the_signatures_own_tags_cannot_be_changed() -> None:
    data = _message()
    for old, new in ((b" t=1740906000", b" t=1740906001"), (b"h=From:From:", b"h=From:"), (b"; d=example.test", b"; d=example.tesu"), (b" s=mp1", b" s=mp2")):
        assert old in data
        assert not verdict(data.replace(old, new, 1))
    tags = _tags(data)
    assert not verdict(data.replace(tags["bh"].encode(), hashlib.sha256(b"").hexdigest()[:43].encode() + b"=", 1))


def test_what_mail_servers_do_to_white_space_does_no_harm() -> None:
    data = _message()
    changed = data.replace(b"Subject: Hello Rome", b"SUBJECT:  Hello\r\n\tRome ")
    assert changed != data
    assert verifies(changed + b"\r\n\r\n")
    assert verifies(b"Received: from there by here\r\n" + changed)


def test_the_same_message_is_signed_alike_and_another_key_does_not_verify() -> None:
    assert _message() == _message()
    other = dataclasses.replace(SIGNING(), signer=Signer("example.test", "mp1", generate()))
    assert not verifies(compose(message_of("Hi", "x\n", "x\n"), recipient(), other).data)
    assert parse(compose(message_of("Hi", "x\n", "x\n"), recipient(), other))["Subject"] == "Hi"
