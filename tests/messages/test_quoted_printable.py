"""Segments of quoted-printable put together decode to the texts put together, in short lines of 7 bits."""

from __future__ import annotations

import binascii
import html
import quopri

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from mail_pipelines.messages.quoted_printable import SOFT_BREAK, encode, encode_segment, plain

texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\r"), max_size=200)


@given(st.lists(texts, min_size=1, max_size=6))
@example(["x" * 76, "y"])
@example(["x" * 73 + "=", "y"])
@example(["x" * 74 + "ü", "y"])
@example(["a ", " b", "\t", "", ".", "\n.\n", "From me"])
def test_segments_can_be_joined(segments: list[str]) -> None:
    encoded = SOFT_BREAK.join(map(encode_segment, segments))
    expected = "".join(segments).encode().replace(b"\n", b"\r\n")
    assert binascii.a2b_qp(encoded) == expected
    assert quopri.decodestring(encoded) == expected
    assert all(len(line) <= 76 for line in encoded.split(b"\r\n"))
    assert encoded.isascii()
    assert b"\n" not in encoded.replace(b"\r\n", b"")
    assert not any(line.endswith((b" ", b"\t")) for line in encoded.split(b"\r\n"))


@given(texts)
def test_a_whole_body_decodes_to_itself(text: str) -> None:
    encoded = encode(text)
    assert quopri.decodestring(encoded).decode() == text.replace("\n", "\r\n")
    assert all(len(line) <= 76 for line in encoded.split(b"\r\n"))


@given(st.text(st.characters(max_codepoint=126), max_size=90))
@example("x" * 72)
@example("x" * 73)
@example("a ")
@example(".")
def test_plain_text_needs_no_encoding(text: str) -> None:
    if plain(text):
        assert encode_segment(text) == text.encode()
        assert html.escape(text) == text


@pytest.mark.parametrize(
    ("text", "expected"), [("Ada", True), ("New York, NY", True), ("a=b", False), ("a&b", False), ("ü", False), ("a\nb", False), ("a ", False)]
)
def test_which_texts_are_plain(text: str, expected: bool) -> None:
    assert plain(text) is expected
