"""Refreshes lose nothing, keep nobody who was erased, disturb no reader, and survive being killed."""

from __future__ import annotations

import dataclasses
import datetime as dt
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import sqlalchemy as sa

from mail_pipelines.contacts import changes
from mail_pipelines.database.engine import create_engine, transact
from mail_pipelines.database.models import ContactChange
from mail_pipelines.segments import contact_snapshot, parts
from mail_pipelines.segments.catalogue import FieldType
from mail_pipelines.segments.criteria import AllOf, parse
from mail_pipelines.segments.evaluation import count, in_any, members
from mail_pipelines.segments.manifest import SnapshotInfo
from mail_pipelines.segments.snapshots import in_turn, open_snapshots, refresh_contacts, refresh_engagement
from mail_pipelines.segments.store import SnapshotBusy, SnapshotDiskFull, SnapshotMissing, contact_store
from tests.segments.world import NOW, World

MINUTE = dt.timedelta(minutes=1)
EVERYBODY: dict[str, Any] = {"all": []}
BERLIN = {"field": "city", "op": "=", "value": "berlin"}
Usage = namedtuple("Usage", "total used free")


def _files(world: World) -> set[str]:
    return {path.name for path in (world.folder / "contacts").glob("*.parquet")}


def _stored_text(world: World) -> str:
    """Everything that any file of the contact snapshot holds."""
    return " ".join(str(pq.read_table(path).to_pydict()) for path in (world.folder / "contacts").glob("*.parquet"))


def test_a_refresh_takes_what_changed_and_forgets_who_is_gone(world: World) -> None:
    world.contacts([(1, {"city": "Berlin"}, ["news"]), (2, {"city": "Hamburg"}, []), (3, {}, ["news", "offers"])])
    world.refresh()
    assert world.members(BERLIN) == {1}
    assert world.members({"in_list": "news"}) == {1, 3}
    world.contacts([(2, {"city": "BERLIN"}, ["news"]), (4, {"city": "berlin"}, [])], at=NOW + MINUTE)
    world.erase(1, at=NOW + MINUTE)
    world.refresh(NOW + MINUTE)
    assert world.members(BERLIN) == {2, 4}
    assert world.members({"in_list": "news"}) == {2, 3}
    assert world.members(EVERYBODY) == {2, 3, 4}


def test_a_change_committed_late_under_a_lower_number_is_not_lost(world: World) -> None:
    world.contacts([(number, {"city": "Berlin"}, []) for number in (1, 2, 3)])
    world.refresh()
    # Number 5 is taken at 12:01 and commits only after 6 was read.
    world.contacts([(1, {"city": "Bonn"}, [])], at=NOW + MINUTE)
    newest = _newest_change(world)
    world.contacts([(3, {"city": "Bonn"}, [])], at=NOW + MINUTE)
    with_gap = _move_change(world, newest + 1, newest + 2)
    world.refresh(NOW + 2 * MINUTE)
    assert world.members(BERLIN) == {2}
    world.contacts([(2, {"city": "Bonn"}, [])], at=NOW + MINUTE, feed=False)
    late = {"seq": newest + 1, "contact_id": 2, "op": "upsert", "created_at": NOW + MINUTE}
    transact(world.engine, lambda connection: connection.execute(sa.insert(ContactChange).values(**late)))
    info = refresh_contacts(world.engine, world.folder, now=NOW + 10 * MINUTE, min_free_mb=0)
    assert with_gap == newest + 2
    assert world.members(BERLIN) == set()
    assert info.changed == 1, "what was read before is not taken again"


def _newest_change(world: World) -> int:
    with world.engine.connect() as connection:
        return int(connection.execute(sa.select(sa.func.max(ContactChange.seq))).scalar_one())


def _move_change(world: World, old: int, new: int) -> int:
    change = sa.update(ContactChange).where(ContactChange.seq == old).values(seq=new)
    assert transact(world.engine, lambda connection: connection.execute(change)).rowcount == 1
    return new


def test_a_change_stamped_by_a_slow_clock_is_not_lost(world: World) -> None:
    world.contacts([(1, {"city": "Berlin"}, [])])
    world.refresh()
    world.contacts([(1, {"city": "Bonn"}, [])], at=NOW - dt.timedelta(hours=3))
    world.refresh(NOW + MINUTE)
    assert world.members(BERLIN) == set()


