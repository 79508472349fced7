"""Composed messages are what the standard library would build from the same parts, and no value can change their form."""

from __future__ import annotations

import dataclasses
import datetime as dt
import email
import email.policy
from collections.abc import Mapping
from email.message import EmailMessage
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from mail_pipelines.messages.compilation import compile_content
from mail_pipelines.messages.compiled import BUILT_INS, CompiledMessage, Pieces, link_variable
from mail_pipelines.messages.composing import ComposeError, Message, Recipient, SenderError, SenderIdentity, compose
from mail_pipelines.messages.content import Content
from mail_pipelines.messages.headers import mailbox
from mail_pipelines.messages.language import check, cut, environment
from mail_pipelines.messages.tokens import DeliveryToken, LinkKind, LinkToken, read_delivery, read_link, sign_link
from mail_pipelines.messages.values import body_text, header_text

FIELDS = {"first_name": "text", "city": "text", "points": "number"}
KEY = b"a key of the tests"
SENDER = SenderIdentity(
    token_key=KEY,
    return_path_domain="bounces.example.test",
    public_url="https://mail.example.test/",
    date=dt.datetime(2026, 11, 24, 8, 30, tzinfo=dt.UTC),
    campaign_key="autumn",
    brand="shop",
    sender_id="shop-1",
)
END = '<a href="{{ unsubscribe_url }}">Unsubscribe</a>'


def message_of(subject: str, text: str, html: str, *, from_name: str = "The Shop", link_ids: tuple[int, ...] = ()) -> CompiledMessage:
    """A compiled message whose templates are exactly these: no tool for HTML has touched them."""
    variables = {**FIELDS, **BUILT_INS, **{link_variable(link_id): "text" for link_id in link_ids}}
    for part in (subject, text, html):
        check(part, "body", variables)
    from_header = mailbox("From", from_name, "news@example.test")
    return CompiledMessage(from_header, "", cut(subject, False, variables), cut(text, False, variables), cut(html, True, variables), "=_boundary", link_ids)


def recipient(email: str = "ada@example.test", **values: Any) -> Recipient:
    return Recipient(campaign_id=7, contact_id=8, attempt=1, email=email, values=values)


def parse(message: Message) -> EmailMessage:
    parsed = email.message_from_bytes(message.data, policy=email.policy.default)
    assert isinstance(parsed, EmailMessage)
    assert not parsed.defects
    return parsed


def assert_well_formed(data: bytes) -> None:
    lines = data.split(b"\r\n")
    assert lines.pop() == b""
    assert not any(control in line for line in lines for control in (b"\r", b"\n", b"\0"))
    assert data.isascii()
    assert max(map(len, lines)) <= 998
    header = data[: data.index(b"\r\n\r\n")].split(b"\r\n")
    assert not any(line.strip() == b"" for line in header)


def parts_of(message: Any) -> list[tuple[str, str | None, str]]:
    return [(part.get_content_type(), part.get_content_charset(), part.get_content().replace("\r\n", "\n")) for part in message.iter_parts()]


def built(source: tuple[str, str, str], values: Mapping[str, Any]) -> EmailMessage:
    """The same message, by Jinja and the standard library alone."""
    everything = dict.fromkeys([*FIELDS, *BUILT_INS]) | dict(values)
    subject, text, html = (environment(html).from_string(part).render(everything) for part, html in zip(source, (False, False, True), strict=True))
    made = EmailMessage()
    made["From"] = "The Shop <news@example.test>"
    made["To"] = everything["email"]
    made["Subject"] = header_text(subject)
    made.set_content(body_text(text))
    made.add_alternative(body_text(html), subtype="html")
    return made


names = st.sampled_from(["first_name", "city", "points", "email", "unsubscribe_url"])
filters = st.sampled_from(["|upper", "|title", "|trim", "|default('=3D \"you\" <é>')"])
expressions = st.builds(lambda name, chain: f"{{{{ {name}{''.join(chain)} }}}}", names, st.lists(filters, max_size=2))
conditions = st.builds(lambda name, inner: f"{{% if {name} %}}{inner}{{% else %}}-{{% endif %}}", names, expressions)
literals = st.text(st.characters(exclude_characters="{}#%\r\0", exclude_categories=["Cs", "Cc"]), max_size=90) | st.sampled_from(
    ["\n", "\n.\n", "..", " \n", "=", "=3D", "\t", "From me\n", "--=_boundary--\n", "a" * 75, "a" * 76, "a" * 77, "https://example.test/?a=b"]
)
simple = st.lists(expressions | literals, max_size=10).map("".join)
templates = simple | st.lists(expressions | conditions | literals, max_size=10).map("".join)
subjects = st.lists(expressions | st.text("abc äö😀'\"<>@,;:", max_size=30), max_size=5).map("".join)
texts = st.text(max_size=120).filter(lambda text: "=?" not in text)
values_of = st.fixed_dictionaries({}, optional={"first_name": st.none() | texts, "city": texts, "points": st.integers() | st.floats(allow_nan=False)})


