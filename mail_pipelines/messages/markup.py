"""HTML and MJML with template tags in them: protecting the tags, rendering MJML, inlining CSS, links, the text part.

What belongs here: everything that parses or rewrites markup, done once per content version. What does not: what a tag may
say (`language`).

The tools for HTML and MJML know nothing of templates and would move or quote tags, so `Tags` puts marks in their place
and puts the tags back afterwards. Between elements the mark of a `{% … %}` is a comment, which even a table may hold.
"""

from __future__ import annotations

import html
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from mail_pipelines.messages.content import ContentError

if TYPE_CHECKING:
    from selectolax.lexbor import LexborHTMLParser

Place = Literal["text", "value", "tag", "comment", "style"]
_RAW_ELEMENTS = ("style", "script", "mj-style")
_ENDS: Mapping[str, re.Pattern[str]] = {
    "text": re.compile(r"<!--|</?([a-zA-Z][^\s/>]*)"),
    "comment": re.compile(r"-->"),
    "tag": re.compile(r"[\"'>]"),
    '"': re.compile(r'"'),
    "'": re.compile(r"'"),
}
_PREHEADER_STYLE = "display:none;font-size:1px;line-height:1px;max-height:0;max-width:0;opacity:0;overflow:hidden"
_SCHEME = re.compile(r"[a-z][a-z0-9+.-]*:", re.IGNORECASE)
_URL_IN_TEXT = re.compile(r"https?://[^\s<>\"{}]+", re.IGNORECASE)
_TAG_BRACE = re.compile(r"\{(?=[{%#]|\Z)")
_TRACKABLE = re.compile(r"https?://[^/]", re.IGNORECASE)


@dataclass(frozen=True)
class Tag:
    """One `{{ … }}` or `{% … %}` of a template, with the part of the content and the line where it stands."""

    source: str
    part: str
    line: int
    is_block: bool


def split_tags(source: str, part: str) -> Iterator[str | Tag]:
    """A template as literal text and tags, comments left out. The template has passed `language.check`."""
    from mail_pipelines.messages.language import environment

    collected = ""
    begin = 0
    for line, kind, text in environment(html=False).lex(source):
        if kind == "raw_begin":
            raise ContentError(part, "raw is not available in templates", line=line)
        if kind in ("variable_begin", "block_begin", "comment_begin"):
            collected, begin = text, line
        elif kind in ("variable_end", "block_end"):
            yield Tag(collected + text, part, begin, kind == "block_end")
            collected = ""
        elif kind == "comment_end":
            collected = ""
        elif collected:
            collected += text
        else:
            yield text


class Tags:
    """The template tags of one document and their marks: words that no tool changes, or comments of one such word."""

    def __init__(self, *sources: str) -> None:
        letters = "zq"
        while any(letters in source.lower() for source in sources):
            letters += "q"
        self._letters = letters
        self._tags: list[Tag] = []
        self._between: list[int] = []
        # Words with a "c" are those between elements, in comments until `words` unpacks them.
        self._mark = re.compile(rf"(?:<!--)?{letters}c(\d+)z(?:-->)?|{letters}(\d+)z")

    def mark(self, tag: Tag) -> str:
        """A word of letters and digits that stands for the tag."""
        self._tags.append(tag)
        return f"{self._letters}{len(self._tags) - 1}z"

    def protect(self, source: str, part: str) -> str:
        """A template with marks for its tags. Raises `ContentError` for a tag in a place where it would not work."""
        scanner = _Scanner()
        protected = []
        for piece in split_tags(source, part):
            if isinstance(piece, str):
                scanner.feed(piece)
                protected.append(piece)
            elif scanner.place == "style":
                raise ContentError(part, f"{piece.source} stands in a style sheet or script; use a style attribute", line=piece.line)
            elif scanner.place == "tag":
                raise ContentError(part, f"{piece.source} stands in an HTML tag outside a quoted value", line=piece.line)
            elif scanner.place == "text" and piece.is_block:
                self._between.append(len(self._tags))
                self._tags.append(piece)
                protected.append(f"<!--{self._letters}c{self._between[-1]}z-->")
            else:
                protected.append(self.mark(piece))
        return "".join(protected)

    def restore(self, document: str) -> str:
        """The template with its tags back. What is no mark is literal text now, braces that came in as entities too."""
        restored: list[str] = []
        end = 0
        for match in self._mark.finditer(document):
            restored += (literal(document[end : match.start()]), self._tags[_number(match)].source)
            end = match.end()
        return "".join([*restored, literal(document[end:])])

    def words(self, document: str) -> str:
        """The document with marks in comments as plain words."""
        return self._mark.sub(lambda match: match[0].removeprefix("<!--").removesuffix("-->"), document)

    def in_(self, text: str) -> bool:
        return self._mark.search(text) is not None

    def only_between(self, line: str) -> bool:
        """Whether a line holds `{% … %}` from between elements and nothing else."""
        return self.in_(line) and not self._mark.sub(lambda match: "" if match[1] else match[0], line).strip()

    def require(self, document: str) -> None:
        """Raises `ContentError` if a tag got lost on the way to `document`, or if `{% … %}` changed their order."""
        matches = list(self._mark.finditer(document))
        found = set(map(_number, matches))
        for number, tag in enumerate(self._tags):
            if number not in found:
                raise ContentError(tag.part, f"{tag.source} stands where rendering loses it; move it into text or a quoted value", line=tag.line)
        for match, expected in zip((match for match in matches if match[1]), self._between, strict=False):
            if _number(match) != expected:
                tag = self._tags[expected]
                raise ContentError(tag.part, f"{tag.source} stands where rendering moves it; put it around whole elements", line=tag.line)