def test_the_erased_vanish_at_once_and_leave_the_files_within_72_hours(world: World) -> None:
    world.contacts([(1, {"city": "Rumpelstadt"}, []), (2, {"city": "Berlin"}, [])])
    world.refresh()
    world.contacts([(1, {"city": "Rumpeldorf"}, [])], at=NOW + MINUTE)
    world.refresh(NOW + MINUTE)
    world.erase(1, at=NOW + 2 * MINUTE)
    world.refresh(NOW + 2 * MINUTE)
    assert world.members(EVERYBODY, NOW + 2 * MINUTE) == {2}
    assert "rumpelstadt" in _stored_text(world)
    for hours in (12, 24, 25):
        world.refresh(NOW + dt.timedelta(hours=hours, minutes=2))
    assert "rumpel" not in _stored_text(world)
    assert world.members(EVERYBODY) == {2}


def test_no_address_is_in_a_snapshot(world: World) -> None:
    world.contacts([(1, {"city": "Berlin"}, ["news"])])
    world.refresh()
    assert "c1@" not in _stored_text(world)


def test_large_changes_are_folded_into_the_files_they_touch(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "PART_ROWS", 100)
    monkeypatch.setattr(contact_snapshot, "REWRITE_ROWS", 50)
    world.contacts((number, {"age": number}, []) for number in range(1, 1001))
    world.refresh()
    before = {part.name: part for part in _base(world)}
    assert len(before) == 10
    world.contacts(((number, {"age": -1}, ["news"]) for number in range(210, 290)), at=NOW + MINUTE)
    world.contacts(((number, {"age": -2}, []) for number in range(1001, 1131)), at=NOW + MINUTE)
    world.refresh(NOW + MINUTE)
    after = _base(world)
    kept = {part.name for part in after} & set(before)
    assert len(kept) == 8, "only the part that covers 201 to 300 and the last one are written anew"
    assert world.members({"field": "age", "op": "=", "value": -1}) == world.members({"in_list": "news"}) == set(range(210, 290))
    assert world.members({"field": "age", "op": "=", "value": -2}) == set(range(1001, 1131))
    assert world.members(EVERYBODY) == set(range(1, 1131))


def _base(world: World) -> tuple[Any, ...]:
    store = contact_store(world.engine, world.folder)
    pointer = store.pointer()
    assert pointer is not None
    return store.load(pointer).base


def test_many_small_refreshes_leave_few_layers(world: World) -> None:
    world.contacts((number, {"age": 0}, []) for number in range(1, 301))
    world.refresh()
    for step in range(1, 9):
        world.contacts([(step, {"age": step}, []), (100 + step, {"age": step}, [])], at=NOW + step * MINUTE)
        refresh_contacts(world.engine, world.folder, now=NOW + step * MINUTE, min_free_mb=0)
    with open_snapshots(world.engine, world.folder) as snapshots:
        assert len(snapshots.contacts.deltas) <= 2
        assert snapshots.contacts.rows == 300
    assert world.members({"field": "age", "op": "=", "value": 8}) == {8, 108}


def test_a_new_field_is_absent_until_it_has_values(world: World) -> None:
    world.contacts([(1, {"city": "Berlin"}, []), (2, {}, [])])
    world.refresh()
    world.field("size", "number")
    world.contacts([(2, {"size": 44}, [])], at=NOW + MINUTE)
    world.refresh(NOW + MINUTE)
    assert world.members({"field": "size", "op": "=", "value": 44}) == {2}
    assert world.members({"field": "size", "op": "empty"}) == {1}


def test_values_that_do_not_fit_their_field_are_absent_and_counted(world: World) -> None:
    world.contacts([(1, {"age": "old", "born": "yesterday", "vip": 1, "city": 5, "seen": "soon"}, []), (2, {"age": True, "city": "Bonn"}, [])])
    info = refresh_contacts(world.engine, world.folder, now=NOW, min_free_mb=0)
    refresh_engagement(world.engine, world.folder, now=NOW, min_free_mb=0)
    assert info.unusable == 6
    assert world.members({"all": [{"field": key, "op": "empty"} for key in ("age", "born", "vip", "city", "seen")]}) == {1}
    assert world.members({"field": "city", "op": "=", "value": "bonn"}) == {2}


