"""Compiling a content: its HTML, links and text part; what is refused, with part, line and variable."""

from __future__ import annotations

import html
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from selectolax.lexbor import LexborHTMLParser

from mail_pipelines.messages.compilation import compile_content
from mail_pipelines.messages.compiled import CompiledMessage, CompiledMessageError, Pieces, Script
from mail_pipelines.messages.content import Content, ContentError

FIELDS = {"first_name": "text", "city": "text", "points": "number", "vip": "boolean"}
END = '<a href="{{ unsubscribe_url }}">Unsubscribe</a>'


class LinkTable:
    """Gives each URL an id, as the table of links does, and remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[list[str]] = []

    def __call__(self, urls: Sequence[str]) -> list[int]:
        self.asked.append(list(urls))
        return [100 + number for number, _ in enumerate(urls)]


def compiled(body: str, links: LinkTable | None = None, **parts: Any) -> CompiledMessage:
    content = Content(**{"subject": "News", "from_address": "news@example.test", "body": body} | parts)
    return compile_content(content, FIELDS, links or LinkTable())


VALUES = {"unsubscribe_url": "[unsubscribe]", "_link_100": "[link 100]", "_link_101": "[link 101]", "_link_102": "[link 102]"}


def html_of(message: CompiledMessage, **values: Any) -> str:
    return message.html.render(VALUES | values)


def text_of(message: CompiledMessage, **values: Any) -> str:
    return message.text.render(VALUES | values)


def mjml(inner: str) -> str:
    return f"<mjml><mj-body>\n<mj-section><mj-column>\n{inner}\n<mj-text>{END}</mj-text></mj-column></mj-section></mj-body></mjml>"


# --- HTML -------------------------------------------------------------------------------------------------------


def test_styles_are_inlined_and_stay_for_media_queries() -> None:
    made = html_of(compiled(f"<style>p{{color:red}} a:hover{{color:blue}} @media print{{p{{color:green}}}}</style><p>{{{{ city }}}}</p>{END}"))
    assert '<p style="color: red;"></p>' in made
    assert "@media print{p{color:green}}" in made
    assert "a:hover{color:blue}" in made


def test_no_stylesheet_is_fetched_from_network_or_disk(tmp_path: Any) -> None:
    sheet = tmp_path / "local.css"
    sheet.write_text("p{color:red}")
    made = html_of(compiled(f'<link rel="stylesheet" href="{sheet}"><link rel="stylesheet" href="file://{sheet}"><p>x</p>{END}'))
    assert "<p>x</p>" in made


@pytest.mark.parametrize(
    "quoted",
    [
        '<a href="https://shop.example.test/{{ city }}">x</a>',
        "<a href='{{ city|default(\"a\")|upper }}'>x</a>",
        '<p title="{% if vip %}a{% else %}b{% endif %}">x</p>',
        '<p style="color: {{ city }}; margin: 0">x</p>',
        '<img src="https://images.example.test/{{ city }}.png" alt="{{ first_name }}">',
        "<!-- {{ city }} --><!--[if mso]><p>{{ city }}{% if vip %}x{% endif %}</p><![endif]-->",
    ],
)
def test_tags_stay_where_they_are_in_attributes_and_comments(quoted: str) -> None:
    message = compiled(f"<style>p{{margin:1px}}</style>{quoted}{END}")
    expected = {"city": "Rome", "vip": True, "first_name": "Ada"}
    made = html_of(message, **expected)
    assert "zq" not in made
    assert "Rome" in made or "a" in made
    assert "{{" not in made
    assert "{%" not in made


def test_conditions_may_stand_between_table_rows() -> None:
    body = f"<table><tr><td>a</td></tr>{{% if vip %}}<tr><td>only {{{{ city }}}}</td></tr>{{% endif %}}</table>{END}"
    message = compiled(body)
    rows = [[node.text() for node in LexborHTMLParser(html_of(message, vip=vip, city="Rome")).css("td")] for vip in (True, False)]
    assert rows == [["a", "only Rome"], ["a"]]
    assert "only Rome" in text_of(message, vip=True, city="Rome")
    assert "only" not in text_of(message, vip=False)


def test_values_are_escaped_in_html_and_not_in_text() -> None:
    message = compiled(f"<p>{{{{ city }}}}</p>{{% if vip %}}<p>{{{{ city }}}}</p>{{% endif %}}{END}")
    assert isinstance(message.html, Script)
    assert html_of(message, city="<b>&", vip=True).count("<p>&lt;b&gt;&amp;</p>") == 2
    assert text_of(message, city="<b>&", vip=True).count("<b>&\n") == 2


def test_marks_are_not_mistaken_for_the_authors_words() -> None:
    assert "<p>zq0z zqq0z Rome</p>" in html_of(compiled(f"<p>zq0z zqq0z {{{{ city }}}}</p>{END}"), city="Rome")


@pytest.mark.parametrize(
    "written", ["&#123;&#123; city.__class__ }}", "&lbrace;% for a in range(9) %}x", "&#123;# hidden #}", "&#123;{{ city }}", "{ { city }}"]
)
def test_braces_that_come_in_as_entities_are_text(written: str) -> None:
    message = compiled(f"<p title='{written}'>{written}</p>{END}")
    expected = html.unescape(written).replace("{{{ city }}", "{Rome")
    node = LexborHTMLParser(html_of(message, city="Rome")).css_first("p")
    assert node is not None
    assert (node.text(), node.attributes["title"]) == (expected, expected)
    assert text_of(message, city="Rome").startswith(expected)


def test_a_comment_of_one_tag_stays_a_comment() -> None:
    made = html_of(compiled(f"<p>x<!--{{{{ city }}}}--><!--{{% if vip %}}-->x<!--{{% endif %}}-->{END}"), city="Rome", vip=True)
    assert "<p>x<!--Rome--><!---->x<!---->" in made


def test_the_preheader_comes_first_and_is_escaped() -> None:
    message = compiled(f"<html><body class='x'><p>Hello</p>{END}</body></html>", preheader="<Only> for {{ first_name|default('you') }}")
    body = LexborHTMLParser(html_of(message, first_name="Ada")).body
    assert body is not None
    assert next(node.text() for node in body.iter()) == "<Only> for Ada"
    assert "Only" not in text_of(message)


words = st.text(st.characters(exclude_categories=["Cs", "Cc"], exclude_characters="{}#%\xa0"), max_size=30).map(lambda text: " ".join(text.split()))


@given(st.lists(words, min_size=1, max_size=5), words)
def test_text_and_values_come_through_the_html_tools_unharmed(paragraphs: list[str], city: str) -> None:
    body = "".join(f"<p title='{html.escape(text)}'>{html.escape(text)}|{{{{ city }}}}</p>" for text in paragraphs) + END
    made = compiled(body)
    assert isinstance(made.html, Pieces)
    rendered = "".join(
        part
        for pair in zip(made.html.literals, [*(html.escape(slot.text(VALUES | {"city": city})) for slot in made.html.slots), ""], strict=True)
        for part in pair
    )
    nodes = LexborHTMLParser(rendered).css("p")
    assert [node.text() for node in nodes] == [f"{text}|{city}" for text in paragraphs]
    assert [node.attributes["title"] or "" for node in nodes] == paragraphs


# --- MJML -------------------------------------------------------------------------------------------------------


def test_mjml_becomes_html_with_its_variables_links_and_conditions() -> None:
    links = LinkTable()
    body = mjml(
        """<mj-text>Hello {{ first_name }} {% if vip %}<b>VIP</b>{% endif %}</mj-text>
        {% if vip %}<mj-button href="https://shop.example.test/">Shop</mj-button>{% endif %}
        <mj-image src="https://images.example.test/{{ city }}.png" href="https://shop.example.test/{{ city }}" alt="Map" />"""
    )
    message = compiled(body, links, body_format="mjml")
    made = html_of(message, first_name="Ada", city="Rome", vip=True)
    assert made.startswith("<!DOCTYPE html>")
    assert "Hello Ada <b>VIP</b>" in made
    assert 'href="[link 100]"' in made
    assert 'src="https://images.example.test/Rome.png"' in made
    assert "mj-text" not in made
    assert "Shop" not in html_of(message, vip=False)
    assert links.asked == [["https://shop.example.test/"]]
    assert text_of(message, first_name="Ada", city="Rome", vip=True) == (
        "Hello Ada VIP\nShop ([link 100])\n[Map]\n(https://shop.example.test/Rome)\nUnsubscribe ([unsubscribe])\n"
    )


@pytest.mark.parametrize(
    ("body", "line", "message"),
    [
        (f"<p>{END}</p>", 1, "no valid MJML"),
        (f"<mjml><mj-body>\n<mj-section>{{{{ city }}}}\n</mj-body>{END}</mjml>", None, "no valid MJML"),
        (f"<mjml><mj-body>\n\n<mj-include path='/etc/passwd' />{END}</mj-body></mjml>", 3, "no valid MJML"),
        (f"<mjml><mj-body><mj-raw>{{{{ city|default('a longer\ntext') }}}}</mj-raw>\n\n<mj-include path='x' />{END}</mj-body></mjml>", 4, "no valid MJML"),
        (mjml("<mj-txt>Hello</mj-txt>"), 3, "unknown MJML element <mj-txt>"),
    ],
)
def test_mjml_mistakes_are_named_with_their_line(body: str, line: int | None, message: str) -> None:
    with pytest.raises(ContentError, match=message) as caught:
        compiled(body, body_format="mjml")
    assert (caught.value.part, caught.value.line) == ("body", line)


def test_a_tag_that_mjml_would_drop_is_named() -> None:
    body = mjml('<mj-text colour="{{ city }}">a</mj-text>')
    with pytest.raises(ContentError, match=r"\{\{ city \}\} stands where rendering loses it") as caught:
        compiled(body, body_format="mjml")
    assert caught.value.line == 3


def test_mjml_loads_no_font_from_a_foreign_host() -> None:
    assert "http" not in html_of(compiled(mjml("<mj-text>a</mj-text>"), body_format="mjml")).replace("http://www.w3.org", "").replace("http-equiv", "")


# --- links ------------------------------------------------------------------------------------------------------


def test_links_are_tracked_once_each_in_html_and_text() -> None:
    links = LinkTable()
    message = compiled(
        f"""<a href="https://a.example.test/?x=1&amp;y=2">one</a> <a href=" HTTP://b.example.test ">two</a>
        <a href="https://a.example.test/?x=1&amp;y=2">again</a><map><area href="https://c.example.test/" alt=""></map>{END}""",
        links,
    )
    assert links.asked == [["https://a.example.test/?x=1&y=2", "HTTP://b.example.test", "https://c.example.test/"]]
    assert message.link_ids == (100, 101, 102)
    assert html_of(message).count('href="[link 100]"') == 2
    assert 'href="[link 101]"' in html_of(message)
    assert 'href="[link 102]"' in html_of(message)
    assert text_of(message) == "one ([link 100]) two ([link 101]) again ([link 100])Unsubscribe ([unsubscribe])\n"


def test_links_stay_as_they_are_without_tracking() -> None:
    links = LinkTable()
    message = compiled(f'<a href="https://a.example.test/?x=1&amp;y=2">one</a>{END}', links, tracking=False)
    assert links.asked == []
    assert message.link_ids == ()
    assert 'href="https://a.example.test/?x=1&amp;y=2"' in html_of(message)
    assert "one (https://a.example.test/?x=1&y=2)" in text_of(message)


def test_a_link_with_a_variable_or_another_scheme_is_not_tracked() -> None:
    links = LinkTable()
    body = f'<a href="https://a.example.test/{{{{ city }}}}">x</a><a href="mailto:a@b.test">y</a><a href="tel:+1">z</a><a href="#top">t</a>{END}'
    message = compiled(body, links)
    assert links.asked == []
    assert 'href="https://a.example.test/Rome"' in html_of(message, city="Rome")
    assert 'href="mailto:a@b.test"' in html_of(message)


@pytest.mark.parametrize("href", ["/offers", "offers.html", "", "www.example.test"])
def test_a_link_that_leads_nowhere_from_a_mail_is_refused(href: str) -> None:
    with pytest.raises(ContentError, match="leads nowhere from a mail"):
        compiled(f'<a href="{href}">x</a>{END}')


# --- text -------------------------------------------------------------------------------------------------------


def test_a_given_text_is_taken_with_its_links_tracked() -> None:
    links = LinkTable()
    text = """See https://a.example.test/x?y=1. Or (https://b.example.test/)!
