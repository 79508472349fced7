"""What a mail that came back says about one of our messages: RFC 3464 (delivery status), RFC 5965 (feedback report), other bounces, requests.

What belongs here: from the bytes of a mail to a piece of evidence. Which message it is about is told by a token that verifies, wherever
it stands, and never by an address. What does not: files (`maildir`) and what follows (`delivery.evidence`).
"""

from __future__ import annotations

import datetime as dt
import email
import enum
import logging
import re
from collections.abc import Iterator
from dataclasses import replace
from email.message import Message
from email.utils import getaddresses

from flufl.bounce import all_failures

from mail_pipelines.delivery.evidence import Evidence, Kind
from mail_pipelines.inbound.addresses import Purpose, candidates
from mail_pipelines.messages.keyring import KeyRing
from mail_pipelines.messages.tokens import TEST_CAMPAIGN, DeliveryToken, TokenError

# It logs each detector that stumbles over a mail, with a traceback, and goes on with the next.
logging.getLogger("flufl.bounce").setLevel(logging.CRITICAL)
# Status and headers come before the quoted body; what is behind this is not read, so that a mail costs the same however large it is.
READ_OCTETS = 256 * 1024
# For whom a mail came, from what is nearest to the truth: set by the receiving server, then by the sender.
_RECIPIENT_HEADERS = ("Envelope-to", "Delivered-To", "X-Original-To", "To", "Cc")
_QUOTED_PARTS = 20
_TEXT_LENGTH = 500
_ENHANCED = re.compile(r"(?<![\d.])([245]\.\d{1,3}\.\d{1,3})(?![\d.])", re.ASCII)
_REPLY = re.compile(r"(?<![\w.-])([245]\d\d)[ -](?=\S)", re.ASCII)
_REFUSED = re.compile(r"(?<![\w.-])(?:5\d\d[ -]|#?5\.\d{1,3}\.\d{1,3}).*", re.ASCII)
_SEVEN_BITS = bytes(range(128)) + b"?" * 128
# RFC 5965 §3.1 and its registry: reports of authentication failures say nothing of what a person wants.
_NO_COMPLAINTS = {"not-spam": "not_spam", "auth-failure": "authentication_failure"}
_OPT_OUTS = ("opt-out", "opt-out-list")


class Ignored(enum.StrEnum):
    """Why a mail proves nothing."""

    NO_TOKEN = "no_token"
    # Something that looks like one, and does not verify.
    FOREIGN_TOKEN = "foreign_token"
    DELAYED = "delayed"
    NOT_SPAM = "not_spam"
    AUTHENTICATION_FAILURE = "authentication_failure"
    # The test message of a server, or its bounce.
    TEST = "test"
    # An automatic answer, a question, anything.
    NO_REPORT = "no_report"


def read(data: bytes, keys: KeyRing, at: dt.datetime) -> Evidence | Ignored:
    """The evidence in a mail that came at `at`, or why there is none. For hostile bytes Python's parser may raise anything."""
    message = email.message_from_bytes(data[:READ_OCTETS])
    tried = False
    found = None
    for purpose, text, is_recipient in _places(message, data[:READ_OCTETS]):
        tried = True
        try:
            found = keys.read_delivery(text), purpose if is_recipient else None
            break
        except TokenError:
            continue
    if found is None:
        return Ignored.FOREIGN_TOKEN if tried else Ignored.NO_TOKEN
    (token, owner), purpose = found
    if token.campaign_id == TEST_CAMPAIGN:
        return Ignored.TEST
    said = _said(message, data[:READ_OCTETS], token, purpose, at)
    return replace(said, signed_by=owner) if isinstance(said, Evidence) else said


def _said(message: Message, data: bytes, token: DeliveryToken, purpose: Purpose | None, at: dt.datetime) -> Evidence | Ignored:
    """What a mail says about the message of this token, which it carries; `purpose` is that of the address it came to."""
    if purpose is Purpose.UNSUBSCRIBE:
        return _evidence(Kind.UNSUBSCRIBE, token, at)
    parts = list(_parts(message))
    feedback = next((part for part in parts if part.get_content_type() == "message/feedback-report"), None)
    if feedback is not None:
        return _feedback(feedback, token, at)
    status = next((part for part in parts if part.get_content_type() == "message/delivery-status"), None)
    return (None if status is None else _status(status, token, at)) or _other_bounce(data, parts, token, at)


def _evidence(kind: Kind, token: DeliveryToken, at: dt.datetime, words: str = "", status: str = "") -> Evidence:
    words = _clean(words)
    code = _REPLY.search(words)
    enhanced = _ENHANCED.search(words) or _ENHANCED.search(status)
    return Evidence(
        kind, token.campaign_id, token.contact_id, token.attempt, at, int(code[1]) if code else None, enhanced[1] if enhanced else None, words[:_TEXT_LENGTH]
    )


