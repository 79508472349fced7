"""Which fields and lists of ours those of another system become: their keys, and the types that their values bear out."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

from mail_pipelines.contacts import fields
from mail_pipelines.contacts.fields import FieldError, FieldType
from mail_pipelines.keys import InvalidKey, slug
from mail_pipelines.migration.source import Source, SourceField, SourceList


@dataclass(frozen=True)
class PlannedField:
    """A field here, of one or more fields there (`ids`). `why` explains a type that is not what the other system says."""

    key: str
    label: str
    type: FieldType
    why: str
    ids: tuple[Hashable, ...]


def plan_fields(source: Source, declared: Mapping[str, FieldType]) -> list[PlannedField]:
    """Fields whose labels give the same key become one. A type that exists here stays; a type that the values disprove becomes text."""
    by_key: defaultdict[str, list[SourceField]] = defaultdict(list)
    for number, field in enumerate(source.fields(), 1):
        by_key[_key(field, number)].append(field)
    return [_planned(source, key, same, declared.get(key)) for key, same in by_key.items()]


def _planned(source: Source, key: str, same: Sequence[SourceField], known: FieldType | None) -> PlannedField:
    said = {field.type for field in same}
    type_, why = (said.pop(), "") if len(said) == 1 else ("text", "the lists there do not agree on its type")
    if known is not None:
        type_, why = known, "" if known == type_ else "the field exists here"
    elif type_ != "text" and not all(fields.fits(source.sample(field), type_) for field in same):
        type_, why = "text", f"its values are no {type_} there"
    return PlannedField(key, same[0].label, type_, why, tuple(field.id for field in same))


def _key(field: SourceField, number: int) -> str:
    """A key for every label: one that is taken by a built-in value gets a prefix, one without letters is numbered."""
    try:
        return fields.key_of(field.label)
    except FieldError:
        pass
    try:
        return fields.key_of(f"field_{slug(field.label)}")
    except InvalidKey:
        return f"field_{number}"


def plan_lists(source: Source, lists: Sequence[SourceList]) -> dict[int, str]:
    """The name here of each list there: its own, with its number where two of them would be one list, or where none can be made of it."""
    names: dict[int, str] = {}
    taken: set[str] = set()
    for list_ in lists:
        name = list_.name
        try:
            if slug(name) in taken:
                name = f"{name[:50]} {list_.id}"
        except InvalidKey:
            name = f"{source.name} list {list_.id}"
        taken.add(slug(name))
        names[list_.id] = name
    return names