https://a.example.test/{{ city }} {{ first_name }}https://b.example.test/
{{ unsubscribe_url }}"""
    message = compiled(f'<a href="https://b.example.test/">b</a>{END}', links, text=text)
    assert links.asked == [["https://b.example.test/", "https://a.example.test/x?y=1"]]
    assert text_of(message, city="Rome", first_name="Ada") == ("See [link 101]. Or ([link 100])!\nhttps://a.example.test/Rome Ada[link 100]\n[unsubscribe]\n")


def test_a_derived_text_reads_well() -> None:
    message = compiled(
        f"""<html><head><title>T</title><style>p{{color:red}}</style></head><body>
        <h1>Hello  {{{{ first_name }}}}</h1><table><tr><td>Pen</td><td>1.50</td></tr><tr><td>Ink</td><td>3.20</td></tr></table>
        <ul><li>one</li><li>two</li></ul><div style="display:none">hidden</div><script>x()</script>
        <p>a &amp; b<br>c</p><a href="https://a.example.test/">https://a.example.test/</a><p>{END}</p></body></html>""",
        tracking=False,
    )
    assert text_of(message, first_name="Ada") == (
        "Hello Ada\n\nPen 1.50\nInk 3.20\n  * one\n  * two\n\na & b\nc\n\nhttps://a.example.test/\n\nUnsubscribe ([unsubscribe])\n"
    )


