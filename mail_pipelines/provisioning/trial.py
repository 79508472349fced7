"""A signed message of no campaign, from a server to where this installation takes its bounces: the whole way that mail goes, in one piece.

What belongs here: making and sending it on the server's host, and finding it where it arrived. Its token names no recipient: audits and readers of inbound
mail leave it alone. What does not: the verdict (`host_checks`, `dns_checks`).
"""

from __future__ import annotations

import asyncio
import datetime as dt
import hashlib
import random
import re
import time
from collections.abc import Iterator
from contextlib import suppress
from email.utils import format_datetime
from pathlib import Path

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from mail_pipelines.config import Settings
from mail_pipelines.database.models import SendingDomain
from mail_pipelines.dispatch import permit
from mail_pipelines.dispatch.endings import Ending
from mail_pipelines.dispatch.files import ServerFolders
from mail_pipelines.dispatch.servers import ServerInfo
from mail_pipelines.dispatch.smtp import Connection as SmtpConnection
from mail_pipelines.dispatch.smtp import ServerUnreachable
from mail_pipelines.domains.signing import SendingAs, sending_as
from mail_pipelines.errors import MailPipelinesError
from mail_pipelines.inbound.folders import InboundFolders
from mail_pipelines.inbound.maildir import DONE
from mail_pipelines.messages.composing import Message
from mail_pipelines.messages.keyring import KeyRing
from mail_pipelines.messages.tokens import TEST_CAMPAIGN, DeliveryToken, TokenError, sign_delivery

_SECONDS = 90.0
_TOKEN = re.compile(rb"(?im)^(?:Message-ID|To): *<?(?:b\+)?([a-z2-7]{48})@")
_HEAD_OCTETS = 16_384
_POLL_SECONDS = 0.2


class TrialError(MailPipelinesError):
    """The test message could not be made or handed over, or was refused."""


def compose(domain: str, sending: SendingAs, server: ServerInfo, token_key: bytes, now: dt.datetime) -> Message:
    """A new message to the return-path domain itself, signed as every mail of `domain` from this server is."""
    number = server.id << 32 | random.SystemRandom().getrandbits(32)
    token = sign_delivery(DeliveryToken(TEST_CAMPAIGN, number, 0), token_key)
    address = f"b+{token}@{sending.return_path_domain}"
    header = (
        f"From: postmaster@{domain}\r\nTo: {address}\r\nSubject: Test of server {server.key}\r\nDate: {format_datetime(now)}\r\n"
        f"Message-ID: <{token}@{sending.return_path_domain}>\r\nMIME-Version: 1.0\r\nContent-Type: text/plain; charset=us-ascii\r\n"
    ).encode("ascii")
    body = b"Sent by mail-pipelines server verify.\r\n"
    signature = sending.signer.sign(sending.signer.prepare(header, hashlib.sha256(body).digest(), int(now.timestamp())))
    return Message(address, address, token, signature + header + b"\r\n" + body)


def domain_of(connection: Connection) -> str | None:
    """The sending domain that test messages are from: the first by name."""
    return connection.execute(sa.select(sa.func.min(SendingDomain.domain))).scalar_one()


def send(connection: Connection, settings: Settings, server: ServerInfo, now: dt.datetime) -> str:
    """Send one through a server of this host; returns its token. Raises `TrialError`, which says what was answered."""
    domain = domain_of(connection)
    sending = sending_as(connection, domain, server.id, settings.token_key()) if domain else None
    if domain is None or sending is None:
        raise TrialError("there is no sending domain whose key could sign it: `mail-pipelines domain add DOMAIN`")
    message = compose(domain, sending, server, settings.token_key(), now)
    # No claim of the ledger has this number: they are random, too.
    granted = permit.grant(ServerFolders.of(settings.server, server.key).permits, random.SystemRandom().getrandbits(62), seconds=_SECONDS)
    try:
        said = asyncio.run(_offer(server, granted.name, message))
    except ServerUnreachable as error:
        raise TrialError(f"the server took no message: {error}") from error
    finally:
        granted.release()
    if said:
        raise TrialError(f"to {sending.return_path_domain}: {said}")
    return message.token


async def _offer(server: ServerInfo, name: str, message: Message) -> str:
    """What was said instead of taking it; empty if it was taken."""
    connection = SmtpConnection(server.host, server.port, _SECONDS)
    await connection.open()
    try:
        await connection.greet(name)
        offer = await connection.offer(message)
    finally:
        await connection.close()
    return "" if offer.ending is Ending.DELIVERED else offer.refusal or f"{offer.ending.value}, without words"


def arrived(settings: Settings, keys: KeyRing, server_id: int, *, token: str | None, since: dt.datetime, wait_seconds: float) -> bytes | None:
    """The newest test message of a server that came to this host after `since` (that of `token`, if given), once there is one; None if none came in time."""
    end = time.monotonic() + wait_seconds
    while (found := _newest(settings, keys, server_id, token, since)) is None and time.monotonic() < end:
        time.sleep(_POLL_SECONDS)
    return found


def _newest(settings: Settings, keys: KeyRing, server_id: int, token: str | None, since: dt.datetime) -> bytes | None:
    for path in _files(InboundFolders.of(settings.inbound).mail / "bounces", since):
        with suppress(OSError):
            data = path.read_bytes()
            texts = {found.decode("ascii").lower() for found in _TOKEN.findall(data[:_HEAD_OCTETS])}
            if any((token is None or text == token) and _is_of(keys, text, server_id) for text in texts):
                return data.replace(b"\r\n", b"\n").replace(b"\n", b"\r\n")
    return None


def _files(maildir: Path, since: dt.datetime) -> Iterator[Path]:
    """Messages that have come, also those that were read already, the newest first."""
    dated = []
    for folder in ("new", "cur", DONE):
        with suppress(FileNotFoundError):
            for path in (maildir / folder).iterdir():
                with suppress(FileNotFoundError):
                    dated.append((path.stat().st_mtime, path))
    yield from (path for at, path in sorted(dated, reverse=True) if at >= since.timestamp())


def _is_of(keys: KeyRing, text: str, server_id: int) -> bool:
    try:
        token, _ = keys.read_delivery(text)
    except TokenError:
        return False
    return token.campaign_id == TEST_CAMPAIGN and token.contact_id >> 32 == server_id
