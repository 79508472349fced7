"""How a catcher words its journal: `<UTC time> MARK|INTENT|DONE …`, one line each, ASCII."""

from __future__ import annotations

import datetime as dt

from mail_pipelines.dispatch.journal import Entry, Kind, Outcome


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
    """The entry of a line; None for an empty one; `ValueError` for anything else that is no line of a catcher."""
    if not line:
        return None
    words = line.decode("ascii").split(" ", 7)
    match words[2:]:
        case ["MARK", permit]:
            return Entry(mark=permit)
        case ["INTENT", token, pid]:
            return Entry(token, intent_pid=int(pid))
        case ["DONE", token, kind, code, enhanced, *text]:
            reply = None if code == "-" else int(code)
            return Entry(token, outcome=Outcome(Kind(kind), reply, None if enhanced == "-" else enhanced, " ".join(text)))
    raise ValueError(f"not a journal line: {line[:80]!r}")
