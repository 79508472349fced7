"""Making a content ready to be sent: done once for each content version, at the centre.

Order: checks on what the author wrote (so errors name its lines) → MJML → CSS inlining → link map → text part → templates cut
into literals and slots. A recipient costs only the slots then.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from hashlib import blake2b

from jinja2 import TemplateSyntaxError

from mail_pipelines.messages import headers, language, markup
from mail_pipelines.messages.compiled import BUILT_INS, UNSUBSCRIBE_URL, CompiledMessage, link_variable
from mail_pipelines.messages.content import Content, ContentError
from mail_pipelines.messages.values import body_text


def compile_content(content: Content, fields: Mapping[str, str], link_ids: Callable[[Sequence[str]], Sequence[int]]) -> CompiledMessage:
    """Compile a content that may read `fields` (key → type: text, number, boolean, date or datetime) and the built-in variables.

    `link_ids` gives the id of each URL, for all tracked links at once; it is not called when there are none. A link with a variable
    in it is not tracked: its target differs by recipient, and only fixed targets are kept. Raises `ContentError`.
    """
    variables = {**fields, **BUILT_INS}
    header_variables = {name: kind for name, kind in variables.items() if name != UNSUBSCRIBE_URL}
    subject = body_text(content.subject)
    preheader = body_text(content.preheader)
    body = body_text(content.body)
    given_text = None if content.text is None else body_text(content.text)
    language.check(subject, "subject", header_variables)
    language.check(preheader, "preheader", header_variables)
    language.check(body, "body", variables)
    if given_text is not None:
        language.check(given_text, "text", variables)
        _require_unsubscribe(given_text, "text", "Unsubscribe: {{ unsubscribe_url }}")

    tags = markup.Tags(body, preheader)
    document = _document(body, preheader, content, tags)
    links = document.links(body)
    urls = [*dict.fromkeys([*links, *(markup.links_in_text(given_text) if given_text else ())])] if content.tracking else []
    ids = dict(zip(urls, link_ids(urls) if urls else (), strict=True))
    document.replace_links({url: tags.mark(_link_tag(ids[url])) for url in links if url in ids})
    tags.require(document.markup)
    html = _with_final_line_end(tags.restore(document.markup))
    derived_text = _with_final_line_end(tags.restore(document.text()))
    text = derived_text
    if given_text is not None:
        text = _with_final_line_end(markup.replace_links_in_text(given_text, lambda url: _link_tag(ids[url]).source if url in ids else url))
    names = {*variables, *map(link_variable, ids.values())}
    try:
        # What did not get into the derived text is hidden in HTML too: comments, invisible elements, the head.
        _require_unsubscribe(derived_text, "body", '<a href="{{ unsubscribe_url }}">Unsubscribe</a>')
        templates = (language.cut(subject, False, names), language.cut(text, False, names), language.cut(html, True, names))
    except TemplateSyntaxError as error:
        raise ContentError("body", f"conditions and loops do not surround whole elements: {error.message}") from error
    return CompiledMessage(
        headers.mailbox("From", content.from_name, content.from_address),
        headers.mailbox("Reply-To", "", content.reply_to) if content.reply_to else "",
        *templates,
        # "=_" cannot occur in quoted-printable, so no value can end a part.
        boundary=f"=_{blake2b(f'{html}{text}'.encode(), digest_size=15).hexdigest()}",
        link_ids=tuple(ids.values()),
    )


def _require_unsubscribe(source: str, part: str, example: str) -> None:
    if not language.always_shows(source, UNSUBSCRIBE_URL):
        raise ContentError(part, f"has no unsubscribe link that every recipient sees; add {example}", variable=UNSUBSCRIBE_URL)


def _document(body: str, preheader: str, content: Content, tags: markup.Tags) -> markup.Document:
    protected = tags.protect(body, "body")
    rendered = markup.render_mjml(protected, tags) if content.body_format == "mjml" else protected
    if preheader.strip():
        rendered = markup.add_preheader(rendered, tags.protect(markup.escaped(preheader, "preheader"), "preheader"))
    return markup.Document(markup.inline_css(rendered), tags)


def _link_tag(link_id: int) -> markup.Tag:
    return markup.Tag(f"{{{{ {link_variable(link_id)} }}}}", "body", 0, is_block=False)


def _with_final_line_end(source: str) -> str:
    return source.rstrip("\n") + "\n"