@pytest.mark.parametrize(
    ("type_", "value", "kept"),
    [
        ("text", "STRASSE \ud800", "strasse ?"),
        ("text", "e\u0301", "é"),
        ("number", 10**400, None),
        ("number", float("inf"), None),
        ("number", 3, 3.0),
        ("date", "2026-02-30", None),
        ("datetime", "2026-02-03T04:05:06+01:00", dt.datetime(2026, 2, 3, 3, 5, 6)),
        ("datetime", "0001-01-01T00:00:00+01:00", None),
    ],
)
def test_values_are_kept_as_criteria_compare_them(type_: FieldType, value: Any, kept: Any) -> None:
    assert contact_snapshot.CONVERTERS[type_](value) == kept


def test_a_reader_keeps_its_version_while_newer_ones_are_made(world: World) -> None:
    world.contacts([(1, {"city": "Berlin"}, []), (2, {"city": "Berlin"}, [])])
    world.refresh()
    with open_snapshots(world.engine, world.folder) as old:
        names = set(old.contacts.files())
        world.erase(1, at=NOW + MINUTE)
        for step in range(1, 4):
            world.refresh(NOW + dt.timedelta(days=step))
        assert members(AllOf(()), old, now=NOW)["contact_id"].to_pylist() == [1, 2]
        assert world.members(EVERYBODY) == {2}
        assert names <= _files(world)
    world.refresh(NOW + dt.timedelta(days=5))
    assert not names & _files(world), "nobody reads them any more"


@pytest.mark.slow
def test_a_reader_in_another_process_sees_whole_versions_while_refreshes_go_on(world: World, database_url: str) -> None:
    world.contacts((number, {"age": 0}, []) for number in range(1, 401))
    world.refresh()
    reader = subprocess.Popen(
        [sys.executable, "-c", READER, database_url, str(world.folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ}
    )
    assert reader.stdout is not None
    assert reader.stdin is not None
    assert reader.stdout.readline().strip() == "ready"
    for step in range(1, 8):
        world.contacts(((number, {"age": step}, []) for number in range(1, 401)), at=NOW + step * MINUTE)
        refresh_contacts(world.engine, world.folder, now=NOW + step * MINUTE, min_free_mb=0)
    seen, _ = reader.communicate("stop\n", timeout=120)
    assert reader.returncode == 0
    readings = [tuple(map(int, line.split())) for line in seen.splitlines()]
    assert (readings[0][0], readings[-1][0]) == (0, 7)
    assert {found for _, found in readings} == {400}, "each version has everybody, all with the age of that version"


READER = """
import select, sys
from pathlib import Path
import datetime as dt
from mail_pipelines.database.engine import create_engine
from mail_pipelines.segments import evaluation
from mail_pipelines.segments.criteria import parse
from mail_pipelines.segments.snapshots import open_snapshots

engine, folder, now = create_engine(sys.argv[1]), Path(sys.argv[2]), dt.datetime.now(dt.UTC)
lines, stopping = [], False
while not stopping:
    stopping = bool(select.select([sys.stdin], [], [], 0)[0])
    with open_snapshots(engine, folder) as snapshots:
        age = snapshots.contact_version - 1
        found = evaluation.count(parse({"field": "age", "op": "=", "value": age}, snapshots.catalogue), snapshots, now=now).members
    lines.append(f"{age} {found}")
    if len(lines) == 1:
        print("ready", flush=True)
print("\\n".join(lines))
"""

REFRESH = """
import sys
import datetime as dt
from pathlib import Path
from mail_pipelines.database.engine import create_engine
from mail_pipelines.segments.snapshots import refresh_contacts

def progress(what, done, total):
    print(done, flush=True)
    sys.stdin.readline()

refresh_contacts(create_engine(sys.argv[1]), Path(sys.argv[2]), now=dt.datetime.fromisoformat(sys.argv[3]), min_free_mb=0, progress=progress)
"""


def _start_refresh(world: World, url: str, now: dt.datetime) -> subprocess.Popen[str]:
    """A refresh in a process of its own, stopped after its first rows."""
    process = subprocess.Popen(
        [sys.executable, "-c", REFRESH, url, str(world.folder), now.isoformat()], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ}
    )
    assert process.stdout is not None
    assert process.stdout.readline().strip().isdigit()
    return process


