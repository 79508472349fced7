"""Snapshots as other parts use them: refresh one, open both. Imports nothing heavy until it works."""

from __future__ import annotations

import contextlib
import datetime as dt
import functools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sqlalchemy.engine import Engine

from mail_pipelines.delivery.ledger_archive import LedgerArchive
from mail_pipelines.segments.catalogue import Catalogue
from mail_pipelines.segments.manifest import ContactManifest, EngagementManifest, SnapshotInfo
from mail_pipelines.segments.store import SnapshotBusy, SnapshotMissing, contact_store, engagement_store

if TYPE_CHECKING:
    import duckdb

# Called with what is being read, how much is done, and of how much if that is known.
Progress = Callable[[str, int, int | None], None]

MIN_FREE_MB = 200
# Longer than the first snapshot of ten million contacts takes.
TURN_SECONDS = 600
_POLL_SECONDS = 0.2


@dataclass(frozen=True)
class Snapshots:
    """One version of each snapshot; its files stay while `open_snapshots` is open."""

    contact_folder: Path
    contacts: ContactManifest
    engagement_folder: Path
    engagement: EngagementManifest

    @property
    def contact_version(self) -> int:
        return self.contacts.version

    @property
    def engagement_version(self) -> int:
        return self.engagement.version

    @property
    def versions(self) -> dict[str, int]:
        """Both, as an audience records them."""
        return {"contacts": self.contact_version, "engagement": self.engagement_version}

    @property
    def catalogue(self) -> Catalogue:
        """What criteria may speak of on these versions."""
        return Catalogue(self.contacts.fields, self.contacts.lists, self.engagement.campaigns)

    @functools.cached_property
    def connection(self) -> duckdb.DuckDBPyConnection:
        """What these versions are read with: made once, which takes longer than a question about one contact. For one thread."""
        from mail_pipelines.segments.compilation import connect

        return connect()


@contextlib.contextmanager
def open_snapshots(engine: Engine, folder: Path) -> Iterator[Snapshots]:
    """Pin the newest version of both snapshots. Raises `store.SnapshotMissing` if one was never made or its files are gone."""
    contacts, engagement = contact_store(engine, folder), engagement_store(engine, folder)
    with contacts.pinned() as contact_manifest, engagement.pinned() as engagement_manifest:
        yield Snapshots(contacts.path, contact_manifest, engagement.path, engagement_manifest)


def refresh_contacts(engine: Engine, folder: Path, *, now: dt.datetime, min_free_mb: int = MIN_FREE_MB, progress: Progress | None = None) -> SnapshotInfo:
    """Bring the contact snapshot up to date: a first build, or what the change feed says since the last refresh.

    Killed at any moment, the version before stays and the next refresh works. Raises `store.SnapshotBusy`, `store.SnapshotDiskFull`.
    """
    from mail_pipelines.segments import contact_snapshot

    return contact_snapshot.refresh(engine, folder, now=now, min_free_mb=min_free_mb, progress=progress or _silent)


def refresh_engagement(
    engine: Engine,
    folder: Path,
    *,
    now: dt.datetime,
    min_free_mb: int = MIN_FREE_MB,
    progress: Progress | None = None,
    archive: LedgerArchive | None = None,
    singles_from: int = 0,
) -> SnapshotInfo:
    """Bring the engagement snapshot up to date: new events, and receivers of campaigns whose delivered counter changed. Otherwise as `refresh_contacts`.

    Single events stay only of the month `singles_from` (YYYYMM) and later ones (`delivery.retention`). `archive` has the receivers of archived campaigns,
    which are needed if the snapshot is made anew; raises `LedgerArchiveError` if it is away then.
    """
    from mail_pipelines.segments import engagement_snapshot

    archive = archive or LedgerArchive("")
    return engagement_snapshot.refresh(
        engine, folder, now=now, min_free_mb=min_free_mb, progress=progress or _silent, archive=archive, singles_from=singles_from
    )


def engagement_read_until(engine: Engine, folder: Path) -> dt.datetime | None:
    """The engagement snapshot has all events that were recorded before this, and does not ask for them again; None if it is still to be made."""
    from mail_pipelines.segments.feed import OVERLAP

    try:
        with engagement_store(engine, folder).pinned() as manifest:
            return manifest.position.read_at - OVERLAP
    except SnapshotMissing:
        return None


def in_turn(refresh: Callable[[], SnapshotInfo]) -> SnapshotInfo:
    """Refresh as soon as no other process does: campaigns that start together all want the contacts as they are now.

    `refresh` takes the time anew with each call, since a reading must not be older than the one before. Raises `store.SnapshotBusy` after `TURN_SECONDS`.
    """
    end = time.monotonic() + TURN_SECONDS
    while True:
        try:
            return refresh()
        except SnapshotBusy:
            if time.monotonic() > end:
                raise
        time.sleep(_POLL_SECONDS)


def _silent(_what: str, _done: int, _total: int | None) -> None:
    pass