def _places(message: Message, data: bytes) -> Iterator[tuple[Purpose | None, str, bool]]:
    """What looks like a token, with whether it is in an address that the mail came to; what is decoded last."""
    to = "\n".join(str(value) for name in _RECIPIENT_HEADERS for value in message.get_all(name, []))
    for purpose, text in candidates(to.encode("utf-8", "replace")):
        yield purpose, text, True
    for purpose, text in candidates(data):
        yield purpose, text, False
    for part in _parts(message):
        if str(part.get("Content-Transfer-Encoding", "")).strip().lower() in ("base64", "quoted-printable"):
            payload = part.get_payload(decode=True)
            for purpose, text in candidates(payload) if isinstance(payload, bytes) else ():
                yield purpose, text, False


def _parts(message: Message) -> Iterator[Message]:
    """The parts of a mail without those of quoted messages: what those say was said by somebody else."""
    waiting = [message]
    for _ in range(_QUOTED_PARTS):
        if not waiting:
            return
        part = waiting.pop(0)
        yield part
        payload = part.get_payload()
        if part.get_content_maintype() == "multipart" and isinstance(payload, list):
            waiting += [child for child in payload if isinstance(child, Message)]


def _fields(part: Message) -> list[Message]:
    """The groups of fields in a part of machine-readable fields, whether the parser saw them as such or as text."""
    payload = part.get_payload()
    if isinstance(payload, list):
        return [group for group in payload if isinstance(group, Message)]
    decoded = part.get_payload(decode=True)
    text = decoded if isinstance(decoded, bytes) else b""
    return [email.message_from_bytes(group) for group in re.split(rb"(?:\r?\n){2,}", text.strip())]


def _feedback(part: Message, token: DeliveryToken, at: dt.datetime) -> Evidence | Ignored:
    kinds = [_clean(str(group["Feedback-Type"])).lower() for group in _fields(part) if group["Feedback-Type"] is not None]
    kind = kinds[0] if kinds else ""
    if kind in _NO_COMPLAINTS:
        return Ignored(_NO_COMPLAINTS[kind])
    # Types that are not known are to be taken for `other`, which is a complaint (RFC 5965 §3.1).
    return _evidence(Kind.UNSUBSCRIBE if kind in _OPT_OUTS else Kind.COMPLAINT, token, at)


def _status(part: Message, token: DeliveryToken, at: dt.datetime) -> Evidence | Ignored | None:
    """By the action of the recipient's group of fields; with several the worst. None if it names no action that is known."""
    found: dict[str, Message] = {}
    for group in _fields(part):
        action = _clean(str(group.get("Action", ""))).lower().partition(" ")[0]
        if action not in ("failed", "delayed", "delivered", "relayed", "expanded"):
            action = {"5": "failed", "4": "delayed", "2": "delivered"}.get(str(group.get("Status", "")).strip()[:1], "")
        if action:
            found.setdefault(action, group)
    if "failed" in found:
        group = found["failed"]
        kind, _, words = str(group.get("Diagnostic-Code", "")).partition(";")
        return _evidence(Kind.BOUNCE_REPORT, token, at, words or kind, str(group.get("Status", "")))
    if "delayed" in found:
        return Ignored.DELAYED
    return _evidence(Kind.DELIVERY_REPORT, token, at) if found else None


def _other_bounce(data: bytes, parts: list[Message], token: DeliveryToken, at: dt.datetime) -> Evidence | Ignored:
    """A bounce in a form of its own: flufl.bounce knows many, and the words are those of the first line that looks like a refusal."""
    temporary, permanent = all_failures(_plain(data))
    if not permanent:
        return Ignored.DELAYED if temporary else Ignored.NO_REPORT
    for part in parts:
        payload = part.get_payload(decode=True) if part.get_content_maintype() == "text" else None
        for line in (payload if isinstance(payload, bytes) else b"").decode("utf-8", "replace").splitlines():
            if (words := _REFUSED.search(line)) is not None:
                return _evidence(Kind.BOUNCE_REPORT, token, at, words[0])
    return _evidence(Kind.BOUNCE_REPORT, token, at)


def _plain(data: bytes) -> Message:
    """A mail as flufl.bounce can take it: some of its detectors fail on headers beyond ASCII, one without a From."""
    message = email.message_from_bytes(data.translate(_SEVEN_BITS))
    if not getaddresses([message.get("From", "")]):
        del message["From"]
        message["From"] = "nobody@invalid"
    return message


def _clean(text: str) -> str:
    """One line without controls and without what no database takes."""
    return " ".join(text.encode("utf-8", "replace").decode("utf-8").replace("\0", " ").split())
