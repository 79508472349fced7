"""Making a content ready to be sent: done once for each content version, at the centre.

Order: checks on what the author wrote (so errors name its lines) → MJML → CSS inlining → link map → text part → templates cut
into literals and slots. A recipient costs only the slots then.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from hashlib import blake2b

from jinja2 import TemplateSyntaxError

from mail_pipelines.messages import headers, language, markup
from mail_pipelines.messages.compiled import BUILT_INS, UNSUBSCRIBE_URL, CompiledMessage, Template, link_variable
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
    _require_unsubscribe(body, "body", variables)
    if given_text is not None:
        _require_unsubscribe(given_text, "text", variables)

    tags = markup.Tags(body, preheader)
    document = _document(body, preheader, content, tags)
    urls = document.links() if content.tracking else []
    if content.tracking and given_text is not None:
        urls = list(dict.fromkeys([*urls, *markup.links_in_text(given_text)]))
    tracked = dict(zip(urls, link_ids(urls), strict=True)) if urls else {}

    def tag_of(url: str) -> markup.Tag:
        return markup.Tag(f"{{{{ {link_variable(tracked[url])} }}}}", 0, is_block=False)

    document.replace_links({url: tags.mark(tag_of(url)) for url in document.links() if url in tracked})
    tags.require(document.markup, "body", "the rendered HTML")
    html = tags.restore(document.markup)
    if given_text is None:
        text = document.text()
        text = tags.restore(text)
    else:
        text = markup.replace_links_in_text(given_text, lambda url: tag_of(url).source if url in tracked else url)
    names = {*variables, *map(link_variable, tracked.values())}
    return CompiledMessage(
        from_header=headers.mailbox("From", content.from_name, content.from_address),
        reply_to_header=headers.mailbox("Reply-To", "", content.reply_to) if content.reply_to else "",
        subject=_cut(subject, "subject", False, names),
        text=_cut(_with_final_line_end(text), "text", False, names),
        html=_cut(_with_final_line_end(html), "body", True, names),
        # "=_" cannot occur in quoted-printable, so no value can end a part.
        boundary=f"=_{blake2b(f'{html}{text}'.encode(), digest_size=15).hexdigest()}",
        link_ids=tuple(tracked.values()),
    )


def _require_unsubscribe(source: str, part: str, variables: Mapping[str, str]) -> None:
    tree = language.check(source, part, variables)
    if not language.always_shows(tree.body, UNSUBSCRIBE_URL):
        example = '<a href="{{ unsubscribe_url }}">Unsubscribe</a>' if part == "body" else "Unsubscribe: {{ unsubscribe_url }}"
        raise ContentError(part, f"has no unsubscribe link that every recipient sees; add {example}", variable=UNSUBSCRIBE_URL)


def _document(body: str, preheader: str, content: Content, tags: markup.Tags) -> markup.Document:
    protected = tags.protect(body, "body")
    rendered = markup.render_mjml(protected, tags) if content.body_format == "mjml" else protected
    if preheader.strip():
        rendered = markup.add_preheader(rendered, tags.protect(markup.escaped(preheader, "preheader"), "preheader"))
    return markup.Document(markup.inline_css(rendered), tags)


def _with_final_line_end(source: str) -> str:
    return source.rstrip("\n") + "\n"


def _cut(source: str, part: str, html: bool, names: set[str]) -> Template:
    try:
        return language.cut(source, html, names)
    except TemplateSyntaxError as error:
        raise ContentError(part, f"conditions and loops do not surround whole elements: {error.message}") from error