# --- refusals ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("parts", "part", "line", "variable"),
    [
        ({"subject": "{{ frist_name }}"}, "subject", 1, "frist_name"),
        ({"subject": "{{ unsubscribe_url }}"}, "subject", 1, "unsubscribe_url"),
        ({"preheader": "{{ nme }}"}, "preheader", 1, "nme"),
        ({"body": f"<p>\n<b>\n{{{{ citty }}}}</b>{END}"}, "body", 3, "citty"),
        ({"text": "x\n{{ citty }}\n{{ unsubscribe_url }}"}, "text", 2, "citty"),
        ({"body": "<p>Hello</p>"}, "body", None, "unsubscribe_url"),
        ({"body": f"{{% if vip %}}{END}{{% endif %}}"}, "body", None, "unsubscribe_url"),
        ({"body": f"Hello <!-- {END} -->"}, "body", None, "unsubscribe_url"),
        ({"body": f"Hello <div style='display: none'>{END}</div>"}, "body", None, "unsubscribe_url"),
        ({"body": f'{END}\n<a href="/x">x</a>'}, "body", 2, None),
        ({"text": "Hello"}, "text", None, "unsubscribe_url"),
        ({"body": f"\n<a href={{{{ city }}}}>x</a>{END}"}, "body", 2, None),
        ({"body": f"\n<p {{% if vip %}}class='a'{{% endif %}}>x</p>{END}"}, "body", 2, None),
        ({"body": f"\n<style>p{{color: {{{{ city }}}}}}</style>{END}"}, "body", 2, None),
        ({"body": f"{END}\n<table>{{% if vip %}}<tr><td>a{{% endif %}}</td></tr></table>{{% raw %}}x{{% endraw %}}"}, "body", 2, None),
        ({"body": f"<style>p{{{{% if</style>{END}"}, "body", 1, None),
    ],
)
def test_what_cannot_work_is_refused_with_its_place(parts: dict[str, str], part: str, line: int | None, variable: str | None) -> None:
    with pytest.raises(ContentError) as caught:
        compiled(**{"body": END} | parts)
    assert (caught.value.part, caught.value.line, caught.value.variable) == (part, line, variable)


