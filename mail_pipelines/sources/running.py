"""A run of a section: land, merge in chunks, carry out deletions, note where it stands. Killed at any moment and run again it gives the same.

The cursor moves only when all that was landed is merged, so what a killed or failed run has not merged is read again.
"""

from __future__ import annotations

import csv
import dataclasses
import datetime as dt
import itertools
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sqlalchemy.engine import Engine

from mail_pipelines.contacts.portions import ahead, portions
from mail_pipelines.database.bulk import CHUNK_ROWS
from mail_pipelines.database.engine import transact
from mail_pipelines.dispatch.files import is_locked, only_one
from mail_pipelines.sources import cursor, deleting, landing, merging, status, suppressing
from mail_pipelines.sources.declaration import FOLDER, Contacts, Section, Source, Suppressions
from mail_pipelines.sources.merging import Tally
from mail_pipelines.sources.staging import POSITION, Landing, Staging, open_staging
from mail_pipelines.sources.status import Standing

if TYPE_CHECKING:
    import pyarrow as pa

# What was merged since is merged again after a kill, and changes nothing then; a note costs a write to the disk, as a chunk does.
_NOTE_SECONDS = 1.0
_WORK = ".work"
# Folder of dlt's packages, within the work folder.
PACKAGES = "dlt"


@dataclass(frozen=True)
class Report:
    """What a good run did. `reject_file` has id and reason of each row left out, or is None. `lag_seconds` is how old the copy had become before it."""

    standing: Standing
    ended: int
    reject_file: Path | None
    lag_seconds: float


def work_folder(home: Path) -> Path:
    """Where packages, staging files, locks and reject files are."""
    return home / FOLDER / _WORK


def reject_path(home: Path, source: str, section: Section) -> Path:
    return work_folder(home) / f"{source}.{section}.rejected.csv"


def lock(home: Path, source: str) -> Path:
    """What whoever reads or tells the source holds."""
    return work_folder(home) / f"{source}.lock"


def is_running(home: Path, source: str) -> bool:
    """Whether a process of this host is reading the source now."""
    return is_locked(lock(home, source))


def wrong(home: Path, source: str, standing: Standing) -> str | None:
    """What was wrong with the last run of a part: its error, or that it had no end; None if nothing was."""
    if standing.error:
        return standing.error
    if standing.begun_at and standing.ended_at is None and not is_running(home, source):
        return "its last run was cut off: it was cancelled or killed, or took longer than Dagster lets a run take"
    return None


def run(
    engine: Engine,
    home: Path,
    source: Source,
    section: Section,
    *,
    whole: bool = False,
    accept_deletions: bool = False,
    progress: Callable[[int], None] | None = None,
) -> Report:
    """Bring one section up to date. `whole` reads everything even if there is a cursor; `progress` is called with the rows merged.

    Raises `SourceError` or another error, recorded as the standing's (the last good state stays), or `AlreadyRunning`.
    """
    resource = source.sections[section]
    folder = work_folder(home)
    folder.mkdir(parents=True, exist_ok=True)
    with only_one(lock(home, source.name), f"source {source.name}"):
        now = dt.datetime.now(dt.UTC)
        before = status.begin(engine, source.name, section, now)
        begin = time.monotonic()
        try:
            since = None if whole or accept_deletions else _since(resource, before, now)
            with open_staging(engine, folder, source.name, section) as staging:
                landed = landing.land(source, resource, staging, folder / PACKAGES, since=since, run=before.run + 1, now=now)
                landed = _merge_all(engine, home, source, section, resource, staging, landed, progress)
                ended = _finish(engine, source, section, resource, staging, landed, before, accept_deletions, time.monotonic() - begin)
        except Exception as error:
            missing = deleting.standing(engine, source.name)[0] if section == "contacts" else 0
            status.fail(engine, source.name, section, error, missing=missing)
            raise
    path = reject_path(home, source.name, section)
    lag = before.lag_seconds(dt.datetime.now(dt.UTC)) or 0.0
    return Report(status.read(engine, source.name, section), ended, path if path.exists() else None, round(lag, 3))


def _since(resource: Contacts | Suppressions, before: Standing, now: dt.datetime) -> str | None:
    """From where the source is asked; None for everything."""
    if not resource.cursor or before.cursor is None or before.whole_at is None:
        return None
    if now - dt.datetime.fromisoformat(before.whole_at) >= dt.timedelta(hours=resource.whole_hours):
        return None
    return cursor.since(before.cursor, resource.overlap)