@pytest.mark.slow
@given(subjects, templates, templates, values_of)
@example("{{ city }}", "{{ city }}", "<p>{{ city }}</p>", {"city": "Rome\r\nBcc: everyone@example.test\r\n\r\nHello"})
@example("{{ city }}", "{{ city }}{{ first_name }}", "{{ city }}{{ first_name }}", {"city": "", "first_name": " "})
@example("{{ city }}", "{{ city }}", "{{ city }}", {"city": "x" * 5000})
@example("{{ city }}", "a={{ city }}=b", "<a href='x?y={{ city }}=1'>", {"city": "=3D="})
@example("{{ city }}", ".{{ city }}\n.{{ city }}", ".", {"city": "."})
@example("{{ city }}", "{{ city }}", "{{ city }}", {"city": "a\0b\x1b\x7f\tc\x0bd"})
@example("{{ city }}", "{{ city }}", "{{ city }}", {"city": "👩‍👩‍👧 ü \u2028 \x85 \ud83d end "})
@example("{{ city }}" * 9, "{{ city }}" * 99, "{{ city }}" * 99, {"city": "Łódź "})
@example("{{ city }}", "{{ city }}", "{{ city }}", {"city": "--=_boundary--\r\n"})
@example("{{ city }}", "{{ city }}", "{{ city }}", {"city": ["no", {"text": 1}]})
def test_a_message_is_the_one_the_standard_library_would_build(subject: str, text: str, html: str, values: dict[str, Any]) -> None:
    text, html = f"{text}\n", f"{html}\n"
    made = compose(message_of(subject, text, html), recipient(**values), SENDER)
    assert_well_formed(made.data)
    assert max(map(len, made.data.split(b"\r\n"))) <= 140
    parsed = parse(made)
    unsubscribe = SENDER.unsubscribe_url + sign_link(LinkToken(7, 8, 0, LinkKind.UNSUBSCRIBE), KEY)
    expected = built((subject, text, html), {**values, "email": "ada@example.test", "unsubscribe_url": unsubscribe})
    for name in ("From", "To", "Subject"):
        assert parsed[name] == expected[name]
    assert parsed.get_content_type() == expected.get_content_type() == "multipart/alternative"
    assert parts_of(parsed) == parts_of(email.message_from_bytes(expected.as_bytes(policy=email.policy.SMTP), policy=email.policy.default))


def test_the_headers_stand_in_a_constant_order() -> None:
    content = Content("Hi", "news@example.test", END, reply_to="answers@example.test")
    parsed = parse(compose(compile_content(content, FIELDS, lambda urls: []), recipient(), SENDER))
    assert parsed.keys() == [
        "From", "To", "Reply-To", "Subject", "Date", "Message-ID", "List-Unsubscribe", "List-Unsubscribe-Post", "Feedback-ID", "MIME-Version", "Content-Type",
    ]  # fmt: skip
    assert parsed["Reply-To"] == "answers@example.test"
    assert parsed["Date"] == "Tue, 24 Nov 2026 08:30:00 +0000"
    assert parsed["Feedback-ID"] == "autumn:shop:shop-1"
    assert parsed["MIME-Version"] == "1.0"


def test_one_click_unsubscribe_is_offered_as_rfc_8058_wants() -> None:
    made = compose(message_of("Hi", "{{ unsubscribe_url }}\n", "{{ unsubscribe_url }}\n"), recipient(), SENDER)
    parsed = parse(made)
    web, mail = parsed["List-Unsubscribe"].split(", ")
    assert parsed["List-Unsubscribe-Post"] == "List-Unsubscribe=One-Click"
    prefix = "<https://mail.example.test/u/"
    assert web.startswith(prefix)
    assert read_link(web.removeprefix(prefix).removesuffix(">"), KEY) == LinkToken(7, 8, 0, LinkKind.UNSUBSCRIBE)
    assert mail == f"<mailto:u+{made.token}@bounces.example.test>"
    assert web[1:-1] == parsed.get_body(("plain",)).get_content().strip() == parsed.get_body(("html",)).get_content().strip()  # type: ignore[union-attr]
    assert web.encode() in made.data


def test_the_return_path_and_the_message_id_name_the_attempt() -> None:
    made = compose(message_of("Hi", "x\n", "x\n"), recipient(), SENDER)
    assert read_delivery(made.token, KEY) == DeliveryToken(7, 8, 1)
    assert made.envelope_sender == f"b+{made.token}@bounces.example.test"
    assert len(made.envelope_sender.partition("@")[0]) <= 64
    assert parse(made)["Message-ID"] == f"<{made.token}@bounces.example.test>"