@pytest.mark.slow
def test_a_killed_refresh_leaves_the_old_version_and_the_next_one_works(world: World, database_url: str) -> None:
    world.contacts([(1, {"city": "Berlin"}, [])])
    world.refresh()
    world.contacts([(2, {"city": "Berlin"}, [])], at=NOW + MINUTE)
    process = _start_refresh(world, database_url, NOW + MINUTE)
    with pytest.raises(SnapshotBusy, match="being refreshed by another process"):
        refresh_contacts(world.engine, world.folder, now=NOW + MINUTE, min_free_mb=0)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    left = _files(world)
    assert world.members(BERLIN) == {1}
    world.refresh(NOW + 2 * MINUTE)
    assert world.members(BERLIN) == {1, 2}
    with open_snapshots(world.engine, world.folder) as snapshots:
        named = set(snapshots.contacts.files())
    assert _files(world) == named, f"what the killed one left is gone: {left - named}"


@pytest.mark.slow
def test_who_finds_it_busy_waits_for_its_turn(world: World, database_url: str) -> None:
    """As the freezes of two campaigns that start together do."""
    world.contacts([(1, {"city": "Berlin"}, [])])
    process = _start_refresh(world, database_url, NOW)
    found_busy = threading.Event()

    def refresh() -> SnapshotInfo:
        try:
            return refresh_contacts(world.engine, world.folder, now=NOW + MINUTE, min_free_mb=0)
        except SnapshotBusy:
            found_busy.set()
            raise

    with ThreadPoolExecutor() as pool:
        info = pool.submit(in_turn, refresh)
        assert found_busy.wait(120)
        process.communicate("\n" * 10)
        assert info.result(120).version == 2


def test_of_two_writers_one_wins_and_the_other_leaves_nothing(world: World) -> None:
    world.contacts([(1, {"city": "Berlin"}, [])])
    world.refresh()
    store = contact_store(world.engine, world.folder)
    elsewhere = World(world.engine, world.folder.parent / "copy")
    # A host that does not share the lock file, but does share the database.
    shutil.copytree(world.folder, elsewhere.folder)
    with store.writing(NOW, 0) as writer:
        assert writer.current is not None
        refresh_contacts(elsewhere.engine, elsewhere.folder, now=NOW + MINUTE, min_free_mb=0)
        with pytest.raises(SnapshotBusy, match="published version 2"):
            writer.publish(dataclasses.replace(writer.current, version=writer.version))
    assert [path.name for path in store.path.glob("manifest-000002-*")] == []


def test_a_lost_folder_is_said_and_built_anew(world: World) -> None:
    with pytest.raises(SnapshotMissing, match="none was made yet"), open_snapshots(world.engine, world.folder):
        pass
    world.contacts([(1, {"city": "Berlin"}, [])])
    world.refresh()
    for path in (world.folder / "contacts").iterdir():
        path.unlink()
    with pytest.raises(SnapshotMissing, match=r"version 1 is not in .*segment refresh"), open_snapshots(world.engine, world.folder):
        pass
    world.refresh(NOW + MINUTE)
    assert world.members(BERLIN) == {1}


def test_little_disk_is_refused_before_anything_is_written(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.contacts([(1, {"city": "Berlin"}, [])])
    world.refresh()
    before = _files(world)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**12, 10**12, 5_000_000))
    with pytest.raises(SnapshotDiskFull, match="5 MB free, a refresh needs 200 MB"):
        refresh_contacts(world.engine, world.folder, now=NOW + MINUTE)
    assert _files(world) == before
    assert world.members(BERLIN) == {1}


# --- engagement -------------------------------------------------------------------------------------------------


def _opened(contact_id: int, campaign: str, at: dt.datetime, **more: Any) -> dict[str, Any]:
    return {"contact_id": contact_id, "campaign": campaign, "kind": "open", "occurred_at": at, **more}


