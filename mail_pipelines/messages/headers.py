"""Header lines (RFC 5322 §2.2, RFC 2047): ASCII only, CRLF line ends, folded at 78 characters.

Values come from people: controls are taken out here, so that no value can begin a header of its own.
"""

from __future__ import annotations

import re
from binascii import b2a_base64

from mail_pipelines.contacts.addresses import normal_domain
from mail_pipelines.messages.values import header_text

_LINE_LENGTH = 78
# Octets of UTF-8 in one encoded word: 56 characters of base64 and 12 of frame fit beside the longest name, "Reply-To: ".
_WORD_OCTETS = 42
_ATOMS = re.compile(r"[A-Za-z0-9!#$%&'*+/=?^_`{|}~-]+(?: [A-Za-z0-9!#$%&'*+/=?^_`{|}~-]+)*")


def unstructured(name: str, value: str) -> str:
    """A header of free text such as Subject, with its final CRLF."""
    value = header_text(value)
    if value.isascii() and "=?" not in value:
        if len(name) + 2 + len(value) <= _LINE_LENGTH:
            return f"{name}: {value}\r\n"
        if all(len(word) < _LINE_LENGTH for word in value.split(" ")):
            return _fold(f"{name}: ", value)
    return f"{name}: {_encoded_words(value)}\r\n"


def mailbox(name: str, display_name: str, address: str) -> str:
    """A header of one mailbox such as From, with its final CRLF. `address` is one that `contacts.addresses.parse` takes."""
    local, _, domain = address.strip().rpartition("@")
    address = f"{local}@{normal_domain(domain)}"
    # In a phrase a run of blanks is one blank (RFC 5322 §3.2.2).
    display_name = " ".join(header_text(display_name).split())
    if not display_name:
        return f"{name}: {address}\r\n"
    phrase = _phrase(display_name)
    last_line = phrase.rpartition("\r\n")[2]
    separator = " " if len(f"{name}: {last_line} <{address}>") <= _LINE_LENGTH else "\r\n "
    return f"{name}: {phrase}{separator}<{address}>\r\n"


def _phrase(text: str) -> str:
    if not text.isascii() or "=?" in text or len(text) > 60:
        return _encoded_words(text)
    if _ATOMS.fullmatch(text):
        return text
    escaped = text.replace("\\", r"\\").replace('"', r"\"")
    return f'"{escaped}"'


def _encoded_words(text: str) -> str:
    octets = text.encode()
    words = []
    begin = 0
    while begin < len(octets):
        end = min(begin + _WORD_OCTETS, len(octets))
        # A character must not be divided (RFC 2047 §5): step back from octets 10xxxxxx, which continue one.
        while end < len(octets) and octets[end] & 0xC0 == 0x80:
            end -= 1
        words.append(f"=?utf-8?b?{b2a_base64(octets[begin:end], newline=False).decode()}?=")
        begin = end
    return "\r\n ".join(words)


def _fold(prefix: str, value: str) -> str:
    """Break before single spaces; a run of spaces stays together, for a line of blanks only would end the header for some readers."""
    lines = [prefix]
    for word in re.findall(r" *[^ ]+", value):
        if len(lines[-1]) + len(word) > _LINE_LENGTH and lines[-1] != prefix and word.startswith(" "):
            lines.append(word)
        else:
            lines[-1] += word
    return "\r\n".join(lines) + "\r\n"
