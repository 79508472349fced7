"""How a catcher words its journal: `<UTC time> MARK|INTENT|DONE …`, one line each, ASCII."""

from __future__ import annotations

import datetime as dt
import re

from mail_pipelines.dispatch.journal import Entry, Kind, Outcome, Torn

# The beginning of a line, of which any part may be missing: `JournalWriter` ends it before the next one.
_BEGINNING = re.compile(rb"[\d:. -]{1,24}|\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{3} (?:MARK|INTENT|DONE|M|MA|MAR|I|IN|INT|INTE|INTEN|D|DO|DON)(?: [ -~]*)?")


def _stamp() -> str:
    return dt.datetime.now(dt.UTC).strftime("%Y-%m-%d %H:%M:%S.%f")[:-3]


def mark(permit: str) -> bytes:
    return f"{_stamp()} MARK {permit}".encode("ascii", "replace")


def intent(token: str, pid: int) -> bytes:
    return f"{_stamp()} INTENT {token} {pid}".encode("ascii", "replace")


def done(token: str, outcome: Outcome) -> bytes:
    text = outcome.text.replace("\n", " ").replace("\r", " ")
    return f"{_stamp()} DONE {token} {outcome.kind} {outcome.code or '-'} {outcome.enhanced or '-'} {text}".encode("ascii", "replace")


def parse(line: bytes) -> Entry | None:
    """The entry of a line; None for an empty one; `Torn` for the beginning of one, another `ValueError` for what is no line of a catcher."""
    if not line:
        return None
    try:
        return _entry(line.decode("ascii").split(" ", 7))
    except ValueError:
        if _BEGINNING.fullmatch(line):
            raise Torn(f"the beginning of a journal line: {line[:80]!r}") from None
        raise ValueError(f"not a journal line: {line[:80]!r}") from None


def _entry(words: list[str]) -> Entry:
    match words[2:]:
        case ["MARK", permit]:
            return Entry(mark=permit)
        case ["INTENT", token, pid]:
            return Entry(token, intent_pid=int(pid))
        case ["DONE", token, kind, code, enhanced, *text]:
            reply = None if code == "-" else int(code)
            return Entry(token, outcome=Outcome(Kind(kind), reply, None if enhanced == "-" else enhanced, " ".join(text)))
    raise ValueError
