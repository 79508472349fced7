"""CSV exports of other systems, one list a file: what their columns mean is data (`exports.toml`)."""

from __future__ import annotations

import datetime as dt
import functools
import itertools
import json
import re
import tomllib
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal, get_args

from mail_pipelines.contacts.fields import infer_type
from mail_pipelines.contacts.files import Batch, open_file
from mail_pipelines.migration import cleaning
from mail_pipelines.migration.source import SAMPLE, Bounce, MigrationError, Page, Person, Source, SourceField, SourceList, State

RULES = Path(__file__).with_name("exports.toml")
STATES: tuple[State, ...] = get_args(State)
_ROLES = ("email", "state", "confirmed", "since", "left_at", "ip", "form", "bounced_at", "bounce", "json", "drop")
# MailWizz masks addresses in exports of whoever may not see them (`jo***@example.com`); what remains may be somebody else's.
_MASKED = re.compile(r"\*{2,}[^@]*@")


@dataclass(frozen=True)
class Columns:
    """The places of a file's columns by their role, first choice first, the names of those that are fields, and what the states are called."""

    roles: Mapping[str, Sequence[int]]
    fields: Mapping[Hashable, str]
    states: Mapping[str, State]
    blocked: str
    month_first: frozenset[int]
    tells_who_left: bool

    @classmethod
    def of(cls, system: str, names: Sequence[str]) -> Columns:
        rules = document()[system]
        roles = places(rules, _ROLES, names)
        used = set(itertools.chain.from_iterable(roles.values()))
        states: dict[str, State] = {_plain(word): state for state in STATES for word in rules["states"].get(state, ())}
        fields: dict[Hashable, str] = {place: name for place, name in enumerate(names) if name and place not in used}
        month_first = frozenset(place for place, name in enumerate(names) if _plain(name).endswith("mmddyyyy"))
        return cls(roles, fields, states, rules["blocked"], month_first, bool(roles["state"]) and rules.get("tells_who_left", True))


@functools.cache
def document() -> dict[str, dict[str, Any]]:
    return tomllib.loads(RULES.read_text(encoding="utf-8"))


def places(rules: Mapping[str, Any], roles: Iterable[str], names: Sequence[str]) -> dict[str, Sequence[int]]:
    """The places of the columns that may hold each role. Raises `MigrationError` if there is none with addresses."""
    plain = [_plain(name) for name in names]
    found: dict[str, Sequence[int]] = {role: [plain.index(_plain(name)) for name in rules.get(role, ()) if _plain(name) in plain] for role in roles}
    if not found["email"]:
        raise MigrationError(f"the file has no column {' or '.join(map(repr, rules['email']))}; found {', '.join(names)}")
    return found


def key_of(*texts: object) -> str:
    """The same for the same row of a file, however often it is exported."""
    return blake2b("\n".join(map(str, texts)).encode(), digest_size=16).hexdigest()


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


class Export(Source):
    """A file as a system with one list. `state` is that of all its rows of which no column says another than that they are mailed."""

    def __init__(self, system: str, path: Path, list_name: str, state: State | None) -> None:
        self.name = system  # type: ignore[misc]
        self.path = path
        self.list_name = list_name
        self.state = state
        with open_file(path) as file:
            self.columns = Columns.of(system, file.columns)
        if state is None and not self.columns.tells_who_left:
            raise MigrationError(
                f"{path} has no column that says who has left the list: export those who have left apart, and say with --state what the rows of a file are: "
                f"{', '.join(STATES)}"
            )

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
            for line, row in rows(batch):
                if _MASKED.search(row[self.columns.roles["email"][0]]):
                    rejects += [] if left else [(line, "address: it is masked: export as somebody who may see addresses")]
                    continue
                state = self._state(row)
                if state is not None and (state == "left") is left:
                    people.append(self._person(line, row, state))
                elif state is None and not left:
                    rejects.append((line, "its state is none that is known (exports.toml)"))
            yield Page(people, rejects)

    def bounces(self) -> Iterator[Sequence[Bounce]]:
        """The newest bounce of each bounced contact, which Interspire's export has."""
        for batch in self._batches() if self.columns.roles["bounce"] else ():
            found = ((row[self.columns.roles["email"][0]], self._first(row, "bounce"), self._time(row, "bounced_at")) for _, row in rows(batch))
            yield [Bounce(key_of(email, words, at), email, kind_of(words), at, words) for email, words, at in found if words or at]

    def _state(self, row: Sequence[str]) -> State | None:
        said = self._first(row, "state")
        state = self.columns.states.get(_plain(said)) if said else self.state
        # Who is mailed by one word may have left, or not have confirmed, by another.
        if state == "active" and self.columns.states.get(_plain(self._first(row, "confirmed"))) == "unconfirmed":
            state = "unconfirmed"
        return self.state if state == "active" and self.state else state

    def _first(self, row: Sequence[str], role: str) -> str:
        return next((row[place].strip() for place in self.columns.roles[role] if row[place].strip()), "")

    def _time(self, row: Sequence[str], role: str) -> dt.datetime | None:
        """Of the first of the columns that holds a time."""
        given = (cleaning.time(cleaning.day(row[place], month_first=place in self.columns.month_first)) for place in self.columns.roles[role])
        return next((time for time in given if time), None)

    def _person(self, line: int, row: Sequence[str], state: State) -> Person:
        left_at, since = self._time(row, "left_at"), self._time(row, "since")
        known = cleaning.evidence(requested_at=since, requested_ip=cleaning.ip(self._first(row, "ip")), form=self._first(row, "form"), left_at=left_at)
        blocked = {"blocked": self.columns.blocked, "bounced": "bounce"}.get(state)
        began = left_at if state == "left" else self._time(row, "bounced_at") if state == "bounced" else since
        person = Person(line, row[self.columns.roles["email"][0]], state, began, blocked, known)
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
            for _, row in rows(batch):
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


def rows(batch: Batch) -> Iterator[tuple[int, Sequence[str]]]:
    columns = [[text or "" for text in column.to_pylist()] for column in batch.columns]
    return zip(batch.lines, zip(*columns, strict=True), strict=True)


def kind_of(words: str) -> Literal["hard", "soft"]:
    return "hard" if "hard" in words.lower() else "soft"


def _members(text: str) -> dict[str, str]:
    try:
        found = json.loads(text or "{}")
    except ValueError:
        return {}
    return {key: cleaning.json_text(value) for key, value in found.items()} if isinstance(found, dict) else {}
