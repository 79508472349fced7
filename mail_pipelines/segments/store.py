"""Versions of a snapshot: one writer, an atomic switch, readers that hold what they read.

A snapshot is a folder of immutable files. Its manifest names those of one version, and one row of `sync_state` names the
manifest that counts; a writer moves that row on by compare-and-swap, so of two writers one loses and a killed one changes nothing.
A reader holds a shared lock on its manifest; garbage collection deletes an old manifest, and files no manifest names, only
under the exclusive lock. The kernel drops the locks of a killed process.

What does not belong here: what is in the files.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import errno
import fcntl
import functools
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import pydantic
import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine

from mail_pipelines.database.engine import reading, transact
from mail_pipelines.database.models import SyncState
from mail_pipelines.errors import MailPipelinesError
from mail_pipelines.segments.manifest import ContactManifest, EngagementManifest

SOURCE = "snapshot"
MANIFEST_PATTERN = "manifest-*.json"
LOCK_NAME = "writer.lock"

M = TypeVar("M", ContactManifest, EngagementManifest)


class SnapshotError(MailPipelinesError):
    """A snapshot cannot be read or refreshed."""


class SnapshotMissing(SnapshotError):
    """No version was ever made, or its files are gone."""


class SnapshotBusy(SnapshotError):
    """Another refresh of the same snapshot is at work, or was faster."""


class SnapshotDiskFull(SnapshotError):
    """Too little free disk for a refresh; the version before stays."""


@dataclass(frozen=True)
class Pointer:
    """The row of `sync_state`: which manifest counts."""

    version: int
    manifest: str
    sha256: str


@dataclass(frozen=True)
class Store(Generic[M]):
    """The folder `<folder>/<kind>` and its row of `sync_state`."""

    engine: Engine
    folder: Path
    kind: str
    form: pydantic.TypeAdapter[M]

    @property
    def path(self) -> Path:
        return self.folder / self.kind

    def pointer(self) -> Pointer | None:
        with reading(self.engine) as connection:
            row = connection.execute(sa.select(SyncState.version, SyncState.value).where(SyncState.source == SOURCE, SyncState.key == self.kind)).one_or_none()
        return None if row is None else Pointer(row.version, row.value["manifest"], row.value["sha256"])

    def load(self, pointer: Pointer) -> M:
        """Raises `SnapshotMissing` if the manifest is gone or is not the one that was published."""
        return self._decode(pointer, self._read(pointer))

    def _read(self, pointer: Pointer) -> bytes:
        try:
            return (self.path / pointer.manifest).read_bytes()
        except FileNotFoundError as error:
            raise self._missing(f"version {pointer.version} is not in {self.path}") from error

    def _decode(self, pointer: Pointer, document: bytes) -> M:
        if hashlib.sha256(document).hexdigest() != pointer.sha256:
            raise self._missing(f"{self.path / pointer.manifest} was changed since it was published")
        return self.form.validate_python(json.loads(document)["manifest"])

    def _missing(self, what: str) -> SnapshotMissing:
        return SnapshotMissing(f"no usable snapshot of {self.kind}: {what}; run `mail-pipelines segment refresh`")

    @contextlib.contextmanager
    def pinned(self) -> Iterator[M]:
        """The newest version, whose files stay until the context ends. Raises `SnapshotMissing`."""
        while True:
            pointer = self.pointer()
            if pointer is None:
                raise self._missing("none was made yet")
            try:
                file = (self.path / pointer.manifest).open("rb")
            except FileNotFoundError as error:
                if self.pointer() == pointer:
                    raise self._missing(f"version {pointer.version} is not in {self.path}") from error
                continue
            with file:
                fcntl.flock(file, fcntl.LOCK_SH)
                if os.fstat(file.fileno()).st_nlink == 0:
                    # Collected between the open and the lock: a newer version counts.
                    continue
                yield self._decode(pointer, file.read())
                return

    @contextlib.contextmanager
    def writing(self, now: dt.datetime, min_free_mb: int) -> Iterator[Writer[M]]:
        """The only writer of this snapshot. Files it wrote but did not publish are deleted at the end.

        Raises `SnapshotBusy` if another process writes, `SnapshotDiskFull` if less than `min_free_mb` are free or the disk fills up.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            with (self.path / LOCK_NAME).open("ab") as lock:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError as error:
                    raise SnapshotBusy(f"the snapshot of {self.kind} is being refreshed by another process; try again when it is done") from error
                free_mb = shutil.disk_usage(self.path).free // 1_000_000
                if free_mb < min_free_mb:
                    raise SnapshotDiskFull(
                        f"{self.path} has {free_mb} MB free, a refresh needs {min_free_mb} MB (snapshots.min_free_mb): free some, or move snapshots.folder"
                    )
                pointer = self.pointer()
                writer = Writer(self, pointer, self._current(pointer), now, secrets.token_hex(4))
                writer.collect_garbage()
                try:
                    yield writer
                finally:
                    writer.collect_garbage()
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise SnapshotDiskFull(f"the disk of {self.path} is full; the version before is kept: free some, or move snapshots.folder") from error
            raise

    def _current(self, pointer: Pointer | None) -> M | None:
        if pointer is None:
            return None
        try:
            manifest = self.load(pointer)
        except SnapshotMissing:
            # The folder was lost or moved: everything is built again.
            return None
        return manifest if all((self.path / name).is_file() for name in manifest.files()) else None


