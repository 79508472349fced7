"""One recipient's copy of a compiled message: headers, envelope, tokens.

What belongs here: what differs by recipient and is no template. It runs for every message sent, in some 20 µs and one signature.
What does not: the form of a signature (`dkim`) and SMTP, which also doubles leading dots.
"""

from __future__ import annotations

import datetime as dt
import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from email.utils import format_datetime
from typing import Any

from mail_pipelines.contacts import addresses
from mail_pipelines.errors import MailPipelinesError
from mail_pipelines.messages import headers, quoted_printable
from mail_pipelines.messages.compiled import EMAIL, UNSUBSCRIBE_URL, Body, CompiledMessage, RenderError, link_variable
from mail_pipelines.messages.dkim import Signer, Unsigned
from mail_pipelines.messages.tokens import DeliveryToken, LinkKind, sign_delivery, sign_links

_PUBLIC_URL = re.compile(r"https://[A-Za-z0-9.:-]+(?:/[A-Za-z0-9._~/-]*)?")
_FEEDBACK_PART = re.compile(r"[A-Za-z0-9._-]+")
_SENDER_ID = re.compile(r"[A-Za-z0-9._-]{5,15}")


class ComposeError(MailPipelinesError):
    """This recipient's message cannot be made; the others can. Names the contact by its id."""


class SenderError(MailPipelinesError):
    """A sender identity that would make unusable mail."""


@dataclass(frozen=True)
class Recipient:
    """Whom a message is for. `email` as the contact gave it, `values` its fields by key; a field without a value may be absent or None."""

    campaign_id: int
    contact_id: int
    attempt: int
    email: str
    values: Mapping[str, Any]


@dataclass(frozen=True)
class SenderIdentity:
    """Who sends, the same for all messages of a batch. Raises `SenderError`.

    `public_url` is an https URL, with or without a slash at its end. `date` is an aware time for the Date header. `campaign_key`,
    `brand` and `sender_id` (5 to 15 characters, always the same) are the parts of the Feedback-ID, by which Gmail groups complaints.
    `signer` signs for the domain of the From address; without one messages are not signed.
    """

    token_key: bytes
    return_path_domain: str
    public_url: str
    date: dt.datetime
    campaign_key: str
    brand: str
    sender_id: str
    signer: Signer | None = None

    def __post_init__(self) -> None:
        try:
            domain = addresses.normal_domain(self.return_path_domain)
        except ValueError as error:
            raise SenderError(f"return path domain {self.return_path_domain!r} cannot be used: {error}") from error
        object.__setattr__(self, "return_path_domain", domain)
        object.__setattr__(self, "public_url", self.public_url.rstrip("/"))
        if self.date.tzinfo is None:
            raise SenderError(f"date {self.date} has no time zone")
        expected = {
            "public_url": (_PUBLIC_URL, "an https URL without query"),
            "campaign_key": (_FEEDBACK_PART, "letters, digits, '.', '_' and '-'"),
            "brand": (_FEEDBACK_PART, "letters, digits, '.', '_' and '-'"),
            "sender_id": (_SENDER_ID, "5 to 15 letters, digits, '.', '_' or '-'"),
        }
        for name, (form, wanted) in expected.items():
            if not form.fullmatch(getattr(self, name)):
                raise SenderError(f"{name} is {getattr(self, name)!r}; expected {wanted}")

    @functools.cached_property
    def click_url(self) -> str:
        return f"{self.public_url}/c/"

    @functools.cached_property
    def unsubscribe_url(self) -> str:
        return f"{self.public_url}/u/"

    @functools.cached_property
    def click_segment(self) -> bytes:
        """`click_url` in quoted-printable, ready for a token on the next line."""
        return quoted_printable.encode_segment(self.click_url) + quoted_printable.SOFT_BREAK

    @functools.cached_property
    def unsubscribe_segment(self) -> bytes:
        return quoted_printable.encode_segment(self.unsubscribe_url) + quoted_printable.SOFT_BREAK

    @functools.cached_property
    def date_header(self) -> str:
        return f"Date: {format_datetime(self.date)}\r\n"

    @functools.cached_property
    def second(self) -> int:
        """`date` as epoch seconds, the time of signing."""
        return int(self.date.timestamp())

    @functools.cached_property
    def feedback_header(self) -> str:
        return f"Feedback-ID: {self.campaign_key}:{self.brand}:{self.sender_id}\r\n"


