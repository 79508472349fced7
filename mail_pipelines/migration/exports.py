"""CSV exports of other systems, one list a file: what their columns mean is data (`exports.toml`)."""

from __future__ import annotations

import functools
import itertools
import json
import re
import tomllib
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from mail_pipelines.contacts.fields import infer_type
from mail_pipelines.contacts.files import Batch, open_file
from mail_pipelines.migration import cleaning
from mail_pipelines.migration.source import SAMPLE, MigrationError, Page, Person, Source, SourceField, SourceList, State

RULES = Path(__file__).with_name("exports.toml")
STATES: tuple[State, ...] = get_args(State)
_ROLES = ("email", "state", "since", "left_at", "ip", "form", "json", "drop")


@dataclass(frozen=True)
class Columns:
    """The places of a file's columns by their role, first choice first, the names of those that are fields, and what the states are called."""

    roles: Mapping[str, Sequence[int]]
    fields: Mapping[Hashable, str]
    states: Mapping[str, State]
    blocked: str

    @classmethod
    def of(cls, system: str, names: Sequence[str]) -> Columns:
        rules = document()[system]
        plain = [_plain(name) for name in names]
        roles = {role: [plain.index(_plain(name)) for name in rules[role] if _plain(name) in plain] for role in _ROLES}
        used = set(itertools.chain.from_iterable(roles.values()))
        states: dict[str, State] = {_plain(word): state for state in STATES for word in rules["states"].get(state, ())}
        if not roles["email"]:
            raise MigrationError(f"the file has no column {' or '.join(map(repr, rules['email']))}; found {', '.join(names)}")
        return cls(roles, {place: name for place, name in enumerate(names) if name and place not in used}, states, rules["blocked"])


@functools.cache
def document() -> dict[str, dict[str, Any]]:
    return tomllib.loads(RULES.read_text(encoding="utf-8"))


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


class Export(Source):
    """A file as a system with one list. `state` is that of all its rows where no column says it."""

    def __init__(self, system: str, path: Path, list_name: str, state: State | None) -> None:
        self.name = system  # type: ignore[misc]
        self.path = path
        self.list_name = list_name
        self.state = state
        with open_file(path) as file:
            self.columns = Columns.of(system, file.columns)
        if state is None and not self.columns.roles["state"]:
            raise MigrationError(f"{path} has no column that says who has left; say with --state what all its rows are: {', '.join(STATES)}")

    def lists(self) -> Sequence[SourceList]:
        return [SourceList(1, self.list_name)]

    def fields(self) -> Sequence[SourceField]:
        found = {**self.columns.fields, **self._json_keys()}
        return [SourceField(field_id, label, infer_type(self._values[field_id])) for field_id, label in found.items()]

    def sample(self, field: SourceField) -> Sequence[str]:
        return self._values[field.id]

    def pages(self, list_: SourceList, *, left: bool) -> Iterator[Page]:
        for batch in self._batches():
            people: list[Person] = []
            rejects: list[tuple[int, str]] = [] if left else [(reject.line, reject.reason) for reject in batch.rejects]
            for line, row in _rows(batch):
                state = self._state(row)
                if state is not None and (state == "left") is left:
                    people.append(self._person(line, row, state))
                elif state is None and not left:
                    rejects.append((line, "its state is none that is known (exports.toml)"))
            yield Page(people, rejects)

    def _state(self, row: Sequence[str]) -> State | None:
        said = next((row[place] for place in self.columns.roles["state"] if row[place].strip()), None)
        return self.state if said is None else self.columns.states.get(_plain(said))

    def _person(self, line: int, row: Sequence[str], state: State) -> Person:
        def first(role: str) -> str:
            return next((row[place].strip() for place in self.columns.roles[role] if row[place].strip()), "")

        left_at, since = cleaning.time(cleaning.day(first("left_at"))), cleaning.time(cleaning.day(first("since")))
        known = cleaning.evidence(requested_at=since, requested_ip=first("ip"), form=first("form"), left_at=left_at)
        blocked = {"blocked": self.columns.blocked, "bounced": "bounce"}.get(state)
        person = Person(line, row[self.columns.roles["email"][0]], state, left_at if state == "left" else since, blocked, known)
        person.values.update(self._texts(row))
        return person

    def _texts(self, row: Sequence[str]) -> dict[Hashable, str]:
        texts: dict[Hashable, str] = {place: cleaning.choices(row[place]) for place in self.columns.fields if isinstance(place, int)}
        for place in self.columns.roles["json"]:
            texts |= {("json", key): value for key, value in _members(row[place]).items()}
        return {field_id: text for field_id, text in texts.items() if text}

    @functools.cached_property
    def _values(self) -> Mapping[Hashable, Sequence[str]]:
        """The first values of each field; the whole file is read, since any row may have a new key."""
        found: dict[Hashable, list[str]] = {place: [] for place in self.columns.fields}
        for batch in self._batches():
            for _, row in _rows(batch):
                for field_id, text in self._texts(row).items():
                    texts = found.setdefault(field_id, [])
                    if len(texts) < SAMPLE:
                        texts.append(text)
        return found

    def _json_keys(self) -> dict[Hashable, str]:
        return {field_id: field_id[1] for field_id in self._values if isinstance(field_id, tuple)}

    def _batches(self) -> Iterator[Batch]:
        with open_file(self.path) as file:
            yield from file.batches


def _rows(batch: Batch) -> Iterator[tuple[int, Sequence[str]]]:
    columns = [[text or "" for text in column.to_pylist()] for column in batch.columns]
    return zip(batch.lines, zip(*columns, strict=True), strict=True)


def _members(text: str) -> dict[str, str]:
    try:
        found = json.loads(text or "{}")
    except ValueError:
        return {}
    return {key: cleaning.json_text(value) for key, value in found.items()} if isinstance(found, dict) else {}
