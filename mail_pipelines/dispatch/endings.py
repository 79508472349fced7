"""What each way an offer can go means: for the message, and for the connection and the claim. One table, which the tests walk through.

What belongs here: names and the table. What does not: the conversation itself (`smtp`), and the end of a row in the ledger, which is
read from the journal (`settlement`): a reply says only whether to go on, and how the message ended should its line not come.

Replies to MAIL and DATA are our own server's: it asks the destination about a message when it is told the recipient, and after the body.
Its own words about a withdrawn permit or a full disk name the permit, which no destination ever sees.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

from mail_pipelines.dispatch.replies import ONWARD_SILENCE, Reply


class Stage(enum.Enum):
    """What was sent last for the message. From `BODY` on it may be taken in silence."""

    MAIL = "MAIL"
    RCPT = "RCPT"
    DATA = "DATA"
    BODY = "body"


class Answer(enum.Enum):
    """What came back."""

    TAKEN = "taken"
    LATER = "4xx"
    # The server ends the connection (421).
    CLOSING = "closing"
    REFUSED = "5xx"
    # Our own server names our permit: it has been withdrawn, or nothing can be written any more.
    FENCED = "fenced"
    # Our own server handed the body on and got no answer.
    ONWARD_SILENCE = "onward silence"
    # No reply of SMTP, or one that has no place here.
    NONSENSE = "nonsense"
    LOST = "connection lost"
    SILENT = "no reply in time"


class Ending(enum.Enum):
    """What became of the message, as far as the conversation tells."""

    DELIVERED = "delivered"
    REFUSED = "refused"
    DEFERRED = "deferred"
    # It may have been taken.
    UNKNOWN = "unknown"
    # It was not: nothing of it can arrive from this offer.
    NOT_ATTEMPTED = "not attempted"


class Next(enum.Enum):
    """What the connection is good for after an offer."""

    GO_ON = "go on"
    RECONNECT = "reconnect"
    # The server does not take this claim's messages any more: its permit is gone or it is overloaded.
    STOP_CLAIM = "stop claim"


class Meaning(NamedTuple):
    ending: Ending
    next: Next


_NOTHING_MORE = Meaning(Ending.NOT_ATTEMPTED, Next.STOP_CLAIM)
_BROKEN_BEFORE = Meaning(Ending.NOT_ATTEMPTED, Next.RECONNECT)
_BROKEN_AFTER = Meaning(Ending.UNKNOWN, Next.RECONNECT)

# A stage that is `TAKEN` before the body leads to the next one.
MEANINGS: Mapping[tuple[Stage, Answer], Meaning] = MappingProxyType(
    {
        (Stage.MAIL, Answer.LATER): _NOTHING_MORE,
        (Stage.MAIL, Answer.CLOSING): _BROKEN_BEFORE,
        (Stage.MAIL, Answer.REFUSED): Meaning(Ending.NOT_ATTEMPTED, Next.GO_ON),
        (Stage.MAIL, Answer.FENCED): _NOTHING_MORE,
        (Stage.MAIL, Answer.NONSENSE): _BROKEN_BEFORE,
        (Stage.MAIL, Answer.LOST): _BROKEN_BEFORE,
        (Stage.MAIL, Answer.SILENT): _BROKEN_BEFORE,
        (Stage.RCPT, Answer.LATER): Meaning(Ending.DEFERRED, Next.GO_ON),
        (Stage.RCPT, Answer.CLOSING): Meaning(Ending.DEFERRED, Next.RECONNECT),
        (Stage.RCPT, Answer.REFUSED): Meaning(Ending.REFUSED, Next.GO_ON),
        (Stage.RCPT, Answer.FENCED): _NOTHING_MORE,
        (Stage.RCPT, Answer.NONSENSE): _BROKEN_BEFORE,
        (Stage.RCPT, Answer.LOST): _BROKEN_BEFORE,
        (Stage.RCPT, Answer.SILENT): _BROKEN_BEFORE,
        (Stage.DATA, Answer.LATER): _NOTHING_MORE,
        (Stage.DATA, Answer.CLOSING): _BROKEN_BEFORE,
        (Stage.DATA, Answer.REFUSED): Meaning(Ending.NOT_ATTEMPTED, Next.GO_ON),
        (Stage.DATA, Answer.FENCED): _NOTHING_MORE,
        (Stage.DATA, Answer.NONSENSE): _BROKEN_BEFORE,
        (Stage.DATA, Answer.LOST): _BROKEN_BEFORE,
        (Stage.DATA, Answer.SILENT): _BROKEN_BEFORE,
        (Stage.BODY, Answer.TAKEN): Meaning(Ending.DELIVERED, Next.GO_ON),
        (Stage.BODY, Answer.LATER): Meaning(Ending.DEFERRED, Next.GO_ON),
        # What Exim says, too, when it cannot write that the destination has taken the message.
        (Stage.BODY, Answer.CLOSING): _BROKEN_AFTER,
        (Stage.BODY, Answer.REFUSED): Meaning(Ending.REFUSED, Next.GO_ON),
        (Stage.BODY, Answer.FENCED): _NOTHING_MORE,
        (Stage.BODY, Answer.ONWARD_SILENCE): Meaning(Ending.UNKNOWN, Next.GO_ON),
        (Stage.BODY, Answer.NONSENSE): _BROKEN_AFTER,
        (Stage.BODY, Answer.LOST): _BROKEN_AFTER,
        (Stage.BODY, Answer.SILENT): _BROKEN_AFTER,
    }
)


def answer_of(stage: Stage, reply: Reply, permit: str) -> Answer:
    """Which answer a reply is at this stage, for a sender that greeted with `permit`."""
    code = reply.code
    if stage is Stage.DATA:
        if code == 354:
            return Answer.TAKEN
    elif 200 <= code <= 299:
        return Answer.TAKEN
    if code < 400:
        return Answer.NONSENSE
    if permit and permit in reply.text:
        return Answer.FENCED
    if code == 421:
        return Answer.CLOSING
    if code >= 500:
        return Answer.REFUSED
    if stage is Stage.BODY and code == 450 and ONWARD_SILENCE in reply.text:
        return Answer.ONWARD_SILENCE
    return Answer.LATER