@dataclass
class Writer(Generic[M]):
    """One refresh in progress: names for its files, and the switch at its end. `current` is None when everything must be built."""

    store: Store[M]
    pointer: Pointer | None
    current: M | None
    now: dt.datetime
    nonce: str
    made: int = 0

    @property
    def version(self) -> int:
        return 1 if self.pointer is None else self.pointer.version + 1

    @property
    def path(self) -> Path:
        return self.store.path

    def new_name(self, what: str) -> str:
        self.made += 1
        return f"{what}-{self.version:06}-{self.nonce}-{self.made:04}.parquet"

    def publish(self, manifest: M) -> None:
        """Make `manifest` the version that counts. Raises `SnapshotBusy` if another writer was faster."""
        document = json.dumps({"files": sorted(set(manifest.files())), "manifest": self.store.form.dump_python(manifest, mode="json")}).encode()
        name = f"manifest-{manifest.version:06}-{self.nonce}.json"
        with (self.path / name).open("xb") as file:
            file.write(document)
            file.flush()
            os.fsync(file.fileno())
        sync_folder(self.path)
        value = {"manifest": name, "sha256": hashlib.sha256(document).hexdigest()}
        if not transact(self.store.engine, lambda connection: self._switch(connection, value)):
            (self.path / name).unlink()
            raise SnapshotBusy(f"another process published version {manifest.version} of the snapshot of {self.store.kind} first")
        self.pointer = Pointer(manifest.version, name, value["sha256"])

    def _switch(self, connection: Connection, value: dict[str, Any]) -> bool:
        values = {"value": value, "version": self.version, "changed_at": self.now}
        mine = sa.and_(SyncState.source == SOURCE, SyncState.key == self.store.kind)
        if self.pointer is None:
            # The row is the lock: of two first writers the second one meets it.
            if connection.execute(sa.select(SyncState.version).where(mine).with_for_update()).first() is not None:
                return False
            connection.execute(sa.insert(SyncState).values(source=SOURCE, key=self.store.kind, **values))
            return True
        return connection.execute(sa.update(SyncState).where(mine, SyncState.version == self.pointer.version).values(**values)).rowcount == 1

    def collect_garbage(self) -> None:
        """Delete old versions that nobody reads, and files that no version names."""
        kept = {LOCK_NAME}
        for path in self.path.glob(MANIFEST_PATTERN):
            if self.pointer is not None and path.name == self.pointer.manifest:
                kept.update(_files_of(path))
                continue
            with path.open("rb") as file:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    kept.update(_files_of(path))
                else:
                    path.unlink()
        for path in self.path.iterdir():
            if path.name not in kept:
                path.unlink(missing_ok=True)


def _files_of(manifest: Path) -> set[str]:
    try:
        return {manifest.name, *json.loads(manifest.read_bytes())["files"]}
    except ValueError:
        # A file damaged from outside names nothing; its version is built again.
        return {manifest.name}


def sync_folder(path: Path) -> None:
    """Make new names in a folder survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def contact_store(engine: Engine, folder: Path) -> Store[ContactManifest]:
    return Store(engine, folder, "contacts", _contact_form())


def engagement_store(engine: Engine, folder: Path) -> Store[EngagementManifest]:
    return Store(engine, folder, "engagement", _engagement_form())


# Made once in a process, when first used: that takes longer than to read a manifest.
@functools.cache
def _contact_form() -> pydantic.TypeAdapter[ContactManifest]:
    return pydantic.TypeAdapter(ContactManifest)


@functools.cache
def _engagement_form() -> pydantic.TypeAdapter[EngagementManifest]:
    return pydantic.TypeAdapter(EngagementManifest)
