"""Composing: one recipient's message from a compiled content, against the standard library building the same message."""

from __future__ import annotations

import datetime as dt
import itertools
import time
from collections.abc import Callable, Iterator
from email import message_from_bytes
from email.message import EmailMessage
from email.policy import SMTP
from typing import Any

from mail_pipelines.benchmarks.contract import Result, best_of, judge
from mail_pipelines.messages.compilation import compile_content
from mail_pipelines.messages.compiled import CompiledMessage
from mail_pipelines.messages.composing import Recipient, SenderIdentity, compose
from mail_pipelines.messages.content import Content

TARGET = 50.0
SENDER = SenderIdentity(b"benchmark", "bounces.example.test", "https://mail.example.test", dt.datetime(2026, 1, 1, tzinfo=dt.UTC), "bench", "shop", "shop-1")
FIELDS = {"first_name": "text", "city": "text", "points": "number", "tier": "text", "born": "date"}
_STYLE = """
body, td, p, h1, h2 {font-family: Arial, Helvetica, sans-serif; color: #222222; margin: 0; padding: 0}
table {border-collapse: collapse; mso-table-lspace: 0pt; mso-table-rspace: 0pt; width: 100%}
td {vertical-align: top; text-align: left; word-break: break-word; padding: 12px 24px 12px 24px; direction: ltr; font-size: 0px}
h2 {font-size: 20px; line-height: 26px; font-weight: bold; letter-spacing: 0; padding-bottom: 8px}
p {font-size: 15px; line-height: 22px; padding-bottom: 10px}
.button {display: inline-block; background: #0055aa; color: #ffffff; border-radius: 4px; padding: 10px 24px; text-decoration: none; font-weight: bold}
img {border: 0; display: block; outline: none; text-decoration: none; height: auto; width: 100%; font-size: 13px}
"""
_BLOCK = """<table role="presentation" cellpadding="0" cellspacing="0"><tbody><tr><td align="left"><table role="presentation" cellpadding="0" cellspacing="0">
<tr><td width="200"><img src="https://images.example.test/offers/{number}/picture.jpg" width="176" height="132" alt="Offer {number}"></td><td>
<h2>Offer {number}</h2><p>This week the shop has picked offer {number} for you; it is worth a look and ends on Sunday evening.</p>
<p>Prices include tax. While stocks last, and not together with other offers.</p><p><small>Was 29.90, now 19.90.</small></p></td></tr>
<tr><td>&nbsp;</td><td><p><a class="button" href="https://shop.example.test/offers/{number}?from=mail&amp;place={number}">See offer {number}</a></p>
</td></tr></table></td></tr></tbody></table>
"""


def content(offers: int = 12) -> Content:
    """About 35 KB of HTML once styles are inlined, with 6 variables (the e-mail address among them) and a tracked link for each of the 12 offers."""
    blocks = "".join(_BLOCK.format(number=number) for number in range(offers))
    body = f"""<html><head><style>{_STYLE}</style></head>
<body><h1>Hello {{{{ first_name }}}} in {{{{ city }}}}</h1><p>{{{{ points }}}} points, tier {{{{ tier }}}}, since {{{{ born }}}}</p>
{blocks}<p>Sent to {{{{ email }}}}. <a href="{{{{ unsubscribe_url }}}}">Unsubscribe</a></p></body></html>"""
    return Content(subject="{{ first_name }}, your offers of the week", from_name="The Shop", from_address="news@shop.example.test", body=body)


def compiled(offers: int = 12) -> CompiledMessage:
    return compile_content(content(offers), FIELDS, lambda urls: range(1, len(urls) + 1))


def recipients() -> Iterator[Recipient]:
    values: list[dict[str, Any]] = [
        {"first_name": "Ada", "city": "London", "points": 120, "tier": "gold", "born": "1990-12-10"},
        {"first_name": "Jürgen", "city": "Köln & Umland", "points": 7, "tier": "basic", "born": "1975-01-31"},
        {"first_name": "Mary Ann", "city": "New York", "points": 4711.5, "tier": "silver", "born": None},
    ]
    for contact_id, chosen in enumerate(itertools.cycle(values), start=1):
        yield Recipient(1, contact_id, 0, f"reader{contact_id}@mail{contact_id % 50}.example.test", chosen)


def run(quick: bool) -> list[Result]:
    """Messages per second of the processor. The reference is `EmailMessage` with the same headers, text and HTML, made into bytes."""
    message = compiled()
    count, reference_count = (2_000, 30) if quick else (20_000, 300)
    chosen = list(itertools.islice(recipients(), count))
    by_standard_library = standard_library(compose(message, chosen[0], SENDER).data)
    # In turns, so that other programs disturb both alike.
    turns = [
        (
            best_of(lambda: compose_all(message, chosen, SENDER), runs=1, clock=time.process_time),
            best_of(lambda: [by_standard_library() for _ in range(reference_count)], runs=1, clock=time.process_time),
        )
        for _ in range(5)
    ]
    seconds, reference_seconds = (min(times) for times in zip(*turns, strict=True))
    return [judge("compose", count / seconds, "messages/s", reference_count / reference_seconds, target=TARGET, better="higher")]


def compose_all(message: CompiledMessage, chosen: list[Recipient], sender: SenderIdentity) -> None:
    # No list: keeping every message would measure the allocation of memory.
    for recipient in chosen:
        compose(message, recipient, sender)


def standard_library(data: bytes) -> Callable[[], bytes]:
    """A function that builds the message `data` from its headers, text and HTML with `EmailMessage`."""
    parsed = message_from_bytes(data, policy=SMTP)
    headers = [(name, value) for name, value in parsed.items() if name not in ("MIME-Version", "Content-Type")]
    texts = {part.get_content_subtype(): part.get_content() for part in parsed.iter_parts()}

    def build() -> bytes:
        built = EmailMessage(policy=SMTP)
        for name, value in headers:
            built[name] = value
        built.set_content(texts["plain"], cte="quoted-printable")
        built.add_alternative(texts["html"], subtype="html", cte="quoted-printable")
        return built.as_bytes()

    return build
