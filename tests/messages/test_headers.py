"""Headers come out of the standard library's parser as they were meant, and no value can start another header."""

from __future__ import annotations

import email
import email.policy
from email.header import decode_header, make_header
from email.message import EmailMessage
from email.utils import parseaddr

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from mail_pipelines.messages.headers import mailbox, unstructured
from mail_pipelines.messages.values import header_text

anything = st.text(max_size=300)


def parse(line: str) -> EmailMessage:
    message = email.message_from_bytes(f"{line}\r\n".encode("ascii"), policy=email.policy.default)
    assert isinstance(message, EmailMessage)
    return message


def assert_well_formed(line: str) -> None:
    lines = line.split("\r\n")
    assert lines.pop() == ""
    assert line.isascii()
    assert not any(control in text for text in lines for control in "\r\n\0")
    assert all(text.startswith(" ") and text.strip() for text in lines[1:])
    assert all(len(text) <= 78 for text in lines)


@given(anything)
@example("Größe 😀 " * 40)
@example("a" * 500)
@example("word " * 100)
@example("two  blanks   and    more " * 10)
@example("x" * 66 + "    y")
@example("News\r\nBcc: everyone@example.test\r\n\r\nbody")
@example("\ud800 lone")
def test_a_subject_is_read_as_it_was_written(text: str) -> None:
    assume("=?" not in text)
    line = unstructured("Subject", text)
    assert_well_formed(line)
    parsed = parse(line)
    assert parsed.keys() == ["Subject"]
    built = EmailMessage()
    built["Subject"] = header_text(text)
    assert parsed["Subject"] == built["Subject"]


def test_a_value_that_looks_like_an_encoded_word_stays_what_it_is() -> None:
    assert parse(unstructured("Subject", "=?utf-8?b?QmNjOiB4?=")).get("Subject") == "=?utf-8?b?QmNjOiB4?="


@given(anything)
@example('Jones, "Bob" \\ (Mr.)')
@example("Müller & Söhne")
@example("x" * 60)
@example("é" * 100)
@example("The Shop <fake@example.test>")
@example("=?utf-8?q?x?=")
def test_a_display_name_is_read_as_it_was_written(name: str) -> None:
    line = mailbox("From", name, "news@example.test")
    assert_well_formed(line)
    parsed = parse(line)
    assert parsed.keys() == ["From"]
    (address,) = parsed["From"].addresses
    assert address.addr_spec == "news@example.test"
    expected = " ".join(header_text(name).split())
    if len(expected.encode()) <= 42:
        assert address.display_name == expected
    else:
        # Python 3.11 reads blanks between the encoded words of a phrase (gh-92081); its older parser knows RFC 2047 §6.2.
        raw = email.message_from_bytes(line.encode(), policy=email.policy.compat32)["From"]
        assert str(make_header(decode_header(parseaddr(raw.replace("\r\n", ""))[0]))) == expected


@pytest.mark.parametrize(
    ("address", "expected"), [("News@Bücher.example", "News@xn--bcher-kva.example"), ("a@EXAMPLE.test", "a@example.test"), (" a@b.test ", "a@b.test")]
)
def test_the_domain_of_a_mailbox_is_in_a_labels(address: str, expected: str) -> None:
    assert parse(mailbox("Reply-To", "", address))["Reply-To"] == expected
