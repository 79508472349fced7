"""Mails that come back, as servers write them: a delivered copy of ours, and reports about it."""

from __future__ import annotations

from textwrap import dedent

from mail_pipelines.messages.tokens import DeliveryToken, sign_delivery
from tests.inbound.receiving import KEY

AT = "bounces.example.test"


def token(contact_id: int = 1, attempt: int = 0, campaign_id: int = 1, key: str = KEY) -> str:
    return sign_delivery(DeliveryToken(campaign_id, contact_id, attempt), key.encode())


def headers(own: str) -> str:
    """Headers of a message of ours, as the destination saw them."""
    return dedent(
        f"""\
        Return-Path: <b+{own}@{AT}>
        From: Shop <news@shop.test>
        To: someone@example.net
        Subject: Hello
        Message-ID: <{own}@{AT}>
        List-Unsubscribe: <https://mail.example.test/u/abc>,
         <mailto:u+{own}@{AT}>
        """
    )


def dsn(
    own: str,
    *,
    action: str = "failed",
    status: str = "5.1.1",
    words: str = "smtp; 550 5.1.1 <someone@example.net>: user unknown",
    returned: str = "text/rfc822-headers",
    to: str | None = None,
    quoted: str | None = None,
) -> bytes:
    """A notification (RFC 3464) to the return path, or to `to`; it quotes the headers of `quoted`, of the message itself by default."""
    fields = "".join(f"{name}: {value}\n" for name, value in (("Action", action), ("Status", status), ("Diagnostic-Code", words)) if value)
    top = dedent(
        f"""\
        From: Mail Delivery System <MAILER-DAEMON@mx.example.net>
        To: {f"b+{own}@{AT}" if to is None else to}
        Subject: Undelivered Mail Returned to Sender
        Auto-Submitted: auto-replied
        MIME-Version: 1.0
        Content-Type: multipart/report; report-type=delivery-status; boundary="=_b"

        --=_b
        Content-Type: text/plain

        Your message could not be delivered.

        --=_b
        Content-Type: message/delivery-status

        Reporting-MTA: dns; mx.example.net

        Final-Recipient: rfc822; someone-else@example.net
        """
    )
    return f"{top}{fields}\n--=_b\nContent-Type: {returned}\n\n{headers(quoted or own)}\n--=_b--\n".replace("\n", "\r\n").encode()


def complaint(own: str, *, kind: str | None = "abuse", to: str = f"fbl@{AT}") -> bytes:
    """A feedback report (RFC 5965) with everything redacted but what stands in the returned headers."""
    top = dedent(
        f"""\
        From: <staff@mailbox.example.net>
        To: {to}
        Subject: FW: Hello
        MIME-Version: 1.0
        Content-Type: multipart/report; report-type=feedback-report; boundary="=_f"

        --=_f
        Content-Type: text/plain

        This is an email abuse report.

        --=_f
        Content-Type: message/feedback-report

        """
    )
    fields = (f"Feedback-Type: {kind}\n" if kind else "") + "User-Agent: SomeGenerator/1.0\nVersion: 1\nOriginal-Rcpt-To: <redacted>\n"
    return f"{top}{fields}\n--=_f\nContent-Type: message/rfc822\n\n{headers(own)}\nThe message.\n--=_f--\n".replace("\n", "\r\n").encode()


def request(own: str) -> bytes:
    """What a mail program sends that follows the mailto: of List-Unsubscribe; some relay has changed the letters."""
    return f"From: Someone <someone@example.net>\r\nTo: <U+{own.upper()}@{AT.upper()}>\r\nSubject: unsubscribe\r\n\r\n".encode()


def qmail_bounce(own: str) -> bytes:
    """A bounce in a form of its own."""
    return (
        dedent(
            f"""\
        From: MAILER-DAEMON@mx.example.net
        To: b+{own}@{AT}
        Subject: failure notice

        Hi. This is the qmail-send program at mx.example.net.
        I'm afraid I wasn't able to deliver your message to the following addresses.
        This is a permanent error; I've given up. Sorry it didn't work out.

        <someone@example.net>:
        192.0.2.7 does not like recipient.
        Remote host said: 550 5.1.1 No such user here
        Giving up on 192.0.2.7.

        --- Below this line is a copy of the message.

        """
        )
        .replace("\n", "\r\n")
        .encode()
        + headers(own).replace("\n", "\r\n").encode()
    )


def vacation(own: str) -> bytes:
    return f"From: someone@example.net\r\nTo: b+{own}@{AT}\r\nSubject: Out of office\r\nAuto-Submitted: auto-replied\r\n\r\nI am away.\r\n".encode()
