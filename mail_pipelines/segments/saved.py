"""Saved segments: criteria under a key in table `segments`, and their YAML form.

What is kept is the tree as it was written; it is checked against the catalogue whenever it is used, since fields, lists and campaigns change.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sqlalchemy as sa
import yaml
from sqlalchemy.engine import Connection, Engine

from mail_pipelines.database.engine import reading, transact
from mail_pipelines.database.models import Segment
from mail_pipelines.errors import MailPipelinesError
from mail_pipelines.keys import check_key
from mail_pipelines.segments.catalogue import read_catalogue
from mail_pipelines.segments.criteria import parse

DOCUMENT_KEYS = ("key", "name", "criteria")


class SegmentError(MailPipelinesError):
    """A segment document that cannot be read, or a segment that does not exist."""


@dataclass(frozen=True)
class SavedSegment:
    """`criteria` is the tree of plain values that `criteria.parse` reads."""

    key: str
    name: str
    criteria: Any


class _Loader(yaml.SafeLoader):
    """Reads `=` as text, which YAML 1.1 reserves, and refuses a key given twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if key_node.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key_node.value!r} is given twice", key_node.start_mark)
            if isinstance(key_node.value, str):
                seen.add(key_node.value)
        return super().construct_mapping(node, deep)


_Loader.add_constructor("tag:yaml.org,2002:value", lambda _loader, node: node.value)


class _Dumper(yaml.SafeDumper):
    """Escapes the line separators beyond ASCII, which the plain dumper writes as they are and the loader then folds."""


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style='"' if any(mark in text for mark in "\x85\u2028\u2029") else None)


_Dumper.add_representer(str, _represent_text)


def from_yaml(text: str) -> SavedSegment:
    """Read `key`, `name` (default: the key) and `criteria`. Raises `SegmentError` with the place, `InvalidKey`."""
    try:
        document = yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise SegmentError(f"not valid YAML: {place}{error.problem}") from error
    except yaml.YAMLError as error:
        raise SegmentError(f"not valid YAML: {error}") from error
    if not isinstance(document, Mapping) or not {"key", "criteria"} <= set(document):
        raise SegmentError("a segment has `key`, `name` and `criteria` at the top of its document")
    if unknown := [name for name in document if name not in DOCUMENT_KEYS]:
        raise SegmentError(f"unknown {unknown[0]!r} at the top of the document; known: {', '.join(DOCUMENT_KEYS)}")
    key, name = document["key"], document.get("name", document["key"])
    if not isinstance(key, str) or not isinstance(name, str):
        raise SegmentError("`key` and `name` are text: put them into quotes")
    return SavedSegment(check_key(key, "segment key"), name[:200], _plain(document["criteria"]))


def read_file(path: Path) -> SavedSegment:
    """`from_yaml` of a file; errors name it."""
    try:
        return from_yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SegmentError(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise SegmentError(f"{path} is not UTF-8 text") from error
    except SegmentError as error:
        raise SegmentError(f"{path}: {error}") from error


def to_yaml(segment: SavedSegment) -> str:
    return yaml.dump({"key": segment.key, "name": segment.name, "criteria": segment.criteria}, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def _plain(value: Any) -> Any:
    """YAML values as JSON has them: dates and times as ISO text."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value.isoformat() if isinstance(value, dt.date) else value


def save(engine: Engine, segment: SavedSegment, *, now: dt.datetime) -> None:
    """Check and keep a segment; one of the same key is replaced. Raises `CriteriaError`, `InvalidKey`."""
    check_key(segment.key, "segment key")
    with reading(engine) as connection:
        parse(segment.criteria, read_catalogue(connection))
    values = {"name": segment.name, "definition": segment.criteria, "updated_at": now}

    def write(connection: Connection) -> None:
        if connection.execute(sa.update(Segment).where(Segment.key == segment.key).values(**values)).rowcount == 0:
            connection.execute(sa.insert(Segment).values(key=segment.key, created_at=now, **values))

    transact(engine, write)


def load(engine: Engine, key: str) -> SavedSegment:
    """Raises `SegmentError` if there is none of this key."""
    with reading(engine) as connection:
        row = connection.execute(sa.select(Segment.key, Segment.name, Segment.definition).where(Segment.key == key)).one_or_none()
    if row is None:
        raise SegmentError(f"no segment {key!r}; `mail-pipelines segment list` shows those there are")
    return SavedSegment(row.key, row.name, row.definition)


def list_segments(engine: Engine) -> list[SavedSegment]:
    """All segments in the order of their keys."""
    with reading(engine) as connection:
        return [SavedSegment(*row) for row in connection.execute(sa.select(Segment.key, Segment.name, Segment.definition).order_by(Segment.key))]