# --- compiled form ----------------------------------------------------------------------------------------------


def test_a_compiled_message_survives_its_bytes() -> None:
    body = f"<a href='https://a.example.test/'>ü {{{{ city|default('x', true)|upper }}}}</a>{END}"
    for text in (None, "{% if vip %}{{ first_name }}{% endif %}{{ unsubscribe_url }}"):
        message = compiled(body, text=text, subject="{{ points }}", reply_to="answers@example.test")
        again = CompiledMessage.from_bytes(message.to_bytes())
        assert again == message
        assert again.sha256 == message.sha256 != compiled(body, subject="other").sha256


def test_compiling_twice_gives_the_same_bytes() -> None:
    body = f"<p>{{% if vip %}}{{{{ city }}}}{{% endif %}}</p>{END}"
    assert compiled(body).to_bytes() == compiled(body).to_bytes()


def test_the_variables_are_the_fields_a_recipient_needs() -> None:
    message = compiled(f"<a href='https://a.example.test/'>{{{{ city }}}}</a>{{% if vip %}}{{{{ email }}}}{{% endif %}}{END}", subject="{{ points }}")
    assert message.variables == ("city", "points", "vip")


@pytest.mark.parametrize("data", [b"", b"{}", b"[]", b"\xff", b'{"form": 1}', b'{"form": 99}', b"null"])
def test_foreign_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(CompiledMessageError, match="compile the campaign's content again"):
        CompiledMessage.from_bytes(data)


def test_loading_and_composing_imports_nothing_heavy(tmp_path: Any) -> None:
    for name, body in {"slots": f"<p>{{{{ city }}}}</p>{END}", "script": f"{{% if vip %}}x{{% endif %}}{END}"}.items():
        file = tmp_path / name
        file.write_bytes(compiled(body).to_bytes())
        program = f"""
import datetime as dt, pathlib, sys
from mail_pipelines.messages.compiled import CompiledMessage
from mail_pipelines.messages.composing import Recipient, SenderIdentity, compose
sender = SenderIdentity(b"k", "bounces.example.test", "https://mail.example.test", dt.datetime(2026, 1, 1, tzinfo=dt.UTC), "c", "b", "sender")
compose(CompiledMessage.from_bytes(pathlib.Path({str(file)!r}).read_bytes()), Recipient(1, 2, 0, "a@b.test", {{}}), sender)
print(*sorted({{"mjml", "css_inline", "inscriptis", "selectolax", "lxml", "pandas", "pyarrow", "duckdb", "dagster", "jinja2"}} & set(sys.modules)))
"""
        loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()
        assert loaded == (["jinja2"] if name == "script" else [])
