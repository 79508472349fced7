"""One kept-open SMTP connection from a send session to its own server, and what each way a conversation can go means.

The reply decides only whether to go on; what became of a message is read from the journal. So an offer ends in one of:
a reply after the body, a refusal before it, or doubt (silence or a lost connection once the body was under way).
"""

from __future__ import annotations

import asyncio
import enum
import ssl
from dataclasses import dataclass
from typing import TYPE_CHECKING

import aiosmtplib

from mail_pipelines.dispatch.journal import Kind, Outcome

if TYPE_CHECKING:
    from mail_pipelines.messages.composing import Message


class Next(enum.Enum):
    """What the connection is good for after an offer."""

    GO_ON = "go on"
    RECONNECT = "reconnect"
    # The server does not take this claim's messages any more: its permit is gone or it is overloaded.
    STOP_CLAIM = "stop claim"


@dataclass(frozen=True)
class Offer:
    """How one conversation went. `reply` is set once the server has answered for the message; `doubt` if it may have been taken in silence."""

    next: Next
    reply: Outcome | None = None
    doubt: bool = False
    # The words of an explicit refusal, at whatever stage.
    refusal: str = ""
    # Why no message could be made for this recipient, so that nothing was offered.
    unusable: str = ""


class ServerUnreachable(Exception):
    """No connection to the mail server, or it did not greet as it should."""


class Connection:
    """A connection to the mail server at `host`:`port`; no reply and no message takes longer than `timeout` seconds."""

    def __init__(self, host: str, port: int, timeout: float) -> None:
        self._client = aiosmtplib.SMTP(hostname=host, port=port, timeout=timeout, start_tls=False, use_tls=False, local_hostname="localhost")
        self._timeout = timeout
        self._permit = ""
        # A refusal before the body leaves the transaction open (RFC 5321 §4.1.4); the next MAIL would be out of order.
        self._transaction_open = False

    async def open(self) -> None:
        try:
            await self._client.connect()
        except (TimeoutError, aiosmtplib.SMTPException, OSError, ssl.SSLError) as error:
            raise ServerUnreachable(f"{self._client.hostname}:{self._client.port}: {type(error).__name__}: {error}") from error

    async def greet(self, permit: str) -> None:
        """Name the claim whose messages follow. Raises `ServerUnreachable` if the server does not take the greeting."""
        if permit == self._permit:
            return
        try:
            response = await self._client.ehlo(hostname=permit)
        except (aiosmtplib.SMTPException, OSError) as error:
            raise ServerUnreachable(f"EHLO: {type(error).__name__}: {error}") from error
        if response.code != 250:
            raise ServerUnreachable(f"EHLO was answered {response.code} {response.message}")
        self._permit = permit
        self._transaction_open = False

    async def offer(self, message: Message) -> Offer:
        """MAIL, RCPT, DATA for one message, all within the time-out."""
        in_body = False
        try:
            async with asyncio.timeout(self._timeout):
                if self._transaction_open:
                    await self._client.rset()
                self._transaction_open = True
                await self._client.mail(message.envelope_sender)
                await self._client.rcpt(message.recipient)
                in_body = True
                response = await self._client.data(message.data)
                self._transaction_open = False
        except aiosmtplib.SMTPResponseException as error:
            return refused(error.code, error.message, in_body=in_body)
        except (TimeoutError, aiosmtplib.SMTPException, OSError):
            # Before the body nothing was offered; from its first byte on it may have been taken.
            return Offer(Next.RECONNECT, doubt=in_body)
        return Offer(Next.GO_ON, reply=outcome_of(response.code, response.message))

    async def close(self) -> None:
        """Say QUIT if the server still listens; never raises."""
        try:
            await asyncio.wait_for(self._client.quit(), 2)
        except (TimeoutError, aiosmtplib.SMTPException, OSError):
            self._client.close()


def refused(code: int, text: str, *, in_body: bool) -> Offer:
    """What an explicit 4xx or 5xx means for the connection and the claim.

    Before the body it is no reply for the message: either the journal has the destination's refusal, or nothing was offered.
    """
    if not 400 <= code <= 599:
        # No reply of SMTP at all: whatever talks there does not understand us.
        return Offer(Next.RECONNECT, doubt=in_body)
    if code == 421:
        following = Next.RECONNECT
    elif code in (451, 452) and text.startswith(("4.7.0", "4.3.1")):
        # Our own server's words for a withdrawn permit and a full disk: nothing more of this claim will pass.
        return Offer(Next.STOP_CLAIM)
    else:
        following = Next.GO_ON
    return Offer(following, reply=outcome_of(code, text) if in_body else None, refusal=f"{code} {text}")


def outcome_of(code: int, text: str) -> Outcome:
    """The outcome a final reply states, for the case that its journal line does not come."""
    enhanced, _, words = text.partition(" ")
    if enhanced.count(".") != 2 or not enhanced.replace(".", "").isdigit():
        enhanced, words = "", text
    if code == 450 and "Onward transmission not accepted" in text:
        kind = Kind.UNKNOWN
    else:
        kind = {2: Kind.DELIVERED, 4: Kind.DEFERRED, 5: Kind.BOUNCED}.get(code // 100, Kind.UNKNOWN)
    return Outcome(kind, code, enhanced or None, words)
