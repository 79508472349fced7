"""Addresses: one normal form, clear refusals, nothing personal in messages."""

from __future__ import annotations

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mail_pipelines.contacts import address_columns
from mail_pipelines.contacts.addresses import AddressError, address_hash, mask, parse
from mail_pipelines.contacts.providers import provider_of

ATEXT = "abcXYZ019!#$%&'*+/=?^_`{|}~-"


@st.composite
def addresses(draw: st.DrawFn) -> str:
    local = ".".join(draw(st.lists(st.text(ATEXT, min_size=1, max_size=12), min_size=1, max_size=4)))
    label = st.one_of(
        st.from_regex(r"[A-Za-z0-9]([A-Za-z0-9]{0,10}[A-Za-z0-9])?", fullmatch=True), st.sampled_from(["bücher", "FAß", "пример", "例え", "xn--bcher-kva"])
    )
    domain = ".".join([*draw(st.lists(label, min_size=1, max_size=4)), draw(st.sampled_from(["test", "Example", "рф"]))])
    blanks = draw(st.sampled_from(["", " ", "\t", "\n "]))
    return f"{blanks}{local}@{domain}{blanks}"


@pytest.mark.slow
@given(addresses())
def test_the_normal_form_of_a_normal_form_is_itself(email: str) -> None:
    first = parse(email)
    again = parse(first.address)
    assert again.address == first.address
    assert again.hash == first.hash
    assert again.domain == first.domain == first.address.rpartition("@")[2]
    assert first.email == email.strip()


@given(st.lists(st.one_of(addresses(), st.text(max_size=80), st.from_regex(r"[a-z.@\x1f ]{0,70}@[a-z0-9.-]{0,20}", fullmatch=True), st.none()), max_size=20))
def test_a_column_says_of_each_address_what_it_says_alone(texts: list[str | None]) -> None:
    columns, problems = address_columns.encode(pa.array(texts, pa.string()))
    expected = [alone(text) for text in texts]
    assert columns.to_pylist() == [values for values, _ in expected]
    assert problems == {row: reason for row, (_, reason) in enumerate(expected) if reason}


def alone(text: str | None) -> tuple[dict[str, str | bytes | None], str]:
    """What `parse` says of a text, and the reason why it is no address."""
    names = ("email", "address", "address_hash", "domain", "provider")
    try:
        address = parse(text or "")
    except AddressError as error:
        return dict.fromkeys(names), error.reason if (text or "").strip() else "there is none"
    return dict(zip(names, (address.email, address.address, address.hash, address.domain, provider_of(address.domain)), strict=True)), ""


@given(addresses())
def test_case_does_not_make_another_address(email: str) -> None:
    assert parse(email.replace("ß", "ss").upper()).hash == parse(email.replace("ß", "ss").lower()).hash


@given(st.text(max_size=80))
def test_any_text_is_an_address_or_a_reasoned_refusal(text: str) -> None:
    try:
        address = parse(text)
    except AddressError:
        return
    assert address.address.isascii()
    assert address.address.isprintable()
    assert " " not in address.address
    assert len(address.address) <= 254
    assert len(address.email) <= 254


@pytest.mark.parametrize(
    ("email", "address"),
    [
        ("Ann.Lee@Example.TEST", "ann.lee@example.test"),
        (" ann@bücher.test ", "ann@xn--bcher-kva.test"),
        ("ann@BÜCHER。test", "ann@xn--bcher-kva.test"),
        ("ann+news@a-b.c1.test", "ann+news@a-b.c1.test"),
        ("a@" + "b" * 63 + ".test", "a@" + "b" * 63 + ".test"),
        ("x" * 64 + "@example.test", "x" * 64 + "@example.test"),
    ],
)
def test_accepted(email: str, address: str) -> None:
    assert parse(email).address == address


@pytest.mark.parametrize(
    ("email", "reason"),
    [
        ("", "no '@'"),
        ("ann", "no '@'"),
        ("@example.test", "nothing stands before"),
        ("ann@", "nothing follows"),
        ("ann@lee@example.test", "more than one '@'"),
        ("ann lee@example.test", "' ' cannot stand before"),
        ("ann\r\nBcc: eve@example.test", "cannot stand before"),
        ("ann@example.test\r\nBcc: eve", "cannot stand in a domain"),
        ("ann\x00@example.test", "'\\x00' cannot stand before"),
        ("Ann <ann@example.test", "cannot stand before"),
        (".ann@example.test", "a dot before the '@'"),
        ("a..n@example.test", "a dot before the '@'"),
        ('"ann lee"@example.test', "quoted"),
        ("änn@example.test", "beyond ASCII"),
        ("an\u212a@example.test", "beyond ASCII"),
        ("x" * 65 + "@example.test", "more than 64"),
        ("ann@" + ".".join(["b" * 60] * 5) + ".test", "longer than 253"),
        ("a" * 64 + "@" + ".".join(["b" * 46] * 4) + ".te", "longer than 254"),
        ("ann@localhost", "no dot"),
        ("ann@example.test.", "a dot of the domain"),
        ("ann@example..test", "a dot of the domain"),
        ("ann@-example.test", "begins or ends with '-'"),
        ("ann@ex_ample.test", "'_' cannot stand in a domain"),
        ("ann@" + "b" * 64 + ".test", "longer than 63"),
        ("ann@192.0.2.1", "ends in a number"),
        ("ann@[192.0.2.1]", "address literals"),
        ("ann@xn--a.test", "internationalised"),
        ("ann@☃.test", "internationalised"),
    ],
)
def test_refused_with_the_reason(email: str, reason: str) -> None:
    with pytest.raises(AddressError) as caught:
        parse(email)
    assert reason in caught.value.reason


def test_messages_never_hold_the_whole_address() -> None:
    with pytest.raises(AddressError) as caught:
        parse("jane.roe..x@example.test")
    assert "jane" not in str(caught.value)
    assert "j***@example.test" in str(caught.value)
    assert mask("jane@example.test") == "j***@example.test"
    assert mask("jane@Jane Roe") == "j***@***"
    assert mask("Jane Roe") == "J***"
    assert mask("") == "***"


def test_the_hash_is_stable_across_releases() -> None:
    assert address_hash("ann@example.test").hex() == parse("Ann@Example.test").hash.hex() == "fdfa50e384e8b6d8679e007200d851a2"
