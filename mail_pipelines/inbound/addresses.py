"""The addresses that mail comes back to, and the delivery tokens in them and in what is quoted of our messages.

`b+TOKEN` is the return path, `u+TOKEN` the address in List-Unsubscribe (`messages.composing` makes both), and a Message-ID is
`TOKEN@…`. Only a token that verifies is proof of anything; the domain behind it is not looked at.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Iterator

from mail_pipelines.messages.tokens import DeliveryToken, TokenError, read_delivery

_LOCAL_PART = re.compile(r"([bu])\+([a-z2-7]{48})", re.IGNORECASE | re.ASCII)
_TOKEN = re.compile(rb"(?<![a-z0-9])(?:([bu])\+)?([a-z2-7]{48})@", re.IGNORECASE)
# So many different candidates are tried in one message: hostile mail must not buy much time with little text.
_CANDIDATES = 50


class Purpose(enum.StrEnum):
    BOUNCE = "b"
    UNSUBSCRIBE = "u"


def read_local_part(local_part: str, key: bytes) -> tuple[Purpose, DeliveryToken]:
    """What an address of ours is for, and its token. Raises `TokenError` for any other."""
    form = _LOCAL_PART.fullmatch(local_part)
    if form is None:
        raise TokenError("not an address of ours: expected b+ or u+ and a delivery token")
    return Purpose(form[1].lower()), read_delivery(form[2], key)


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
