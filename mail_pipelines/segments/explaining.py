"""Why one contact is in a segment or not: the conditions of the tree that decide it, each with its place.

What does not belong here: consent, and what became of a campaign (`campaigns.why`).
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from mail_pipelines.segments.criteria import AllOf, parse
from mail_pipelines.segments.snapshots import Snapshots

_SHOWN_CHARACTERS = 200


@dataclass(frozen=True)
class Unmet:
    """A condition that is not as it would have to be: its place in the tree, the condition as it was written, and what it would have to be."""

    path: str
    condition: str
    wanted: bool

    def __str__(self) -> str:
        return f"{self.path or 'criteria'}: {self.condition} is {'not true' if self.wanted else 'true'}"


def is_known(snapshots: Snapshots, contact_id: int, now: dt.datetime) -> bool:
    """Whether the contact was there when the snapshots were made."""
    from mail_pipelines.segments.evaluation import is_member

    return is_member(AllOf(()), snapshots, contact_id, now=now)


def unmet(tree: Mapping[str, Any], snapshots: Snapshots, contact_id: int, now: dt.datetime) -> list[Unmet]:
    """The conditions that keep a contact out of a segment; none if it is in it. `tree` are its criteria as saved.

    Of `all` those children that fail, of `any` every child, since one of them would do. Raises `CriteriaError` as `parse` does.
    """
    from mail_pipelines.segments.evaluation import is_member

    def holds(node: object) -> bool:
        return is_member(parse(node, snapshots.catalogue), snapshots, contact_id, now=now)

    return _unmet(tree, "", True, holds)


def _unmet(node: Any, path: str, wanted: bool, holds: Callable[[object], bool]) -> list[Unmet]:
    """What keeps a condition from being `wanted`."""
    prefix = f"{path}." if path else ""
    if "not" in node:
        return _unmet(node["not"], f"{prefix}not", not wanted, holds)
    for form in ("all", "any"):
        if form in node:
            children = [_unmet(child, f"{prefix}{form}[{number}]", wanted, holds) for number, child in enumerate(node[form])]
            # All of `all` have to hold for it to be true, and one of them not to for it to be false; of `any` the other way round.
            enough = all if (form == "all") is wanted else any
            if enough(not child for child in children):
                return []
            # `any: []`, which nothing makes true, and `all: []`, which nothing makes false.
            return [one for child in children for one in child] or [_told(node, path, wanted)]
    return [] if holds(node) is wanted else [_told(node, path, wanted)]


def _told(node: object, path: str, wanted: bool) -> Unmet:
    text = yaml.safe_dump(node, default_flow_style=True, sort_keys=False, allow_unicode=True, width=10_000).strip()
    return Unmet(path, text if len(text) <= _SHOWN_CHARACTERS else f"{text[: _SHOWN_CHARACTERS - 1]}…", wanted)
