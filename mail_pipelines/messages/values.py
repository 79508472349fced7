"""What the value of a contact's field becomes in a message: as text, through filters, without characters that do harm.

What belongs here: functions on single values, used both by byte skeletons and by the template sandbox, so that a template
means the same in either. What does not: templates and MIME.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, Final

_WORD_START = re.compile(r"([-\s({\[<]+)")
# Line ends as the standard library's MIME code sees them; U+0085 and U+2028 are ordinary characters to it.
_LINE_END = re.compile(r"\r\n?")
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")
_HEADER_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]+")
_SURROGATE = re.compile(r"[\ud800-\udfff]")


def text_of(value: Any) -> str:
    """A value as readers see it: nothing for null, `true` and `false`, whole numbers without a decimal point, else `str`."""
    if isinstance(value, str):
        return value
    if value is None:
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value)


def _default(value: Any, fallback: Any = "", _boolean: bool = True) -> Any:
    """`fallback` for null and for empty text. Jinja's own `default` has a third argument, accepted and without effect: empty text always counts."""
    return fallback if value is None or value == "" else value


def _title(value: Any) -> str:
    return "".join(word[:1].upper() + word[1:].lower() for word in _WORD_START.split(text_of(value)))


# All filters there are. `escape` changes nothing: the HTML part escapes every value and no other part needs it; it is known because
# templates of other systems use it.
FILTERS: Final[Mapping[str, Callable[..., Any]]] = {
    "default": _default,
    "upper": lambda value: text_of(value).upper(),
    "lower": lambda value: text_of(value).lower(),
    "title": _title,
    "trim": lambda value: text_of(value).strip(),
    "escape": text_of,
}


def body_text(value: str) -> str:
    """Text for a MIME part: line ends become ``\\n``, control characters besides tab vanish, lone surrogates become U+FFFD."""
    if value.isprintable():
        return value
    return _SURROGATE.sub("\ufffd", _CONTROL.sub("", _LINE_END.sub("\n", value)))


def header_text(value: str) -> str:
    """Text for a header: each run of controls (CR and LF first of all) becomes one space, blanks at both ends vanish."""
    if not value.isprintable():
        value = _SURROGATE.sub("\ufffd", _HEADER_CONTROL.sub(" ", value))
    return value.strip()
