"""The ways to an operator: mail through a relay outside the fleet, and a webhook.

What belongs here: handing one message over, within seconds, or saying in one line why not, without a secret. What does not: what is told (`telling`).
"""

from __future__ import annotations

import asyncio
import json
import urllib.error
import urllib.request
from dataclasses import dataclass
from email.message import EmailMessage
from email.utils import formatdate, make_msgid
from typing import Protocol
from urllib.parse import urlsplit

import aiosmtplib

from mail_pipelines.config import AlertSettings
from mail_pipelines.errors import MailPipelinesError

SECONDS = 15.0
_TLS_PORT = 465


class ChannelError(MailPipelinesError):
    """A message was not taken; it is offered again."""


class Channel(Protocol):
    """One way. `name` is what the memory knows it by."""

    @property
    def name(self) -> str: ...

    def send(self, subject: str, text: str) -> None:
        """Hand over one message. Raises `ChannelError`."""


def channels_of(settings: AlertSettings) -> list[Channel]:
    """Those that are configured. Raises `ChannelError` for one that lacks something."""
    found: list[Channel] = []
    if settings.relay_host:
        if not (settings.from_address and settings.to):
            raise ChannelError("alerts.relay_host is set: give alerts.from_address and alerts.to, too")
        found.append(Mail(settings))
    if settings.webhook_url:
        found.append(Webhook(settings.webhook_url))
    return found


@dataclass(frozen=True, repr=False)
class Mail:
    """By SMTP: with STARTTLS where the relay offers it, and always where there is a login; TLS from the start on port 465."""

    settings: AlertSettings
    name = "mail"

    def send(self, subject: str, text: str) -> None:
        given = self.settings
        message = EmailMessage()
        message["From"], message["To"], message["Subject"] = given.from_address, ", ".join(given.to), subject
        message["Date"], message["Message-ID"] = formatdate(), make_msgid(domain=given.from_address.rpartition("@")[2])
        # Nobody's robot answers it (RFC 3834).
        message["Auto-Submitted"] = "auto-generated"
        message.set_content(text)
        client = aiosmtplib.SMTP(
            hostname=given.relay_host,
            port=given.relay_port,
            username=given.user or None,
            password=(given.password or "") if given.user else None,
            use_tls=given.relay_port == _TLS_PORT,
            # None: where it is offered.
            start_tls=True if given.user and given.relay_port != _TLS_PORT else None,
            timeout=SECONDS,
        )
        try:
            refused = asyncio.run(self._send(client, message))
        except (OSError, aiosmtplib.SMTPException, ValueError) as error:
            said = f"{type(error).__name__}: {error}".replace("\n", " ")[:300]
            raise ChannelError(f"the relay {given.relay_host}:{given.relay_port} (alerts.relay_host) did not take a message: {said}") from None
        if refused:
            raise ChannelError(f"the relay {given.relay_host}:{given.relay_port} refuses {', '.join(refused)} (alerts.to)")

    async def _send(self, client: aiosmtplib.SMTP, message: EmailMessage) -> dict[str, aiosmtplib.SMTPResponse]:
        """The recipients that were refused while others were taken."""
        async with client:
            refused, _ = await client.send_message(message, sender=self.settings.from_address, recipients=self.settings.to)
        return refused


@dataclass(frozen=True, repr=False)
class Webhook:
    """By HTTP POST of `{"text": …}`, as Slack, Mattermost and others take it."""

    url: str
    name = "webhook"

    def send(self, subject: str, text: str) -> None:
        # The URL is a password.
        try:
            parts = urlsplit(self.url)
        except ValueError:
            raise ChannelError("alerts.webhook_url is no URL") from None
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ChannelError("alerts.webhook_url is no http or https URL")
        host = parts.hostname
        body = json.dumps({"text": f"{subject}\n{text}"}, ensure_ascii=False).encode()
        request = urllib.request.Request(self.url, body, {"Content-Type": "application/json; charset=utf-8"}, method="POST")
        try:
            with urllib.request.urlopen(request, timeout=SECONDS) as answer:
                answer.read(1000)
        except urllib.error.HTTPError as error:
            error.close()
            raise ChannelError(f"the webhook at {host} (alerts.webhook_url) answered {error.code}") from None
        except (OSError, ValueError) as error:
            reason = getattr(error, "reason", error)
            raise ChannelError(
                f"the webhook at {host} (alerts.webhook_url) does not answer: {getattr(reason, 'strerror', None) or type(reason).__name__}"
            ) from None