def test_events_committed_late_are_taken_and_none_twice(world: World) -> None:
    world.contacts((number, {}, []) for number in range(1, 5))
    world.campaign("spring", NOW)
    world.events([_opened(1, "spring", NOW)])
    world.refresh()
    world.events([_opened(2, "spring", NOW)], recorded_at=NOW - 10 * MINUTE)
    world.events([_opened(3, "spring", NOW)], recorded_at=NOW + MINUTE)
    world.refresh(NOW + 5 * MINUTE)
    info = refresh_engagement(world.engine, world.folder, now=NOW + 6 * MINUTE, min_free_mb=0)
    assert world.members({"did": "opened", "campaign": "spring"}) == {1, 2, 3}
    assert (info.rows, info.changed) == (3, 0)
    with open_snapshots(world.engine, world.folder) as snapshots:
        rolled = [row for layer in snapshots.engagement.rollups for part in layer for row in pq.read_table(snapshots.engagement_folder / part.name).to_pylist()]
    assert sorted((row["contact_id"], row["opens"]) for row in rolled) == [(1, 1), (2, 1), (3, 1)]


def test_opens_by_machines_count_neither_as_behaviour_nor_in_the_rank(world: World) -> None:
    world.contacts((number, {}, []) for number in (1, 2))
    world.campaign("spring", NOW)
    world.events([_opened(1, "spring", NOW - dt.timedelta(days=3)), _opened(2, "spring", NOW, machine=True)])
    world.refresh()
    assert world.members({"did": "opened"}) == world.members({"did": "opened", "last": 1}) == {1}
    with open_snapshots(world.engine, world.folder) as snapshots:
        table = members(AllOf(()), snapshots, now=NOW)
    assert [(row["contact_id"], row["engagement_rank"]) for row in table.to_pylist()] == [(1, 3), (2, 9999)]
    assert [str(field.type) for field in table.schema] == ["int64", "string", "int32"]


def test_receivers_follow_the_ledger_and_only_campaigns_that_moved_are_read(world: World) -> None:
    world.contacts((number, {}, []) for number in range(1, 5))
    world.campaign("spring", NOW - dt.timedelta(days=60))
    world.campaign("summer", NOW)
    world.delivered("spring", {1: NOW - dt.timedelta(days=50), 2: NOW - dt.timedelta(days=50)})
    world.delivered("summer", {2: NOW})
    world.refresh()
    with open_snapshots(world.engine, world.folder) as snapshots:
        before = {received.campaign_id: received.layer for received in snapshots.engagement.received}
    world.delivered("summer", {3: NOW})
    world.refresh(NOW + MINUTE)
    with open_snapshots(world.engine, world.folder) as snapshots:
        after = {received.campaign_id: received.layer for received in snapshots.engagement.received}
    changed = {key for key, campaign_id in world.campaigns.items() if before[campaign_id] != after[campaign_id]}
    assert changed == {"summer"}
    assert world.members({"did": "received", "last": 1}) == {2, 3}
    assert world.members({"did": "received"}) == {1, 2, 3}
    assert world.members({"did": "received", "within_days": 30}) == {2, 3}
    assert world.members({"all": [{"did": "received"}, {"did_not": "opened", "campaign": "summer"}]}) == {1, 2, 3}


def test_several_segments_give_each_contact_once(world: World) -> None:
    world.contacts((number, {"age": number, "@provider": "google" if number % 2 else "gmx"}, ["news"] if number > 2 else []) for number in range(1, 7))
    world.refresh()
    with open_snapshots(world.engine, world.folder) as snapshots:
        young, news, four = (
            parse(tree, snapshots.catalogue) for tree in ({"field": "age", "op": "<", "value": 5}, {"in_list": "news"}, {"field": "age", "op": "=", "value": 4})
        )
        table = members(in_any([young, news], [four]), snapshots, now=NOW)
        assert sorted(table["contact_id"].to_pylist()) == [1, 2, 3, 5, 6]
        assert members(in_any([], [four]), snapshots, now=NOW).num_rows == 0
        found = count(news, snapshots, now=NOW)
        assert (found.members, found.by_provider) == (4, {"gmx": 2, "google": 2})
        assert (found.contact_version, found.engagement_version) == (1, 1)


# --- size -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_200_000_contacts_are_built_and_refreshed_in_bounded_memory(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    path = tmp_path / "central.sqlite3"
    shutil.copy(request.getfixturevalue("_sqlite_template"), path)
    script = [sys.executable, "-c", BIG, f"sqlite:///{path}", str(tmp_path / "snapshots")]
    done = subprocess.run(script, capture_output=True, text=True, check=False, env={**os.environ})
    assert done.returncode == 0, done.stderr
    found, changed, kilobytes = map(int, done.stdout.split())
    assert (found, changed) == (99_900, 200)
    # A part of 262,144 rows in memory and once more while it is encoded; a million contacts take no more.
    assert kilobytes < 200_000, kilobytes


