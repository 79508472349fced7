"""How a catcher words its journal: `<UTC time> MARK|INTENT|DONE …`, one line each, ASCII. INTENT and DONE name the permit, or `-`."""

from __future__ import annotations

import datetime as dt
import re

from mail_pipelines.dispatch.journal import Entry, Kind, Outcome, Torn

_PERMIT = re.compile(r"c\d+\.\d+")
# The beginning of a line, of which any part may be missing: `JournalWriter` ends it before the next one.
_BEGINNING = re.compile(rb"[\d:. -]{1,24}|\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{3} (?:MARK|INTENT|DONE|M|MA|MAR|I|IN|INT|INTE|INTEN|D|DO|DON)(?: [ -~]*)?")


def _stamp() -> str:
    return dt.datetime.now(dt.UTC).strftime("%Y-%m-%d %H:%M:%S.%f")[:-3]


def mark(permit: str) -> bytes:
    return f"{_stamp()} MARK {permit}".encode("ascii", "replace")


def intent(token: str, pid: int, permit: str = "") -> bytes:
    return f"{_stamp()} INTENT {token} {pid} {_named(permit)}".encode("ascii", "replace")


def done(token: str, outcome: Outcome, permit: str = "") -> bytes:
    text = outcome.text.replace("\n", " ").replace("\r", " ")
    return f"{_stamp()} DONE {token} {_named(permit)} {outcome.kind} {outcome.code or '-'} {outcome.enhanced or '-'} {text}".encode("ascii", "replace")


def _named(permit: str) -> str:
    """A permit's name; what greets with another name has none."""
    return permit if _PERMIT.fullmatch(permit) else "-"


def parse(line: bytes) -> Entry | None:
    """The entry of a line; None for an empty one; `Torn` for the beginning of one, another `ValueError` for what is no line of a catcher."""
    if not line:
        return None
    try:
        return _entry(line.decode("ascii").split(" ", 8))
    except ValueError:
        if _BEGINNING.fullmatch(line):
            raise Torn(f"the beginning of a journal line: {line[:80]!r}") from None
        raise ValueError(f"not a journal line: {line[:80]!r}") from None


def _entry(words: list[str]) -> Entry:
    match words[2:]:
        case ["MARK", permit]:
            return Entry(mark=permit)
        case ["INTENT", token, pid, permit]:
            return Entry(token, intent_pid=int(pid), permit=permit.strip("-"))
        case ["DONE", token, permit, kind, code, enhanced, *text]:
            reply = None if code == "-" else int(code)
            outcome = Outcome(Kind(kind), reply, None if enhanced == "-" else enhanced, " ".join(text))
            return Entry(token, outcome=outcome, permit=permit.strip("-"))
    raise ValueError
