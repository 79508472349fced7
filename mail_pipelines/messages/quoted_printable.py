"""Quoted-printable (RFC 2045 §6.7) in segments that can be put together.

A segment ends in the middle of a line; the soft break `SOFT_BREAK` between two segments starts a new encoded line, so no line
exceeds 76 characters whatever is put side by side. Line ends are CRLF.
"""

from __future__ import annotations

import re
from binascii import b2a_qp

SOFT_BREAK = b"=\r\n"
# Text that stands for itself in HTML and in quoted-printable, and leaves room for the soft break: most names, numbers, dates.
# (A line of one dot is written =2E.)
_PLAIN = re.compile(r"(?!\.\Z)[A-Za-z0-9 ,.:;()/+@_-]{0,72}(?<! )")


def encode(text: str) -> bytes:
    """A whole body. `text` has ``\\n`` as its only line end (see `values.body_text`)."""
    return b2a_qp(text.encode()).replace(b"\n", b"\r\n")


def encode_segment(text: str) -> bytes:
    """As `encode`, with the last line short enough for a soft break after it (at most 75 characters)."""
    encoded = encode(text)
    if len(encoded) - (encoded.rfind(b"\n") + 1) < 76:
        return encoded
    # Do not part the three characters of an escape.
    cut = len(encoded) - (3 if encoded[-3:-2] == b"=" else 1)
    return encoded[:cut] + SOFT_BREAK + encoded[cut:]


def plain(text: str) -> bool:
    """Whether `text` is the same in HTML, in plain text and in quoted-printable, as one segment. Much faster than encoding it."""
    return _PLAIN.fullmatch(text) is not None
