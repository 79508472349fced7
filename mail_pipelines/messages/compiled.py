"""A compiled message: everything about a mail that is the same for all recipients, and where the rest goes.

What belongs here: the compiled form, its serialisation, and its values filled in. It is on the send path: nothing heavy is
imported; Jinja2 only when a part has conditions or loops. What does not: how it is made (`compilation`), and addresses, tokens and dates (`composing`).
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from markupsafe import escape

from mail_pipelines.errors import MailPipelinesError
from mail_pipelines.messages import quoted_printable
from mail_pipelines.messages.canonical import relaxed_body
from mail_pipelines.messages.values import FILTERS, body_text, text_of

if TYPE_CHECKING:
    from jinja2 import Template as JinjaTemplate

FORM = 1
EMAIL = "email"
UNSUBSCRIBE_URL = "unsubscribe_url"
# Known in every template, without a field of that name.
BUILT_INS: Mapping[str, str] = {EMAIL: "text", UNSUBSCRIBE_URL: "text"}
_LINK_PREFIX = "_link_"


class CompiledMessageError(MailPipelinesError):
    """Bytes that are no compiled message of this version of the program."""


class RenderError(MailPipelinesError):
    """A condition of a template fails on the values of one recipient, in a way that `language.check` did not foresee."""


def link_variable(link_id: int) -> str:
    """The variable that stands for a tracked link; no field can have such a name."""
    return f"{_LINK_PREFIX}{link_id}"


@dataclass(frozen=True)
class Slot:
    """A place for one value: the variable, and filters in the order they are applied, each with its arguments."""

    name: str
    filters: tuple[tuple[str, tuple[Any, ...]], ...] = ()

    def text(self, values: Mapping[str, Any]) -> str:
        value = values.get(self.name)
        for name, arguments in self.filters:
            value = FILTERS[name](value, *arguments)
        return text_of(value)


@dataclass(frozen=True)
class Pieces:
    """A template without conditions: `literals` with one of `slots` between each two."""

    literals: tuple[str, ...]
    slots: tuple[Slot, ...]

    @property
    def variables(self) -> tuple[str, ...]:
        return tuple(sorted({slot.name for slot in self.slots}))

    def render(self, values: Mapping[str, Any]) -> str:
        """As plain text, nothing escaped."""
        return "".join(text for pair in zip(self.literals, (*(slot.text(values) for slot in self.slots), ""), strict=True) for text in pair)


@dataclass(frozen=True)
class Script:
    """A template with conditions or loops, rendered by the sandbox of `language`. With `html` its values are escaped."""

    source: str
    html: bool
    variables: tuple[str, ...]

    @functools.cached_property
    def _template(self) -> JinjaTemplate:
        from mail_pipelines.messages.language import environment

        return environment(self.html).from_string(self.source)

    def render(self, values: Mapping[str, Any]) -> str:
        """Raises `RenderError`."""
        from jinja2 import TemplateError

        try:
            return self._template.render({name: values.get(name) for name in self.variables})
        except (TemplateError, TypeError, ValueError, ArithmeticError) as error:
            # The error's own text may hold a value.
            raise RenderError(f"the template fails on this contact's values ({type(error).__name__})") from error


Template = Pieces | Script


@dataclass(frozen=True)
class CompiledMessage:
    """One campaign version, ready to be filled in. Headers are whole lines with CRLF, `reply_to_header` may be empty.

    `link_ids` are the tracked links in use (table `links`).
    """

    from_header: str
    reply_to_header: str
    subject: Template
    text: Template
    html: Template
    boundary: str
    link_ids: tuple[int, ...]

    @functools.cached_property
    def from_domain(self) -> str:
        """The domain of the From address, in A-labels: whom the message claims to be from."""
        return self.from_header.rpartition("@")[2].rstrip(">\r\n")

    @functools.cached_property
    def variables(self) -> tuple[str, ...]:
        """Keys of the contact fields a recipient's values are read from, sorted."""
        read = {name for part in (self.subject, self.text, self.html) for name in part.variables}
        return tuple(sorted(name for name in read if name not in BUILT_INS and not name.startswith(_LINK_PREFIX)))

    @functools.cached_property
    def sha256(self) -> str:
        """Hexadecimal digest of `to_bytes()`."""
        return hashlib.sha256(self.to_bytes()).hexdigest()

    @functools.cached_property
    def body(self) -> Body:
        return Body(self)

    def to_bytes(self) -> bytes:
        document = {
            "form": FORM,
            "from_header": self.from_header,
            "reply_to_header": self.reply_to_header,
            "subject": _template_document(self.subject),
            "text": _template_document(self.text),
            "html": _template_document(self.html),
            "boundary": self.boundary,
            "link_ids": self.link_ids,
        }
        return json.dumps(document, separators=(",", ":")).encode()

    @staticmethod
    def from_bytes(data: bytes) -> CompiledMessage:
        """The message that `to_bytes` wrote. Raises `CompiledMessageError`."""
        try:
            document = json.loads(data)
            form = document.pop("form")
            if form != FORM:
                raise CompiledMessageError(f"the compiled content has form {form}, this program reads form {FORM}; compile the campaign's content again")
            document |= {part: _template(document[part]) for part in ("subject", "text", "html")}
            return CompiledMessage(**document | {"link_ids": tuple(document["link_ids"])})
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CompiledMessageError(f"{len(data)} bytes are no compiled content ({error!r}); compile the campaign's content again") from error