def test_a_retry_of_an_attempt_is_the_same_message_and_a_new_attempt_is_not() -> None:
    message = message_of("Hi", "x\n", "x\n")
    later = dataclasses.replace(SENDER, date=dt.datetime(2026, 11, 25, tzinfo=dt.UTC))
    first, again = compose(message, recipient(), SENDER), compose(message, recipient(), later)
    assert parse(first)["Message-ID"] == parse(again)["Message-ID"]
    second = compose(message, Recipient(7, 8, 2, "ada@example.test", {}), SENDER)
    assert parse(second)["Message-ID"] != parse(first)["Message-ID"]


def test_tracked_links_lead_through_the_counter_and_name_recipient_and_link() -> None:
    for condition in ("", "{% if city %}{% endif %}"):
        content = Content("Hi", "news@example.test", f'{condition}<a href="https://a.example.test/?x=1">a</a><a href="https://b.example.test/">b</a>{END}')
        made = compose(compile_content(content, FIELDS, lambda urls: [41, 42]), recipient(), SENDER)
        parsed = parse(made)
        for kind in ("plain", "html"):
            part = parsed.get_body((kind,))
            assert part is not None
            for link_id in (41, 42):
                assert f"https://mail.example.test/c/{sign_link(LinkToken(7, 8, link_id, LinkKind.CLICK), KEY)}" in part.get_content()
        assert b"example.test/?x" not in made.data


def test_an_international_domain_is_in_a_labels_and_the_local_part_as_given() -> None:
    made = compose(message_of("Hi", "x\n", "x\n"), recipient("Ada.L@Bücher.example"), SENDER)
    assert made.recipient == "Ada.L@xn--bcher-kva.example"
    assert parse(made)["To"] == "Ada.L@xn--bcher-kva.example"


@pytest.mark.parametrize(
    "address", ["ada", "ädä@example.test", "ada@example.test\r\nBcc: all@example.test", "a b@example.test", "ada@example.test, x@y.test", ""]
)
def test_an_unusable_address_is_refused_without_showing_it(address: str) -> None:
    with pytest.raises(ComposeError, match="contact 8 of campaign 7") as caught:
        compose(message_of("Hi", "x\n", "x\n"), recipient(address), SENDER)
    assert "ada" not in str(caught.value)


@pytest.mark.parametrize(
    "value", ["x\r\nBcc: all@example.test", "x\nBcc: all@example.test", "x\rBcc: all@example.test", "x\r\n\r\nbody", "x\0\r\n.\r\n", "x\u2028Bcc: y"]
)
def test_a_value_cannot_add_a_header_or_end_the_message(value: str) -> None:
    made = compose(message_of("Hi {{ city }}", "{{ city }}\n", "{{ city }}\n", from_name=value), recipient(city=value), SENDER)
    assert_well_formed(made.data)
    parsed = parse(made)
    assert "Bcc" not in parsed
    assert len(list(parsed.iter_parts())) == 2
    assert parsed["Subject"].startswith("Hi x")


def test_a_condition_that_fails_on_a_value_names_the_contact_and_not_the_value() -> None:
    message = message_of("Hi", "{% if points and points > 3 %}x{% endif %}\n", "x\n")
    with pytest.raises(ComposeError, match="contact 8 of campaign 7") as caught:
        compose(message, recipient(points="secret"), SENDER)
    assert "secret" not in str(caught.value)


def test_a_template_without_variables_is_one_literal() -> None:
    message = message_of("Hi", "x\n", "<p>x</p>\n")
    assert isinstance(message.html, Pieces)
    assert [content for _, _, content in parts_of(parse(compose(message, recipient(), SENDER)))] == ["x\n", "<p>x</p>\n"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"public_url": "http://mail.example.test"}, "expected an https URL"),
        ({"public_url": "https://mail.example.test/?a=b"}, "expected an https URL"),
        ({"public_url": "https://mail.example.test/\r\nBcc: x"}, "expected an https URL"),
        ({"return_path_domain": "bounces"}, "no dot"),
        ({"return_path_domain": "bounces.example.test>\r\nBcc: x"}, "cannot be used"),
        ({"date": dt.datetime(2026, 1, 1)}, "no time zone"),
        ({"campaign_key": "a:b"}, "campaign_key"),
        ({"brand": "a\r\nb"}, "brand"),
        ({"sender_id": "abc"}, "5 to 15"),
    ],
)
def test_an_unusable_sender_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(SenderError, match=message):
        dataclasses.replace(SENDER, **change)
