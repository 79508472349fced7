"""A campaign file says what it means, comes back as it was, and every mistake in it is named with its place."""

from __future__ import annotations

import datetime as dt
import string

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mail_pipelines.campaigns.campaign import Definition, OnUnknown, Priority, Unsubscribe
from mail_pipelines.campaigns.yaml_form import Document, FormError, parse, render
from mail_pipelines.keys import slug
from mail_pipelines.messages.content import Content

SALE = """
name: Spring Sale
brand: shop
pool: warm
segments:
  include: [buyers, friends, buyers]
  exclude: [mailed-this-week]
unsubscribe: list news
on_unknown: resend
priority: high
start_at: 2026-03-02T09:00:00+01:00
finish_by: "2026-03-02T20:00:00Z"
content:
  subject: Hello {{ first_name }}
  from_address: news@shop.example
  from_name: The Shop
  body: |
    <p>Hello</p>
    <p><a href="{{ unsubscribe_url }}">Leave</a></p>
"""


def test_a_file_says_what_it_means() -> None:
    document = parse(SALE)
    assert document.definition == Definition(
        name="Spring Sale",
        key="spring-sale",
        include=("buyers", "friends"),
        exclude=("mailed-this-week",),
        brand="shop",
        pool="warm",
        unsubscribe=Unsubscribe.LIST,
        list="news",
        on_unknown=OnUnknown.RESEND,
        priority=Priority.HIGH,
        start_at=dt.datetime(2026, 3, 2, 8, tzinfo=dt.UTC),
        finish_by=dt.datetime(2026, 3, 2, 20, tzinfo=dt.UTC),
    )
    assert document.content is not None
    assert document.content.body.splitlines()[0] == "<p>Hello</p>"


def test_little_is_enough_for_a_draft() -> None:
    assert parse("{name: Hello, segments: {include: [everybody]}}") == Document(Definition(name="Hello", key="hello", include=("everybody",)), None)


TEXT = st.text(st.characters(exclude_categories=["Cs", "Cc"], include_characters="\n\t"), max_size=60)
LINE = TEXT.map(lambda text: text.replace("\n", " "))
KEYS = st.text(string.ascii_lowercase + string.digits + "-", min_size=1, max_size=20).map(lambda text: slug("k" + text))
TIMES = st.none() | st.datetimes(dt.datetime(2000, 1, 1), dt.datetime(2100, 1, 1), timezones=st.just(dt.UTC))
CONTENTS = st.builds(
    Content,
    subject=LINE.map(lambda text: "s" + text),
    from_address=st.just("news@shop.example"),
    body=TEXT.map(lambda text: text + "b"),
    from_name=LINE,
    preheader=LINE,
    reply_to=st.none() | st.just("help@shop.example"),
    body_format=st.sampled_from(["html", "mjml"]),
    text=st.none() | TEXT,
    tracking=st.booleans(),
)


@st.composite
def documents(draw: st.DrawFn) -> Document:
    list_key = draw(st.none() | KEYS)
    definition = Definition(
        name=draw(LINE.filter(str.strip)),
        key=draw(KEYS),
        include=tuple(draw(st.lists(KEYS, unique=True, max_size=3))),
        exclude=tuple(draw(st.lists(KEYS, unique=True, max_size=3))),
        brand=draw(KEYS),
        pool=draw(KEYS),
        overflow_pool=draw(st.none() | KEYS),
        unsubscribe=Unsubscribe.LIST if list_key else draw(st.sampled_from([Unsubscribe.ALL, Unsubscribe.BRAND])),
        list=list_key,
        on_unknown=draw(st.sampled_from(OnUnknown)),
        priority=draw(st.sampled_from(Priority)),
        start_at=draw(TIMES),
        finish_by=draw(TIMES),
        expire_at=draw(TIMES),
    )
    return Document(definition, draw(st.none() | CONTENTS))


@pytest.mark.slow
@settings(max_examples=300)
@given(documents())
def test_what_is_exported_is_imported_as_it_was(document: Document) -> None:
    assert parse(render(document)) == document


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (("brand:", "brnd:"), r"brnd: unknown key; did you mean 'brand'\?"),
        (("  include:", "  includes:"), r"segments\.includes: unknown key; did you mean 'include'\?"),
        (("subject:", "subjekt:"), r"content\.subjekt: .*did you mean 'subject'\?"),
        (("[buyers, friends, buyers]", "buyers"), r"segments\.include: expected a list of segment keys, got str 'buyers'"),
        (("[buyers, friends, buyers]", "[buyers, Friends!]"), r"segments\.include\[1\]: 'Friends!' is no valid key.*'friends' would be one"),
        (("[buyers, friends, buyers]", "[buyers, 7]"), r"segments\.include\[1\]: expected text, got int 7"),
        (("list news", "list"), r"unsubscribe: expected all, brand, or list NAME, got str 'list'"),
        (("list news", "everything"), r"unsubscribe: expected all, brand, or list NAME"),
        (("priority: high", "priority: 3"), r"priority: expected low, normal, high, urgent, got int 3"),
        (("resend", "never"), r"on_unknown: expected hold, resend, got str 'never'"),
        (("2026-03-02T09:00:00+01:00", "2026-03-02T09:00:00"), r"start_at: expected a time with its zone.*without a zone"),
        (("2026-03-02T09:00:00+01:00", "2026-03-02"), r"start_at: expected a time with its zone"),
        (("2026-03-02T09:00:00+01:00", "tomorrow"), r"start_at: expected a time with its zone.*'tomorrow'"),
        (("2026-03-02T20:00:00Z", "2026-03-02T20:00:00"), r"finish_by: expected a time with its zone"),
        (("name: Spring Sale", "name: 5"), r"name: expected text, got int 5"),
        (("name: Spring Sale", "name: 日本語"), r"name: no campaign key can be made of the name.*give a key"),
        (("name: Spring Sale", "title: x"), r"title: unknown key"),
        (("name: Spring Sale\n", ""), r"name: is missing"),
        (("  include: [buyers, friends, buyers]\n", ""), r"segments\.include: is missing"),
        (("news@shop.example", "shop.example"), r"content\.from_address: .*no '@'"),
        (("  from_name: The Shop", "  tracking: 1"), r"content\.tracking: expected true or false, got int"),
        (("brand: shop", "brand: shop\nbrand: other"), r"line 4: no valid YAML: brand is given twice"),
        (("brand: shop", "brand: [shop"), r"line \d+: no valid YAML"),
        (("brand: shop", "brand: !!python/object/apply:os.system [ls]"), r"line 3: no valid YAML"),
        (("brand: shop", "? [a]\n: b"), r"line 3: no valid YAML"),
        (('finish_by: "2026-03-02T20:00:00Z"', "finish_by: 2026-02-31T00:00:00Z"), r"no valid YAML: day is out of range"),
    ],
)
def test_a_mistake_is_named_with_its_place(change: tuple[str, str], error: str) -> None:
    text = SALE.replace(*change, 1)
    assert text != SALE
    with pytest.raises(FormError, match=error):
        parse(text)


@pytest.mark.parametrize("text", ["", "- a\n- b", "just text", "segments: 5\nname: x", "content: 5\nname: x\nsegments: {include: [a]}", "[" * 1000])
def test_a_document_of_another_shape_is_refused(text: str) -> None:
    with pytest.raises(FormError, match=r"expected a mapping|no valid YAML"):
        parse(text)