def _template_document(template: Template) -> dict[str, Any]:
    if isinstance(template, Script):
        return {"source": template.source, "html": template.html, "variables": template.variables}
    return {"literals": template.literals, "slots": [[slot.name, slot.filters] for slot in template.slots]}


def _template(document: Mapping[str, Any]) -> Template:
    if "source" in document:
        return Script(document["source"], document["html"], tuple(document["variables"]))
    slots = (Slot(name, tuple((filter_name, tuple(arguments)) for filter_name, arguments in filters)) for name, filters in document["slots"])
    return Pieces(tuple(document["literals"]), tuple(slots))


class Body:
    """The multipart/alternative body as quoted-printable bytes, encoded once, with the places that differ by recipient.

    What is put into a place of a line follows a soft line break and is followed by one, so it can be encoded on its own.
    """

    def __init__(self, message: CompiledMessage) -> None:
        parts = (("plain", message.text), ("html", message.html))
        urls = [*map(link_variable, message.link_ids), UNSUBSCRIBE_URL]
        slots = dict.fromkeys(slot for _, part in parts if isinstance(part, Pieces) for slot in part.slots)
        self._urls = len(urls)
        self._slots = [slot for slot in slots if slot.filters or slot.name not in urls]
        self.scripts = tuple(part for _, part in parts if isinstance(part, Script))
        # `fill` makes a list of encoded values: URLs, slots as text, slots as HTML, scripts. `_sources` says which of them goes into which place.
        numbers: dict[tuple[str, Slot | Script], int] = {}
        for subtype in ("plain", "html"):
            numbers |= {(subtype, Slot(url)): number for number, url in enumerate(urls)}
            first = len(urls) + (len(self._slots) if subtype == "html" else 0)
            numbers |= {(subtype, slot): first + number for number, slot in enumerate(self._slots)}
        self._sources: list[int] = []
        literals = [b""]
        for subtype, part in parts:
            literals[-1] += (
                f'--{message.boundary}\r\nContent-Type: text/{subtype}; charset="utf-8"\r\nContent-Transfer-Encoding: quoted-printable\r\n\r\n'.encode()
            )
            if isinstance(part, Script):
                self._sources.append(len(urls) + 2 * len(self._slots) + self.scripts.index(part))
                literals.append(b"")
            else:
                literals[-1] += quoted_printable.encode_segment(part.literals[0])
                for slot, literal in zip(part.slots, part.literals[1:], strict=True):
                    self._sources.append(numbers[subtype, slot])
                    literals[-1] += quoted_printable.SOFT_BREAK
                    literals.append(quoted_printable.SOFT_BREAK + quoted_printable.encode_segment(literal))
            literals[-1] += b"\r\n"
        literals[-1] += f"--{message.boundary}--\r\n".encode()
        # The first place is for the header of the message.
        self._layout = [b""] * (2 * len(literals))
        self._layout[1::2] = literals
        self._relaxed_layout = self._layout.copy()
        self._relaxed_layout[1::2] = map(relaxed_body, literals)

    def encode(self, values: Mapping[str, Any], urls: Sequence[bytes]) -> list[bytes]:
        """What goes into the places, for `join` and `relaxed_sha256`.

        `urls` are segments of quoted-printable: one for each of the message's `link_ids`, and the unsubscribe URL last. If the
        message has `scripts`, `values` holds these URLs too, as text.
        """
        as_text: list[bytes] = []
        as_html: list[bytes] = []
        for slot in self._slots:
            text = slot.text(values)
            if quoted_printable.plain(text):
                as_text.append(text.encode())
                as_html.append(as_text[-1])
            else:
                text = body_text(text)
                as_text.append(quoted_printable.encode_segment(text))
                as_html.append(quoted_printable.encode_segment(escape(text)))
        encoded = [*urls, *as_text, *as_html]
        if self.scripts:
            rendered = [script.render(values) for script in self.scripts]
            # Cleaning a whole part takes as long as rendering it, and values with control characters are rare.
            if not all(value.isprintable() for value in values.values() if isinstance(value, str)):
                rendered = [body_text(text) for text in rendered]
            encoded += map(quoted_printable.encode, rendered)
        return encoded

    def join(self, header: bytes, encoded: Sequence[bytes]) -> bytes:
        """The whole message. `header` ends with the empty line."""
        pieces = self._layout.copy()
        pieces[0] = header
        pieces[2::2] = [encoded[source] for source in self._sources]
        return b"".join(pieces)

    def relaxed_sha256(self, encoded: Sequence[bytes]) -> bytes:
        """The digest of the body in DKIM's relaxed form. A soft break parts the pieces, so no run of blanks spans two of them; URLs have none."""
        relaxed = [*encoded[: self._urls], *map(relaxed_body, encoded[self._urls :])]
        pieces = self._relaxed_layout.copy()
        pieces[2::2] = [relaxed[source] for source in self._sources]
        return hashlib.sha256(b"".join(pieces)).digest()
