"""Files dropped into the inbox folder."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import dagster as dg

from mail_pipelines.ops.maintenance import DroppedFile, import_contacts
from mail_pipelines.resources.database import CentralDatabase

FILES_A_TICK = 20
SUFFIXES = (".csv", ".parquet")
# What an import leaves beside its file.
REJECTS = ".rejected.csv"
# A file that changed a moment ago may still be written.
QUIET_SECONDS = 5


def waiting_files(inbox: Path, now: float) -> Iterator[Path]:
    """Files `<list>/<name>.csv|.parquet` that nobody has written to for some seconds, oldest first."""
    files = [path for path in inbox.glob("*/*") if path.suffix.lower() in SUFFIXES and not path.name.endswith(REJECTS) and path.is_file()]
    for path in sorted(files, key=lambda path: path.stat().st_mtime):
        if now - path.stat().st_mtime >= QUIET_SECONDS:
            yield path


def dropped_files(database: CentralDatabase) -> dg.SensorResult | dg.SkipReason:
    """Import contact files that were put into the inbox, each version of a file once."""
    inbox = Path(database.settings.operation.inbox)
    requests = []
    for path in waiting_files(inbox, time.time()):
        status = path.stat()
        config = DroppedFile(path=str(path), list_name=path.parent.name)
        requests.append(
            dg.RunRequest(
                job_name=import_contacts.name,
                run_key=f"{path}:{status.st_mtime_ns}:{status.st_size}",
                run_config=dg.RunConfig(ops={"import_file": config}),
            )
        )
        if len(requests) == FILES_A_TICK:
            break
    return dg.SensorResult(run_requests=requests) if requests else dg.SkipReason(f"no file waits in {inbox}")