@dataclass(frozen=True)
class Message:
    """Ready for SMTP. `envelope_sender` and `recipient` go into MAIL FROM and RCPT TO, without angle brackets and in ASCII.

    `token` is the delivery token in return path and Message-ID. `data` has only 7-bit characters and CRLF line ends, no line
    over 998 octets, and is not dot-stuffed.
    """

    envelope_sender: str
    recipient: str
    token: str
    data: bytes


@dataclass(frozen=True)
class Draft:
    """A message that lacks nothing but its signature.

    To sign takes several times as long as all the rest, and holds no lock of Python's meanwhile: threads may do it at once.
    """

    envelope_sender: str
    recipient: str
    token: str
    header: bytes
    body: Body
    encoded: list[bytes]
    signer: Signer | None
    unsigned: Unsigned | None

    def sign(self) -> bytes:
        """The signature's field; empty if nobody signs."""
        return b"" if self.signer is None or self.unsigned is None else self.signer.sign(self.unsigned)

    def message(self, signature: bytes) -> Message:
        return Message(self.envelope_sender, self.recipient, self.token, self.body.join(b"%b%b\r\n" % (signature, self.header), self.encoded))


def compose(compiled: CompiledMessage, recipient: Recipient, sender: SenderIdentity) -> Message:
    """One recipient's message. The same arguments give the same bytes: a retry of an attempt carries the same Message-ID.

    Raises `ComposeError` if the address is unusable or a condition of the template fails on this recipient's values.
    """
    composed = draft(compiled, recipient, sender)
    return composed.message(composed.sign())


def draft(compiled: CompiledMessage, recipient: Recipient, sender: SenderIdentity) -> Draft:
    """The message of `compose` before it is signed. Raises `ComposeError`."""
    campaign_id, contact_id = recipient.campaign_id, recipient.contact_id
    try:
        address = addresses.parse(recipient.email)
    except addresses.AddressError as error:
        raise ComposeError(f"contact {contact_id} of campaign {campaign_id}: {error}") from error
    to = f"{address.email.rpartition('@')[0]}@{address.domain}"
    token = sign_delivery(DeliveryToken(campaign_id, contact_id, recipient.attempt), sender.token_key)
    links = sign_links(campaign_id, contact_id, compiled.link_ids, LinkKind.CLICK, sender.token_key)
    unsubscribe = sign_links(campaign_id, contact_id, (0,), LinkKind.UNSUBSCRIBE, sender.token_key)[0]
    values = {**recipient.values, EMAIL: recipient.email, UNSUBSCRIBE_URL: sender.unsubscribe_url + unsubscribe}
    if compiled.body.scripts:
        values |= {link_variable(link_id): sender.click_url + link for link_id, link in zip(compiled.link_ids, links, strict=True)}
    urls = [sender.click_segment + link.encode() for link in links]
    urls.append(sender.unsubscribe_segment + unsubscribe.encode())
    domain = sender.return_path_domain
    try:
        header = (
            f"{compiled.from_header}"
            f"To: {to}\r\n"
            f"{compiled.reply_to_header}"
            f"{headers.unstructured('Subject', compiled.subject.render(values))}"
            f"{sender.date_header}"
            f"Message-ID: <{token}@{domain}>\r\n"
            f"List-Unsubscribe: <{sender.unsubscribe_url}{unsubscribe}>,\r\n"
            f" <mailto:u+{token}@{domain}>\r\n"
            "List-Unsubscribe-Post: List-Unsubscribe=One-Click\r\n"
            f"{sender.feedback_header}"
            "MIME-Version: 1.0\r\n"
            "Content-Type: multipart/alternative;\r\n"
            f' boundary="{compiled.boundary}"\r\n'
        ).encode("ascii")
        encoded = compiled.body.encode(values, urls)
    except RenderError as error:
        raise ComposeError(f"contact {contact_id} of campaign {campaign_id}: {error}") from error
    signer = sender.signer
    unsigned = None if signer is None else signer.prepare(header, compiled.body.relaxed_sha256(encoded), sender.second)
    return Draft(f"b+{token}@{domain}", to, token, header, compiled.body, encoded, signer, unsigned)
