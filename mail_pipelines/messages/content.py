"""What the author of a campaign writes: subject, sender, body.

What belongs here: the parts of a content, their form as a plain document, and the checks that need no template engine.
What does not: the template language (`language`) and what is made of a content (`compilation`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

from mail_pipelines.contacts.addresses import AddressError, mask, parse
from mail_pipelines.errors import MailPipelinesError, nearest

BodyFormat = Literal["html", "mjml"]
_OPTIONAL = ("reply_to", "text")


class ContentError(MailPipelinesError):
    """A content cannot be sent as it is. `part` is a field of `Content`; `line` counts from 1 in that part's own text."""

    def __init__(self, part: str, problem: str, *, line: int | None = None, variable: str | None = None) -> None:
        super().__init__(f"{part}{f', line {line}' if line else ''}: {problem}")
        self.part = part
        self.line = line
        self.variable = variable


@dataclass(frozen=True)
class Content:
    """The content of one campaign version. Raises `ContentError` if a part cannot be what it says it is.

    `subject`, `preheader` (what an inbox shows after the subject), `body` and `text` are templates, the other parts are
    plain text. Without `text` the text part is derived from the body. With `tracking` the http(s) links of body and text lead
    through the click counter.
    """

    subject: str
    from_address: str
    body: str
    from_name: str = ""
    preheader: str = ""
    reply_to: str | None = None
    body_format: BodyFormat = "html"
    text: str | None = None
    tracking: bool = True

    def __post_init__(self) -> None:
        if self.body_format not in get_args(BodyFormat):
            raise ContentError("body_format", f"{self.body_format!r} is unknown; expected one of {', '.join(get_args(BodyFormat))}")
        for part in ("subject", "body"):
            if not getattr(self, part).strip():
                raise ContentError(part, "is empty")
        for part in ("subject", "preheader", "from_name"):
            if "\n" in (value := getattr(self, part)) or "\r" in value:
                raise ContentError(part, "must be one line", line=2)
        for part in ("from_address", "reply_to"):
            address = getattr(self, part)
            if address is not None:
                try:
                    parse(address)
                except AddressError as error:
                    raise ContentError(part, f"{mask(address)} cannot be used: {error.reason}") from error

    @property
    def from_domain(self) -> str:
        """The domain of the From address, in A-labels."""
        return parse(self.from_address).domain

    def to_document(self) -> dict[str, Any]:
        """A JSON object, as kept in `campaign_versions.source`."""
        return asdict(self)

    @staticmethod
    def from_document(document: Mapping[str, Any]) -> Content:
        """The content a document describes. Raises `ContentError` for an unknown, missing or ill-typed part."""
        known = {field.name for field in fields(Content)}
        for part, value in document.items():
            if part not in known:
                raise ContentError(part, f"is no part of a content; {nearest(part, known)}")
            expected = bool if part == "tracking" else str
            if not isinstance(value, expected) and not (value is None and part in _OPTIONAL):
                raise ContentError(part, f"expected {'true or false' if expected is bool else 'text'}, got {type(value).__name__}")
        for part in ("subject", "from_address", "body"):
            if part not in document:
                raise ContentError(part, "is missing")
        return Content(**document)