def _number(match: re.Match[str]) -> int:
    return int(match[1] or match[2])


class _Scanner:
    """Where in an HTML source the reading stands. Only as exact as needed to place marks."""

    def __init__(self) -> None:
        self._state = "text"
        self._element = ""

    @property
    def place(self) -> Place:
        match self._state:
            case "text" | "comment" | "tag" | "style":
                return self._state
            case _:
                return "value"

    def feed(self, text: str) -> None:
        position = 0
        while True:
            end = re.compile(rf"</{self._element}", re.IGNORECASE) if self._state == "style" else _ENDS[self._state]
            found = end.search(text, position)
            if not found:
                return
            position = found.end()
            self._state = self._after(found)

    def _after(self, found: re.Match[str]) -> str:
        match self._state, found[0]:
            case "text", "<!--":
                return "comment"
            case "text", opening:
                self._element = "" if opening.startswith("</") else found[1].lower()
                return "tag"
            case "tag", ">":
                return "style" if self._element in _RAW_ELEMENTS else "text"
            case "tag", quote:
                return quote
            case "style", _:
                self._element = ""
                return "tag"
            case "comment", _:
                return "text"
            case _:
                return "tag"


def render_mjml(protected: str, tags: Tags) -> str:
    """MJML as HTML. Raises `ContentError` with the line in the author's source where the renderer names a position."""
    from mjml import mjml2html

    try:
        # `fonts` empty: by default every mail would load a font from a foreign host when it is opened. `<mj-font>` still works.
        rendered: str = mjml2html(protected, fonts={})
    except ValueError as error:
        position = re.search(r"position (\d+):\d+", str(error))
        before = protected.encode()[: int(position[1])].decode(errors="ignore") if position else None
        raise ContentError("body", f"no valid MJML: {error}", line=None if before is None else tags.restore(before).count("\n") + 1) from error
    if unknown := re.search(r"<mj-[a-z-]+", rendered):
        raise ContentError("body", f"unknown MJML element {unknown[0]}>", line=tags.restore(protected[: protected.index(unknown[0])]).count("\n") + 1)
    return rendered


def inline_css(document: str) -> str:
    """Style sheets copied into style attributes. They also stay where they are, for media queries and hover. Nothing is fetched."""
    from css_inline import CSSInliner, InlineError

    try:
        return CSSInliner(load_remote_stylesheets=False, keep_style_tags=True, keep_link_tags=True).inline(document)
    except InlineError as error:
        raise ContentError("body", f"a style sheet cannot be read: {error}") from error


def add_preheader(document: str, preheader: str) -> str:
    """`preheader` (markup) as the first thing in the body, hidden."""
    opening = re.search(r"<body[^>]*>", document, re.IGNORECASE)
    position = opening.end() if opening else 0
    return f'{document[:position]}<div style="{_PREHEADER_STYLE}">{preheader}</div>{document[position:]}'


