"""The move itself: lists, fields, bans, people, bounces, in this order, and what became of each row.

Everything is done so that doing it again changes nothing, hence a move that was killed is simply run again: rows that are in already cost one join
a page. Values that a contact has here stay; the newest list's fill what is missing.
"""

from __future__ import annotations

import datetime as dt
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, TypeVar

from sqlalchemy.engine import Connection, Engine

from mail_pipelines.contacts import attributes, fields, importing, lists, merging
from mail_pipelines.contacts.addresses import AddressError, parse
from mail_pipelines.contacts.files import Batch
from mail_pipelines.contacts.lists import MailingList
from mail_pipelines.contacts.portions import portions
from mail_pipelines.database.engine import reading, transact
from mail_pipelines.migration import history, standings
from mail_pipelines.migration.mapping import PlannedField, plan_fields, plan_lists
from mail_pipelines.migration.source import Page, Person, Source, SourceList, State
from mail_pipelines.migration.standings import Standing

if TYPE_CHECKING:
    import pyarrow as pa

REJECTED, DUPLICATE, COMES = "rejected", "duplicate", "comes"
T = TypeVar("T")
# Which of two rows with one address says how the person stands; whoever left is read first.
_RANK: dict[State, int] = {"active": 3, "bounced": 2, "blocked": 2, "unconfirmed": 1, "disabled": 0, "left": 4}


@dataclass
class ListReport:
    """What became of a list's rows: `rows` counts state there and outcome (a `standings.Here`, rejected, duplicate, or comes in a check)."""

    name: str
    there: dict[State, int] | None
    rows: Counter[tuple[str, str]] = field(default_factory=Counter)

    def read(self) -> Counter[str]:
        counted: Counter[str] = Counter()
        for (state, _), number in self.rows.items():
            counted[state] += number
        return counted

    @property
    def agrees(self) -> bool:
        """Whether each row that the system counts, state by state, has an outcome here."""
        return self.there is None or {state: number for state, number in self.there.items() if number} == {key: n for key, n in self.read().items() if n}


@dataclass
class Report:
    """A move or, with `is_check`, what would come. `bans` and `bounces` are how many there are there, and how many are here."""

    system: str
    is_check: bool
    fields: list[PlannedField]
    lists: list[ListReport] = field(default_factory=list)
    bans: tuple[int, int] = (0, 0)
    bounces: tuple[int, int] = (0, 0)
    # Of rows that did not come, by where and why; of single values that did not, by field and why.
    reasons: Counter[tuple[str, str]] = field(default_factory=Counter)
    values: Counter[tuple[str, str]] = field(default_factory=Counter)

    def reject(self, where: str, reason: str) -> None:
        self.reasons[where, reason] += 1

    @property
    def agrees(self) -> bool:
        explained = all(
            there == here + sum(number for (where, _), number in self.reasons.items() if where == kind)
            for kind, (there, here) in (("bans", self.bans), ("bounces", self.bounces))
        )
        return all(report.agrees for report in self.lists) and (self.is_check or explained)


Progress = Callable[[str, int], None]


def check(engine: Engine, source: Source, progress: Progress | None = None) -> Report:
    """Read everything, write nothing."""
    with reading(engine) as connection:
        planned = plan_fields(source, fields.declared(connection))
    report = Report(source.name, True, planned)
    found = source.lists()
    names = plan_lists(source, found)
    for list_ in reversed(found):
        _of_list(report, source, list_, names[list_.id], None, progress)
    report.bans = sum(map(len, source.bans())), 0
    report.bounces = sum(map(len, source.bounces())), 0
    return report


def move(engine: Engine, source: Source, now: dt.datetime, progress: Progress | None = None) -> Report:
    """Move everything; may be killed and run again at any time."""
    found = source.lists()
    names = plan_lists(source, found)
    with reading(engine) as connection:
        planned = plan_fields(source, fields.declared(connection))
    targets = transact(engine, lambda connection: _declare(connection, planned, names, now))
    report = Report(source.name, False, planned)
    # First, so that nobody who is banned there could be mailed in between.
    report.bans = _pages(engine, report, source.bans(), lambda connection, page, reject: history.ban(connection, page, targets, now, reject))
    for list_ in reversed(found):
        _of_list(report, source, list_, names[list_.id], _Target(engine, targets[list_.id], source.name, now), progress)
    report.bounces = _pages(engine, report, source.bounces(), lambda connection, page, reject: history.remember(connection, page, source.name, now, reject))
    return report


def _declare(connection: Connection, planned: Sequence[PlannedField], names: dict[int, str], now: dt.datetime) -> dict[int, MailingList]:
    for new in planned:
        fields.declare(connection, new.key, new.type, label=new.label, now=now)
    return {number: lists.ensure(connection, name, now=now) for number, name in names.items()}


