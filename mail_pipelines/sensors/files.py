"""Files dropped into the inbox folder."""

from __future__ import annotations

import hashlib
import os
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import dagster as dg

from mail_pipelines.contacts.sets import slices
from mail_pipelines.ops.maintenance import DroppedFile, import_contacts
from mail_pipelines.resources.database import CentralDatabase
from mail_pipelines.sensors.runs import unfinished
from mail_pipelines.sensors.ticks import instance_of

FILES_A_TICK = 20
SUFFIXES = (".csv", ".parquet")
# What an import leaves beside its file.
REJECTS = ".rejected.csv"
# A file that changed a moment ago may still be written.
QUIET_SECONDS = 5
# After so many failed imports a file is left alone until it changes.
FAILURES_UNTIL_LEFT = 3
FILE_TAG = "mail-pipelines/file"
VERSION_TAG = "mail-pipelines/file_version"


@dataclass(frozen=True)
class WaitingFile:
    """A file to import. `tag` names its path, `version` also its size and when it was written; neither tells the path."""

    path: Path
    tag: str
    version: str

    @classmethod
    def of(cls, path: Path, status: os.stat_result) -> WaitingFile:
        return cls(path, _digest(str(path)), _digest(f"{path}:{status.st_mtime_ns}:{status.st_size}"))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:32]


def waiting_files(inbox: Path, now: float) -> Iterator[WaitingFile]:
    """Files `<list>/<name>.csv|.parquet` that nobody has written to for some seconds, oldest first."""
    found = []
    for path in inbox.glob("*/*"):
        if path.suffix.lower() in SUFFIXES and not path.name.endswith(REJECTS) and path.is_file():
            try:
                found.append((path.stat(), path))
            except FileNotFoundError:
                # An import has moved it away since.
                continue
    for status, path in sorted(found, key=lambda file: file[0].st_mtime):
        if now - status.st_mtime >= QUIET_SECONDS:
            yield WaitingFile.of(path, status)


def dropped_files(context: dg.SensorEvaluationContext, database: CentralDatabase) -> dg.SensorResult | dg.SkipReason:
    """Import contact files that were put into the inbox: again after an import that was killed or failed, up to three times a version."""
    inbox = Path(database.settings.operation.inbox)
    instance = instance_of(context)
    # Before the folder is read: a run that ends in between has moved its file away.
    imported = {run.tags.get(FILE_TAG) for run in unfinished(instance, import_contacts.name)}
    waiting = list(waiting_files(inbox, time.time()))
    left = _left_alone(instance, [file.version for file in waiting])
    chosen = [file for file in waiting if file.tag not in imported and file.version not in left][:FILES_A_TICK]
    if not chosen:
        failed = f"; {len(left)} were tried and are left until they change, see the runs of {import_contacts.name}" if left else ""
        return dg.SkipReason(f"no file is to be imported from {inbox}{failed}")
    return dg.SensorResult(
        run_requests=[
            dg.RunRequest(
                job_name=import_contacts.name,
                tags={FILE_TAG: file.tag, VERSION_TAG: file.version},
                run_config=dg.RunConfig(ops={"import_file": DroppedFile(path=str(file.path), list_name=file.path.parent.name)}),
            )
            for file in chosen
        ]
    )


def _left_alone(instance: dg.DagsterInstance, versions: list[str]) -> set[str]:
    """Versions of files whose import failed three times, or was cancelled by an operator."""
    failures: Counter[str] = Counter()
    for some in slices(versions):
        ended = [dg.DagsterRunStatus.FAILURE, dg.DagsterRunStatus.CANCELED]
        for run in instance.get_runs(dg.RunsFilter(job_name=import_contacts.name, statuses=ended, tags={VERSION_TAG: some})):
            failures[run.tags[VERSION_TAG]] += FAILURES_UNTIL_LEFT if run.status is dg.DagsterRunStatus.CANCELED else 1
    return {version for version, count in failures.items() if count >= FAILURES_UNTIL_LEFT}
