"""The relaxed canonical forms of DKIM (RFC 6376 §3.4.2 and §3.4.4), for what this package composes.

What belongs here: the forms that are hashed. What does not: the signature (`dkim`).
"""

from __future__ import annotations

import re

_RUNS = re.compile(rb"[ \t]{2,}|\t")


def relaxed_body(quoted_printable: bytes) -> bytes:
    """A piece of a body, or a whole one, with every run of blanks made one space.

    Quoted-printable never ends a line with a blank, and a composed body ends with its last boundary; so nothing else of the form is left to do.
    """
    if b"  " in quoted_printable or b"\t" in quoted_printable:
        return _RUNS.sub(b" ", quoted_printable)
    return quoted_printable


def relaxed_header(header: bytes) -> tuple[tuple[bytes, ...], bytes]:
    """The names of the fields as they are written, and the fields in canonical form, each with its CRLF.

    `header` is whole fields with CRLF, without the empty line that ends a header.
    """
    parts = [line.partition(b":") for line in header.replace(b"\r\n ", b" ").replace(b"\r\n\t", b" ").split(b"\r\n")[:-1]]
    fields = [name.lower() + b":" + value.strip(b" \t") for name, _, value in parts]
    fields.append(b"")
    return tuple([name for name, _, _ in parts]), relaxed_body(b"\r\n".join(fields))