def _merge_all(
    engine: Engine,
    home: Path,
    source: Source,
    section: Section,
    resource: Contacts | Suppressions,
    staging: Staging,
    landed: Landing,
    progress: Callable[[int], None] | None,
) -> Landing:
    now = dt.datetime.now(dt.UTC)
    tally = Tally()
    tally.counts.update(landed.counts or {})
    tally.rejected.update(landed.rejected or {})
    path = reject_path(home, source.name, section)
    if landed.merged_to < 0:
        path.unlink(missing_ok=True)
    chunks = staging.rows(landed, CHUNK_ROWS)
    first = next(chunks, None)
    if first is None:
        return landed
    prepare, merge = _steps(engine, source, resource, landed.run, first, now)
    ready = ((portion, prepare(portion)) for rows in itertools.chain([first], chunks) for portion in portions(engine, rows))
    rejects: list[tuple[str, str]] = []
    noted = time.monotonic()
    with closing(ahead(engine, ready)) as prepared:
        for rows, chunk in prepared:
            rejects += merge(chunk, tally)
            highest = cursor.highest(rows[landing.CURSOR].combine_chunks(), landed.highest, now) if resource.cursor else None
            merged_to = rows[POSITION][-1].as_py()
            landed = dataclasses.replace(landed, merged_to=merged_to, counts=dict(tally.counts), rejected=dict(tally.rejected), highest=highest)
            if time.monotonic() - noted >= _NOTE_SECONDS:
                _write_rejects(path, rejects)
                staging.note(landed)
                rejects.clear()
                noted = time.monotonic()
            if progress:
                progress(tally.counts["read"])
    _write_rejects(path, rejects)
    staging.note(landed)
    return landed


def _steps(
    engine: Engine, source: Source, resource: Contacts | Suppressions, run: int, first: pa.Table, now: dt.datetime
) -> tuple[Callable[[pa.Table], Any], Callable[[Any, Tally], list[tuple[str, str]]]]:
    """What makes staged rows ready, without the database, and what merges them and returns id and reason of those left out."""
    if isinstance(resource, Contacts):
        merge = merging.Merge(engine, source, resource, merging.declare(engine, resource, first, now), run=run, now=now)
        return merge.prepare, merge.merge
    scope = transact(engine, lambda connection: suppressing.scope_of(connection, resource, now))
    return lambda rows: rows, lambda rows, tally: suppressing.chunk(engine, source, resource, scope, rows, tally, now)


def _write_rejects(path: Path, rejects: list[tuple[str, str]]) -> None:
    """Ids and reasons, not the rows: people in the file could not be erased."""
    if rejects:
        new = not path.exists()
        with path.open("a", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerows([["id", "reason"]] if new else [])
            writer.writerows(rejects)


def _finish(
    engine: Engine,
    source: Source,
    section: Section,
    resource: Contacts | Suppressions,
    staging: Staging,
    landed: Landing,
    before: Standing,
    accept: bool,
    seconds: float,
) -> int:
    """Everything is merged: the cursor moves, and then what is missing is dealt with, which may stop."""
    now = dt.datetime.now(dt.UTC)
    note, moved, whole_at = None, before.cursor, landed.begun_at if landed.since is None else before.whole_at
    if resource.cursor and landed.highest is not None:
        if before.cursor is None or cursor.order(landed.highest) >= cursor.order(before.cursor):
            moved = landed.highest
        elif landed.since is None:
            note = f"the cursor went back from {before.cursor} to {landed.highest}: the source was restored, or its clock was"
            moved = landed.highest
        elif cursor.order(landed.highest) < cursor.order(landed.since):
            note = f"the source gave only what lies before {landed.since}, from where it was asked: everything is read in the next run"
            whole_at = None
    ended = 0
    if isinstance(resource, Contacts):
        if landed.since is None:
            deleting.note_missing(engine, source.name, landed.run)
        target = merging.declare(engine, resource, None, now).list
        # The cursor may move before the guard speaks: whoever is missing is remembered.
        status.change(engine, source.name, section, now, cursor=moved, whole_at=whole_at, counts=landed.counts or {}, rejected=landed.rejected or {}, note=note)
        staging.clear()
        ended = deleting.carry_out(engine, source, resource, target, accept=accept, now=now)
    good = {"good_at": landed.begun_at, "ended_at": _now(), "seconds": round(seconds, 3), "missing": 0, "error": None, "note": note}
    status.change(engine, source.name, section, now, cursor=moved, whole_at=whole_at, counts=landed.counts or {}, rejected=landed.rejected or {}, **good)
    staging.clear()
    return ended


def _now() -> str:
    return dt.datetime.now(dt.UTC).isoformat()
