"""SMTP replies (RFC 5321 §4.2): read from a stream of bytes, and read as the outcome of a message.

What belongs here: the form of replies. What does not: what a reply means at a stage of a conversation (`endings`).
"""

from __future__ import annotations

from typing import NamedTuple

from mail_pipelines.dispatch.journal import Kind, Outcome

# RFC 5321 §4.5.3.1.5 allows 512 octets; what Exim quotes of a destination may be longer.
MAX_LINE_OCTETS = 8192
MAX_REPLY_OCTETS = 32768
ONWARD_SILENCE = "Onward transmission not accepted"


class BadReply(ValueError):
    """What came is no reply of SMTP; nothing after it on this connection can be trusted."""


class Reply(NamedTuple):
    """`text` is without codes and hyphens; the lines of a longer reply are joined by line feeds."""

    code: int
    text: str

    def __str__(self) -> str:
        return f"{self.code} {self.text}"


class ReplyReader:
    """Takes bytes as they come and gives whole replies. `bad` is set, and stays, once something else has come."""

    def __init__(self) -> None:
        self.bad: BadReply | None = None
        self._rest = b""
        self._lines: list[str] = []
        self._code = 0
        self._octets = 0

    def feed(self, data: bytes) -> list[Reply]:
        """The replies that these bytes complete, in order, up to the first that is none or too long."""
        replies: list[Reply] = []
        if self.bad is not None:
            return replies
        *lines, self._rest = (self._rest + data).split(b"\n")
        try:
            for line in lines:
                if (reply := self._take(line)) is not None:
                    replies.append(reply)
            if len(self._rest) > MAX_LINE_OCTETS:
                raise BadReply(f"a line of more than {MAX_LINE_OCTETS} octets")
        except BadReply as error:
            self.bad = error
        return replies

    def _take(self, line: bytes) -> Reply | None:
        code, mark = line[:3], line[3:4]
        if len(line) > MAX_LINE_OCTETS:
            raise BadReply(f"a line of more than {MAX_LINE_OCTETS} octets")
        if not (len(code) == 3 and code.isdigit() and code[:1] in b"2345" and mark in (b" ", b"-", b"\r", b"")):
            raise BadReply(f"not a reply: {line[:40]!r}")
        number = int(code)
        if self._lines and number != self._code:
            raise BadReply(f"a reply of several lines with the codes {self._code} and {number}")
        self._octets += len(line)
        if self._octets > MAX_REPLY_OCTETS:
            raise BadReply(f"a reply of more than {MAX_REPLY_OCTETS} octets")
        words = line[4:].removesuffix(b"\r").decode("utf-8", "replace")
        if mark == b"-":
            self._code = number
            self._lines.append(words)
            return None
        if self._lines:
            words = "\n".join([*self._lines, words])
            self._lines.clear()
        self._octets = 0
        return Reply(number, words)


def outcome_of(code: int, text: str) -> Outcome:
    """The outcome a final reply states, for the case that its journal line does not come."""
    enhanced, _, words = text.partition(" ")
    if enhanced.count(".") != 2 or not enhanced.replace(".", "").isdigit():
        enhanced, words = "", text
    if code == 450 and ONWARD_SILENCE in text:
        kind = Kind.UNKNOWN
    else:
        kind = {2: Kind.DELIVERED, 4: Kind.DEFERRED, 5: Kind.BOUNCED}.get(code // 100, Kind.UNKNOWN)
    return Outcome(kind, code, enhanced or None, words)