class Document:
    """A rendered and inlined document whose links can be listed and replaced."""

    def __init__(self, markup: str, tags: Tags) -> None:
        from selectolax.lexbor import LexborHTMLParser

        self._tree: LexborHTMLParser = LexborHTMLParser(markup)
        self._tags = tags

    def links(self, source: str) -> list[str]:
        """Each different http(s) link without variables, in order. Raises `ContentError` for a link that leads nowhere from a mail.

        `source` is the author's, in which the line of such a link is looked up.
        """
        links = []
        for node in self._tree.css("a[href], area[href]"):
            href = (node.attributes["href"] or "").strip()
            if self._tags.in_(href):
                continue
            if not _SCHEME.match(href) and not href.startswith("#"):
                before, found, _ = source.partition(f'="{href}"')
                raise ContentError("body", f"link {href!r} leads nowhere from a mail; write it with https://", line=before.count("\n") + 1 if found else None)
            if _TRACKABLE.match(href):
                links.append(href)
        return list(dict.fromkeys(links))

    def replace_links(self, replacements: Mapping[str, str]) -> None:
        for node in self._tree.css("a[href], area[href]"):
            href = (node.attributes["href"] or "").strip()
            if href in replacements:
                node.attrs["href"] = replacements[href]

    @property
    def markup(self) -> str:
        return self._tree.html or ""

    def text(self) -> str:
        """The document as plain text with its links in parentheses. Tags of the template are still marks."""
        from inscriptis import get_text
        from inscriptis.css_profiles import STRICT_CSS_PROFILE
        from inscriptis.model.config import ParserConfig
        from selectolax.lexbor import LexborHTMLParser

        copy = LexborHTMLParser(self.markup)
        for node in copy.css("a[href]"):
            href = (node.attributes["href"] or "").strip()
            if (_TRACKABLE.match(href) or self._tags.in_(href)) and href != node.text(strip=True):
                node.insert_after(f" ({href})")
        # A mail's tables are its layout. Read as tables, their cells would be padded into columns.
        markup = self._tags.words(copy.html or "")
        markup = re.sub(r"<(/?)(?:table|thead|tbody|tfoot|tr)\b[^>]*>", r"<\1div>", markup)
        markup = re.sub(r"<(/?)t[dh]\b[^>]*>", lambda match: "</span> " if match[1] else "<span>", markup)
        lines = get_text(markup, ParserConfig(css=STRICT_CSS_PROFILE.copy(), display_images=True, deduplicate_captions=True)).splitlines()
        # A condition must not leave its own line empty.
        text = "".join(line.strip() if self._tags.only_between(line) else f"{line.rstrip()}\n" for line in lines)
        return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def links_in_text(source: str) -> list[str]:
    """Each different http(s) address without variables in a text template, in order."""
    found: list[str] = []

    def note(url: str) -> str:
        found.append(url)
        return url

    replace_links_in_text(source, note)
    return list(dict.fromkeys(found))


def replace_links_in_text(source: str, replacement: Callable[[str], str]) -> str:
    """The text template with each http(s) address that holds no variable replaced. Punctuation after it is no part of it."""
    pieces = list(split_tags(source, "text"))
    replaced = []
    for piece, following in zip(pieces, [*pieces[1:], ""], strict=True):
        if isinstance(piece, Tag):
            replaced.append(piece.source)
            continue

        def swap(match: re.Match[str], runs_on: bool = isinstance(following, Tag), end: int = len(piece)) -> str:
            if runs_on and match.end() == end:
                return match[0]
            url = match[0].rstrip(".,;:!?)'\"]")
            return replacement(url) + match[0][len(url) :]

        replaced.append(_URL_IN_TEXT.sub(swap, piece))
    return "".join(replaced)


def literal(text: str) -> str:
    """Text as the source of a template that writes it: an opening brace must not begin a tag."""
    return _TAG_BRACE.sub("{{ '{' }}", text)


def escaped(source: str, part: str) -> str:
    """A template of plain text as a template of HTML."""
    return "".join(piece.source if isinstance(piece, Tag) else html.escape(piece) for piece in split_tags(source, part))
