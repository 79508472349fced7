"""Keys: the short names by which campaigns, segments, lists, fields and servers are known in commands, files and Dagster partitions.

What belongs here: what a key may look like and how one is made of a free name.
What does not: whether a key is taken.
"""

from __future__ import annotations

import re
import unicodedata

from mail_pipelines.errors import MailPipelinesError

MAX_LENGTH = 64
_KEY = re.compile(r"[a-z0-9][a-z0-9-]*")


class InvalidKey(MailPipelinesError):
    """A name that is no key and cannot be made one."""


def check_key(key: str, what: str = "key") -> str:
    """`key` itself if it is one: 1 to 64 of a-z, 0-9 and hyphen, not a hyphen first (commands would take it for an option). Raises `InvalidKey`."""
    if len(key) <= MAX_LENGTH and _KEY.fullmatch(key):
        return key
    try:
        suggestion = f"; {slug(key)!r} would be one"
    except InvalidKey:
        suggestion = ""
    raise InvalidKey(f"{key!r} is no valid {what}: use 1 to {MAX_LENGTH} of a-z, 0-9 and hyphen, beginning with a letter or digit{suggestion}")


def slug(name: str, what: str = "key") -> str:
    """The key of a free name: accents dropped, lower case, every other run of characters a hyphen, cut at 64 characters.

    Raises `InvalidKey` if no letter or digit of ASCII is left.
    """
    plain = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode().lower()
    key = re.sub(r"[^a-z0-9]+", "-", plain)[: MAX_LENGTH + 1].strip("-")[:MAX_LENGTH].rstrip("-")
    if not key:
        raise InvalidKey(f"no {what} can be made of the name {name!r}: it needs at least one letter a-z or digit")
    return key