BIG = """
import datetime as dt, re, sys
from pathlib import Path
import pyarrow as pa, numpy as np, sqlalchemy as sa
from mail_pipelines.database.bulk import load
from mail_pipelines.database.engine import create_engine, transact
from mail_pipelines.database.models import Contact, ContactChange, Field, Subscription
from mail_pipelines.segments.evaluation import count
from mail_pipelines.segments.criteria import parse
from mail_pipelines.segments.manifest import SnapshotInfo
from mail_pipelines.segments.snapshots import in_turn, open_snapshots, refresh_contacts, refresh_engagement

engine, folder, rows = create_engine(sys.argv[1]), Path(sys.argv[2]), 200_000
now = dt.datetime(2026, 3, 1, tzinfo=dt.UTC)
transact(engine, lambda c: c.execute(sa.insert(Field), [{"id": 1, "key": "n", "label": "n", "type": "number", "created_at": now}]))
for start in range(0, rows, 10_000):
    ids = list(range(start + 1, start + 10_001))
    table = pa.table({
        "id": ids, "email": [f"c{i}@e.test" for i in ids], "address": [f"c{i}@e.test" for i in ids],
        "address_hash": pa.array([i.to_bytes(16, "big") for i in ids], pa.binary()), "domain": ["e.test"] * 10_000, "provider": ["other"] * 10_000,
        "attributes": [f'{{"n": {i % 2}}}' for i in ids], "tracking_allowed": [True] * 10_000,
        "created_at": pa.array([now] * 10_000), "updated_at": pa.array([now] * 10_000),
    })
    transact(engine, lambda c: load(c, Contact.__table__, table))

def peak():
    # Of this program alone: what `getrusage` tells begins with that of the process that started it.
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])

before = peak()
refresh_contacts(engine, folder, now=now, min_free_mb=0)
refresh_engagement(engine, folder, now=now, min_free_mb=0)

def change(connection):
    connection.execute(sa.delete(Contact).where(Contact.id <= 200))
    connection.execute(sa.insert(ContactChange), [{"contact_id": i, "op": "delete", "created_at": now} for i in range(1, 201)])

transact(engine, change)
info = refresh_contacts(engine, folder, now=now + dt.timedelta(minutes=1), min_free_mb=0)
with open_snapshots(engine, folder) as snapshots:
    found = count(parse({"field": "n", "op": "=", "value": 1}, snapshots.catalogue), snapshots, now=now).members
print(found, info.changed, peak() - before)
"""


def test_what_went_unread_is_read_from_the_contacts(world: World) -> None:
    """A snapshot that was not refreshed for longer than changes are kept, and one whose changes go while it reads them."""
    world.contacts([(number, {"city": "Berlin"}, []) for number in (1, 2, 3)])
    world.refresh()
    tomorrow, later = NOW + dt.timedelta(days=1), NOW + changes.KEPT + dt.timedelta(hours=1)
    world.contacts([(1, {"city": "Bonn"}, [])], at=tomorrow)
    world.refresh(tomorrow)
    assert changes.prune(world.engine, later) == 3
    # They were read: nothing is made anew.
    info = refresh_contacts(world.engine, world.folder, now=later, min_free_mb=0)
    assert (info.changed, info.rewritten) == (0, False)
    world.contacts([(2, {"city": "Bonn"}, [])], at=later)
    world.erase(3, at=later)
    much_later = later + changes.KEPT + dt.timedelta(hours=1)
    other = create_engine(world.engine.url.render_as_string(hide_password=False))
    pruned = []

    def prune(_connection: object, _cursor: object, statement: str, *_rest: object) -> None:
        if "FROM contact_changes" in statement and not pruned:
            pruned.append(changes.prune(other, much_later))

    sa.event.listen(world.engine, "before_cursor_execute", prune)
    info = refresh_contacts(world.engine, world.folder, now=much_later, min_free_mb=0)
    assert (pruned, info.rewritten) == ([2], True)
    assert world.members(BERLIN, much_later) == set()
    assert world.members(EVERYBODY, much_later) == {1, 2}
    other.dispose()