def _pages(engine: Engine, report: Report, pages: Iterator[Sequence[T]], work: Callable[[Connection, Sequence[T], history.Reject], int]) -> tuple[int, int]:
    """How many rows of these pages there are, and how many are kept here now."""
    there = here = 0
    for page in pages:
        rejects: list[tuple[str, str]] = []

        def once(connection: Connection, page: Sequence[T] = page, rejects: list[tuple[str, str]] = rejects) -> int:
            # A transaction that is tried again rejects again.
            rejects.clear()
            return work(connection, page, lambda where, reason: rejects.append((where, reason)))

        there, here = there + len(page), here + transact(engine, once)
        report.reasons.update(rejects)
    return there, here


@dataclass(frozen=True)
class _Target:
    """Where the people of a list go."""

    engine: Engine
    list: MailingList
    system: str
    now: dt.datetime

    def take(self, rows: pa.Table, by_hash: dict[bytes, Standing]) -> Counter[tuple[str, str]]:
        """Merge rows and apply how their people stand, both in one transaction; what became of them."""
        found: Counter[tuple[str, str]] = Counter()
        for portion in portions(self.engine, rows):
            chosen = [by_hash[hash_] for hash_ in portion["address_hash"].to_pylist()]
            outcome: list[Counter[tuple[State, standings.Here]]] = []

            def also(connection: Connection, chosen: list[Standing] = chosen, outcome: list[Counter[tuple[State, standings.Here]]] = outcome) -> None:
                outcome[:] = [standings.apply(connection, chosen, self.list, self.system, self.now)]

            merging.merge(self.engine, portion, list_id=self.list.id, now=self.now, taken=merging.missing, also=also)
            found.update(outcome[0])
        return found


def _of_list(report: Report, source: Source, list_: SourceList, name: str, target: _Target | None, progress: Progress | None) -> None:
    counted = source.counts(list_)
    of_list = ListReport(name, None if counted is None else dict(counted))
    report.lists.append(of_list)
    seen = importing.Seen()
    for left in (True, False):
        for page in source.pages(list_, left=left):
            _of_page(report, of_list, page, target, seen)
            if progress:
                progress(name, sum(of_list.rows.values()))


def _of_page(report: Report, of_list: ListReport, page: Page, target: _Target | None, seen: importing.Seen) -> None:
    for _, reason in page.rejects:
        report.reject(of_list.name, reason)
        of_list.rows["unreadable", REJECTED] += 1
    people: list[Person] = []
    hashes: list[bytes] = []
    for person in page.people:
        try:
            hashes.append(parse(person.email).hash)
            people.append(person)
        except AddressError as error:
            report.reject(of_list.name, f"address: {error.reason}" if person.email else "address: there is none")
            of_list.rows[person.state, REJECTED] += 1
    if not people:
        return
    batch, columns, types = _batch(report, people)
    prepared = importing.prepare(batch, 0, columns, types, seen)
    lines = {person.id: number for number, person in enumerate(people)}
    repeated = {hashes[lines[line]] for line in prepared.repeated}
    by_hash: dict[bytes, Standing] = {}
    for person, hash_ in sorted(zip(people, hashes, strict=True), key=lambda pair: -_RANK[pair[0].state]):
        if hash_ not in by_hash:
            by_hash[hash_] = Standing(hash_, person.state, person.since, person.blocked, person.evidence, hash_ in repeated)
            of_list.rows[person.state, DUPLICATE] += hash_ in repeated
        else:
            of_list.rows[person.state, DUPLICATE] += 1
            if person.blocked and not by_hash[hash_].blocked:
                by_hash[hash_] = replace(by_hash[hash_], blocked=person.blocked)
    if target is None:
        of_list.rows.update(Counter((standing.state, COMES) for standing in by_hash.values() if not standing.repeated))
    else:
        of_list.rows.update(target.take(prepared.rows, by_hash))


def _batch(report: Report, people: Sequence[Person]) -> tuple[Batch, list[importing.Column], dict[str, fields.FieldType]]:
    """The people as rows of a file whose columns are the address and the fields. A value that its type does not allow is left out, and the person comes."""
    import pyarrow as pa

    columns = [pa.array([person.email for person in people], pa.string())]
    named: list[importing.Column] = []
    for planned in report.fields:
        texts = [next((person.values[id_] for id_ in planned.ids if person.values.get(id_)), None) for person in people]
        if not any(texts):
            continue
        _, wrong = attributes.encode(pa.array(texts, pa.string()), planned.type)
        for row, reason in wrong.items():
            texts[row] = None
            report.values[planned.key, reason] += 1
        named.append(importing.Column(len(columns), planned.label, planned.key))
        columns.append(pa.array(texts, pa.string()))
    return Batch([person.id for person in people], columns, [], 0.0), named, {planned.key: planned.type for planned in report.fields}
