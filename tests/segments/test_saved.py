"""Segments are saved as they were written, checked when they are, and shown as YAML that can be saved again."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mail_pipelines.keys import InvalidKey
from mail_pipelines.segments import saved
from mail_pipelines.segments.criteria import CriteriaError
from mail_pipelines.segments.saved import SavedSegment, SegmentError
from tests.segments.world import NOW, World

BERLIN = """
key: berlin
name: Who lives in Berlin – and is of age
criteria:
  all:
    - {field: city, op: =, value: Berlin}
    - {field: born, op: <=, value: 2008-03-10}
    - {field: seen, op: after, value: 2026-01-31T10:00:00Z}
"""


def test_a_segment_comes_back_as_it_was_saved_and_is_replaced_by_its_key(world: World) -> None:
    segment = saved.from_yaml(BERLIN)
    saved.save(world.engine, segment, now=NOW)
    loaded = saved.load(world.engine, "berlin")
    assert loaded == segment == saved.from_yaml(saved.to_yaml(loaded))
    assert loaded.criteria["all"][1]["value"] == "2008-03-10"
    saved.save(world.engine, SavedSegment("berlin", "Nobody", {"any": []}), now=NOW)
    saved.save(world.engine, SavedSegment("all", "Everybody", {"all": []}), now=NOW)
    assert [(found.key, found.name) for found in saved.list_segments(world.engine)] == [("all", "Everybody"), ("berlin", "Nobody")]


def test_a_segment_over_a_field_nobody_has_is_not_saved(world: World) -> None:
    with pytest.raises(CriteriaError, match=r"not\.field: unknown field 'ctiy'; did you mean 'city'"):
        saved.save(world.engine, SavedSegment("berlin", "Berlin", {"not": {"field": "ctiy", "op": "empty"}}), now=NOW)
    with pytest.raises(SegmentError, match="no segment 'berlin'"):
        saved.load(world.engine, "berlin")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "a segment has `key`, `name` and `criteria`"),
        ("- 1", "a segment has `key`, `name` and `criteria`"),
        ("key: a\nname: b", "a segment has `key`, `name` and `criteria`"),
        ("key: a\ncriteria: {all: []}\ncritera: 1", "unknown 'critera'"),
        ("key: 7\ncriteria: {all: []}", "put them into quotes"),
        ("key: a\ncriteria: {all: [}", "not valid YAML: line 2, column 18: expected"),
        ("key: a\ncriteria: {field: city, op: =, op: in}", "not valid YAML: line 2, column 32: key 'op' is given twice"),
        ("key: a\ncriteria: !!python/object:os.system {}", "not valid YAML"),
    ],
)
def test_a_document_that_is_no_segment_is_refused(text: str, message: str) -> None:
    with pytest.raises(SegmentError, match=message):
        saved.from_yaml(text)


def test_a_key_that_is_none_is_refused() -> None:
    with pytest.raises(InvalidKey, match="segment key"):
        saved.from_yaml("key: Berlin West\ncriteria: {all: []}")


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(SegmentError, match=r"none\.yaml cannot be read"):
        saved.read_file(tmp_path / "none.yaml")
    (tmp_path / "latin.yaml").write_bytes(b"key: \xff")
    with pytest.raises(SegmentError, match=r"latin\.yaml is not UTF-8"):
        saved.read_file(tmp_path / "latin.yaml")


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(min_size=1), inner, max_size=3),
    max_leaves=8,
)


@given(st.text(min_size=1, max_size=50), plain)
def test_any_tree_survives_yaml(name: str, tree: object) -> None:
    segment = SavedSegment("a", name, tree)
    assert saved.from_yaml(saved.to_yaml(segment)) == segment
