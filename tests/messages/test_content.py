"""A content is checked when it is made, and survives the way through a JSON document."""

from __future__ import annotations

import json
from typing import Any

import pytest

from mail_pipelines.messages.content import Content, ContentError

GIVEN: dict[str, Any] = {"subject": "News", "from_address": "news@example.test", "body": "<p>Hello</p>"}


def test_a_content_survives_its_document() -> None:
    content = Content(**GIVEN, from_name="Größe", preheader="first", reply_to="a@b.test", body_format="mjml", text="Hello", tracking=False)
    assert Content.from_document(json.loads(json.dumps(content.to_document()))) == content


def test_what_a_document_leaves_out_has_its_default() -> None:
    content = Content.from_document(GIVEN)
    assert (content.from_name, content.reply_to, content.body_format, content.text, content.tracking) == ("", None, "html", None, True)


@pytest.mark.parametrize(
    ("change", "part", "message"),
    [
        ({"subjet": "News"}, "subjet", "did you mean 'subject'"),
        ({"subject": "  "}, "subject", "is empty"),
        ({"subject": 5}, "subject", "expected text, got int"),
        ({"subject": None}, "subject", "expected text, got NoneType"),
        ({"subject": "News\r\nBcc: all@example.test"}, "subject", "one line"),
        ({"from_name": "News\nBcc: all@example.test"}, "from_name", "one line"),
        ({"body": ""}, "body", "is empty"),
        ({"body_format": "markdown"}, "body_format", "expected one of html, mjml"),
        ({"from_address": "news"}, "from_address", "has no '@'"),
        ({"from_address": "n ews@example.test"}, "from_address", "cannot stand before"),
        ({"from_address": "news@example.test>\r\nBcc: all@example.test"}, "from_address", "cannot be used"),
        ({"reply_to": "answers@"}, "reply_to", "cannot be used"),
        ({"tracking": "yes"}, "tracking", "expected true or false"),
    ],
)
def test_a_wrong_part_is_named(change: dict[str, Any], part: str, message: str) -> None:
    with pytest.raises(ContentError, match=message) as caught:
        Content.from_document(GIVEN | change)
    assert caught.value.part == part
    assert str(caught.value).startswith(part)


@pytest.mark.parametrize("part", ["subject", "from_address", "body"])
def test_a_missing_part_is_named(part: str) -> None:
    with pytest.raises(ContentError, match=f"{part}: is missing"):
        Content.from_document({name: value for name, value in GIVEN.items() if name != part})


def test_the_error_about_an_address_does_not_show_it() -> None:
    with pytest.raises(ContentError) as caught:
        Content.from_document(GIVEN | {"reply_to": "mary.jones@@example.test"})
    assert "jones" not in str(caught.value)
