"""The addresses that mail comes back to, and the delivery tokens in them and in what is quoted of our messages.

`b+TOKEN` is the return path, `u+TOKEN` the address in List-Unsubscribe (`messages.composing` makes both), and a Message-ID is
`TOKEN@…`. Only a token that verifies is proof of anything; the domain behind it is not looked at.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Iterator

_LOCAL_PART = re.compile(r"([bu])\+([a-z2-7]{48})", re.IGNORECASE | re.ASCII)
_TOKEN = re.compile(rb"(?<![a-z0-9])(?:([bu])\+)?([a-z2-7]{48})@", re.IGNORECASE)
# So many different candidates are tried in one message: hostile mail must not buy much time with little text.
_CANDIDATES = 50


class Purpose(enum.StrEnum):
    BOUNCE = "b"
    UNSUBSCRIBE = "u"


def token_of(local_part: str) -> str | None:
    """What stands where an address of ours has its token; None if it is no such address."""
    form = _LOCAL_PART.fullmatch(local_part)
    return form[2] if form is not None else None


def candidates(text: bytes) -> Iterator[tuple[Purpose | None, str]]:
    """What looks like a token before an @, in the order of the text, each once; with its purpose if it stands in such an address."""
    seen = set()
    for found in _TOKEN.finditer(text):
        purpose, token = found[1], found[2].decode().lower()
        candidate = (Purpose(purpose.decode().lower()) if purpose else None, token)
        if candidate not in seen:
            seen.add(candidate)
            yield candidate
            if len(seen) == _CANDIDATES:
                return
