"""Keys are safe in paths, queues and partitions, and every usable name has one."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mail_pipelines.errors import nearest
from mail_pipelines.keys import MAX_LENGTH, InvalidKey, check_key, slug


@pytest.mark.parametrize(
    ("name", "key"),
    [("Spring Sale 2026!", "spring-sale-2026"), ("Été à Paris", "ete-a-paris"), ("--a--b--", "a-b"), ("x" * 80, "x" * 64), ("x" * 64 + " y", "x" * 64)],
)
def test_a_name_becomes_a_key(name: str, key: str) -> None:
    assert slug(name) == key


@given(st.text(max_size=100))
def test_a_slug_is_always_a_valid_key_and_its_own_slug(name: str) -> None:
    try:
        key = slug(name)
    except InvalidKey:
        return
    assert check_key(key) == slug(key) == key


@pytest.mark.parametrize("text", ["", "A", "a b", "-a", "a_b", "ä", "a/b", "a|b", "a\n", "x" * (MAX_LENGTH + 1)])
def test_anything_else_is_refused_by_name(text: str) -> None:
    with pytest.raises(InvalidKey, match="no valid campaign key"):
        check_key(text, "campaign key")


def test_a_refusal_suggests_the_nearest_key() -> None:
    with pytest.raises(InvalidKey, match="'spring-sale' would be one"):
        check_key("Spring Sale")


def test_a_name_without_letters_has_no_key() -> None:
    with pytest.raises(InvalidKey, match="at least one letter"):
        slug("日本語")


def test_an_unknown_name_is_answered_with_the_nearest_or_all() -> None:
    assert nearest("bayers", ["buyers", "everybody"]) == "did you mean 'buyers'?"
    assert nearest("x", ["buyers", "everybody"]) == "known: buyers, everybody"
    assert nearest("x", []) == "none is known yet"
