"""An IMAP mailbox in place of a receiving server: its messages are brought into a maildir.

A message is first kept here, durably and under a name made of its number there, and then moved there to another folder. Who dies in
between finds it again and keeps it under the same name. It is never deleted.
"""

from __future__ import annotations

import contextlib
import imaplib
import ipaddress
import re
import ssl
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from mail_pipelines.config import InboundSettings
from mail_pipelines.errors import MailPipelinesError
from mail_pipelines.inbound import maildir
from mail_pipelines.inbound.reports import READ_OCTETS

# So many messages are fetched in one go; the rest waits for the next.
MESSAGES_AT_ONCE = 5_000
_TIMEOUT_SECONDS = 30.0
_UID = re.compile(rb"UID (\d+)")


class MailboxError(MailPipelinesError):
    """The IMAP mailbox cannot be polled; its messages stay there."""


@dataclass(frozen=True)
class Address:
    """Where a mailbox is. `encrypted`: TLS from the start, otherwise by STARTTLS (not asked for on the loopback)."""

    host: str
    port: int
    user: str
    folder: str
    encrypted: bool

    @classmethod
    def parse(cls, url: str) -> Address:
        """Of `imaps://USER@HOST[:PORT]/FOLDER`. Raises `MailboxError`; the message does not quote it, since a password may be in there."""
        try:
            parts = urlsplit(url)
            port = parts.port
        except ValueError as error:
            raise MailboxError(f"inbound.imap_url is no URL: {error}") from None
        if parts.scheme not in ("imap", "imaps") or not parts.hostname or not parts.username or parts.password is not None:
            raise MailboxError("inbound.imap_url is not imaps://USER@HOST/FOLDER (or imap://…); the password belongs into inbound.imap_password_file")
        encrypted = parts.scheme == "imaps"
        folder = unquote(parts.path.strip("/")) or "INBOX"
        return cls(parts.hostname, port or (993 if encrypted else 143), unquote(parts.username), folder, encrypted)

    @property
    def is_loopback(self) -> bool:
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"


def fetch(settings: InboundSettings, target: Path) -> int:
    """Bring what is in the mailbox into the maildir `target`; returns how many messages. Raises `MailboxError`."""
    address = Address.parse(settings.imap_url)
    try:
        with _connected(address, settings.imap_password or "") as client:
            return _fetch(client, address.folder, settings.imap_done, target)
    except (OSError, imaplib.IMAP4.error) as error:
        raise MailboxError(f"the mailbox at {address.host}:{address.port} cannot be polled: {error}; see inbound.imap_url and its password") from error


@contextlib.contextmanager
def _connected(address: Address, password: str) -> Iterator[imaplib.IMAP4]:
    context = ssl.create_default_context()
    client: imaplib.IMAP4
    if address.encrypted:
        client = imaplib.IMAP4_SSL(address.host, address.port, ssl_context=context, timeout=_TIMEOUT_SECONDS)
    else:
        client = imaplib.IMAP4(address.host, address.port, timeout=_TIMEOUT_SECONDS)
    try:
        if not address.encrypted and not address.is_loopback:
            client.starttls(context)
        client.login(address.user, password)
        yield client
    finally:
        with contextlib.suppress(OSError, imaplib.IMAP4.error):
            client.logout()


def _fetch(client: imaplib.IMAP4, folder: str, done: str, target: Path) -> int:
    if "MOVE" not in client.capabilities and "MOVE" not in _said(client.capability())[0].decode().split():
        raise MailboxError("the IMAP server cannot move messages (RFC 6851); have its mail delivered to `mail-pipelines inbound run` instead")
    # Fails if it is there already.
    client.create(_quoted(done))
    _said(client.select(_quoted(folder)))
    validity = _said(client.response("UIDVALIDITY"))[0].decode()
    uids = _said(client.uid("SEARCH", "ALL"))[0].split()[:MESSAGES_AT_ONCE]
    for uid in uids:
        data = _message(client, uid.decode())
        if data is not None:
            maildir.put(target, f"{validity}.{uid.decode()}.imap", data)
            _said(client.uid("MOVE", uid.decode(), _quoted(done)))
    return len(uids)


def _message(client: imaplib.IMAP4, uid: str) -> bytes | None:
    """The beginning of a message, as much as is ever read of one; None if somebody has taken it away since."""
    for item in _said(client.uid("FETCH", uid, f"(UID BODY.PEEK[]<0.{READ_OCTETS}>)")):
        if isinstance(item, tuple) and (found := _UID.search(item[0])) is not None and found[1].decode() == uid:
            return bytes(item[1])
    return None


def _said(answer: tuple[str, Any]) -> list[Any]:
    status, data = answer
    if status not in ("OK", "UIDVALIDITY"):
        raise imaplib.IMAP4.error(f"the server answered {status}")
    return [item for item in data if item is not None]


def _quoted(name: str) -> str:
    """A mailbox name as a quoted string; names beyond ASCII in modified UTF-7 are the user's to write."""
    return '"' + name.replace("\\", "\\\\").replace('"', '\\"') + '"'
