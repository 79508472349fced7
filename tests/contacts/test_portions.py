"""An import gives way to sending: whole batches while nothing is sent, else small portions with rests. On both databases."""

from __future__ import annotations

import datetime as dt
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import sqlalchemy as sa
from sqlalchemy import event

from mail_pipelines.contacts import importing, merging
from mail_pipelines.contacts.importing import import_file
from mail_pipelines.contacts.portions import MOST_REST_SECONDS, PORTION_ROWS, portions
from mail_pipelines.database.engine import database_now, transact
from mail_pipelines.database.models import Claim, Contact
from tests.contacts.conftest import NOW

BATCH = pa.table({"line": pa.array(range(10_000), pa.int64())})


@dataclass
class Machine:
    """A clock that only work and rests move: each row takes so many seconds."""

    seconds_a_row: float
    now: float = 0.0
    rests: list[float] = field(default_factory=list)

    def work(self, rows: int) -> float:
        self.now += rows * self.seconds_a_row
        return rows * self.seconds_a_row

    def sleep(self, seconds: float) -> None:
        self.rests.append(seconds)
        self.now += seconds


def open_claim(engine: sa.Engine, *, state: str = "open", lease_seconds: int = 120) -> None:
    def work(connection: sa.Connection) -> None:
        now = database_now(connection)
        place = {"campaign_id": 1, "shard": 0, "provider": "other", "server_id": 1, "run_id": "r", "size": 1, "incarnation": "i", "boot_id": "b"}
        times = {"journal_inode": 1, "journal_offset": 0, "opened_at": now, "lease_until": now + dt.timedelta(seconds=lease_seconds)}
        connection.execute(sa.insert(Claim).values(id=1, state=state, **place, **times))

    transact(engine, work)


def work_through(engine: sa.Engine, machine: Machine, batch: pa.Table = BATCH) -> list[tuple[pa.Table, float]]:
    """Each portion, and how long its work took."""
    return [(rows, machine.work(rows.num_rows)) for rows in portions(engine, batch, clock=lambda: machine.now, sleep=machine.sleep)]


@pytest.mark.parametrize(("state", "lease_seconds"), [("closed", 120), ("open", -1), ("settling", 120)])
def test_a_batch_is_one_portion_while_no_server_may_send(engine: sa.Engine, state: str, lease_seconds: int) -> None:
    open_claim(engine, state=state, lease_seconds=lease_seconds)
    machine = Machine(1e-4)
    assert [rows for rows, _ in work_through(engine, machine)] == [BATCH]
    assert machine.rests == []


def test_beside_sending_each_portion_is_followed_by_as_long_a_rest(engine: sa.Engine) -> None:
    open_claim(engine)
    machine = Machine(1e-5)
    found = work_through(engine, machine)
    assert [rows.num_rows for rows, _ in found] == [PORTION_ROWS] * 5
    assert pa.concat_tables([rows for rows, _ in found]).equals(BATCH)
    assert machine.rests == pytest.approx([took for _, took in found])


def test_a_portion_that_waited_for_long_is_no_reason_to_rest_for_long(engine: sa.Engine) -> None:
    open_claim(engine)
    machine = Machine(30 / PORTION_ROWS)
    work_through(engine, machine, BATCH.slice(0, PORTION_ROWS))
    assert machine.rests == [MOST_REST_SECONDS]


def test_an_import_beside_sending_takes_more_transactions_for_the_same_contacts(engine: sa.Engine, tmp_path: Path) -> None:
    open_claim(engine)
    path = tmp_path / "people.csv"
    path.write_text("email,n\n" + "".join(f"a{number}@example.test,{number}\n" for number in range(5_000)) + "broken,1\na7@example.test,8\n")
    made: list[int] = []

    @event.listens_for(engine, "commit")
    def count(connection: sa.Connection) -> None:
        made.append(connection.execute(sa.select(sa.func.count()).select_from(Contact)).scalar_one())

    report = import_file(engine, path, list_name="News", now=NOW)
    assert (report.read, report.inserted, report.rejected, report.duplicates) == (5_002, 5_000, 1, 1)
    assert made[0] == 0
    assert made[1] == PORTION_ROWS
    assert made[-1] == 5_000
    again = import_file(engine, path, list_name="News", now=NOW)
    assert (again.inserted, again.updated, again.unchanged, again.duplicates) == (0, 0, 5_000, 1)


@pytest.mark.parametrize("sending", [True, False])
def test_beside_sending_nothing_is_read_ahead(engine: sa.Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sending: bool) -> None:
    if sending:
        open_claim(engine)
    path = tmp_path / "people.csv"
    path.write_text("email\n" + "".join(f"a{number}@example.test\n" for number in range(12_000)))
    done: list[str] = []
    two_read = threading.Event()
    prepare, merge = importing.prepare, merging.merge

    def note_read(*given: Any) -> Any:
        done.append("read")
        if done.count("read") == 2:
            two_read.set()
        return prepare(*given)

    def note_merge(*given: Any, **options: Any) -> Any:
        assert sending or two_read.wait(60)
        outcome = merge(*given, **options)
        done.append("merged")
        return outcome

    monkeypatch.setattr(importing, "prepare", note_read)
    monkeypatch.setattr(merging, "merge", note_merge)
    assert import_file(engine, path, list_name="News", now=NOW).inserted == 12_000
    second = done.index("read", 1)
    assert done[:second] == (["read", *["merged"] * (second - 1)] if sending else ["read"])
    assert done.count("merged") == (6 if sending else 2)
