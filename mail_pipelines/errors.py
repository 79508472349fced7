"""The root of the project's exception tree.

Each package derives its own errors from `MailPipelinesError`. A message says what was given, what was expected
and what to do next; commands print it without a traceback.
"""

import difflib
from collections.abc import Iterable

_SHOWN = 20


class MailPipelinesError(Exception):
    """A mistake or condition the user can act on."""


def nearest(name: object, known: Iterable[str]) -> str:
    """How an error about an unknown name ends: `did you mean 'x'?`, or the known names if none is near."""
    names = sorted(known)
    if close := difflib.get_close_matches(str(name), names, n=1, cutoff=0.5):
        return f"did you mean {close[0]!r}?"
    shown = ", ".join(names[:_SHOWN]) + (" …" if len(names) > _SHOWN else "")
    return f"known: {shown}" if names else "none is known yet"
