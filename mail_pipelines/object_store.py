"""Whole objects in a local folder or at a URL that fsspec knows. Each is there completely or not at all, and on the disk before it counts as written.

What belongs here: names, reading, writing, removing, and errors that say which store it was. What does not: what is in an object, and when it may go.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from mail_pipelines.config import mask_url
from mail_pipelines.errors import MailPipelinesError

_PART = ".part"


class ObjectStore:
    """The store at `url`. Every method raises `error` if it is away, full, or refuses; `name` is what it is called in the message, `remedy` ends it."""

    def __init__(self, url: str, name: str, error: type[MailPipelinesError], remedy: str) -> None:
        # Half of what a send run may take to start; only who uses a store needs it.
        import fsspec.core
        from fsspec.implementations.local import LocalFileSystem

        self.url = mask_url(url)
        self._name, self._error, self._remedy = name, error, remedy
        with self.told("opened"):
            files, root = fsspec.core.url_to_fs(url)
        self._files: Any = files
        self._root: str = root
        self._local = isinstance(files, LocalFileSystem)

    @contextmanager
    def told(self, what: str) -> Iterator[None]:
        """Turn what goes wrong in the block into this store's error: it "cannot be `what`"."""
        try:
            yield
        except self._error:
            raise
        except Exception as error:
            # Each file system has errors of its own.
            words = (error.strerror if isinstance(error, OSError) else None) or type(error).__name__
            raise self._error(f"the {self._name} {self.url} cannot be {what}: {words}; {self._remedy}") from error

    def check(self) -> None:
        """The folder of a store is never made here: where a disk is not mounted, objects would land below its mount point."""
        if self._local and not Path(self._root).is_dir():
            raise self._error(f"the {self._name} {self.url} is not there: make the folder, or mount the disk that it is on")

    def names(self, *folders: str) -> list[str]:
        """What is in a folder, without what is half written; nothing if there is no such folder."""
        with self.told("read"):
            self.check()
            # What another host has put there in the meantime.
            self._files.invalidate_cache()
            try:
                found = self._files.ls(self._path(*folders), detail=False)
            except FileNotFoundError:
                return []
        names = [str(path).rstrip("/").rpartition("/")[2] for path in found]
        return sorted(name for name in names if name != _PART)

    def has(self, *path: str) -> bool:
        with self.told("read"):
            self.check()
            self._files.invalidate_cache()
            return bool(self._files.exists(self._path(*path)))

    def read(self, *path: str) -> bytes:
        with self.told("read"):
            self.check()
            data: bytes = self._files.cat_file(self._path(*path))
            return data

    @contextmanager
    def opened(self, *path: str) -> Iterator[IO[bytes]]:
        """An object for reading some of it. What goes wrong in the block counts as the store's."""
        with self.told("read"):
            self.check()
            with self._files.open(self._path(*path), "rb") as file:
                yield file

    def write(self, data: bytes, *path: str) -> None:
        with self.told("written"):
            self.check()
            if self._local:
                _write_local(Path(self._root), path[:-1], path[-1], data)
                return
            self._files.makedirs(self._path(*path[:-1]), exist_ok=True)
            # A put of an object store is whole by itself; other file systems rename.
            part = self._path(*path[:-1], _PART)
            self._files.pipe_file(part, data)
            self._files.mv(part, self._path(*path))

    def remove(self, *path: str) -> None:
        with self.told("pruned"):
            self._files.rm_file(self._path(*path))

    def remove_folder(self, *path: str) -> None:
        with self.told("pruned"):
            self._files.rm(self._path(*path), recursive=True)

    def _path(self, *names: str) -> str:
        return "/".join((self._root, *names))


def _write_local(root: Path, folders: tuple[str, ...], name: str, data: bytes) -> None:
    """With personal data in it: for nobody else to read, and on the disk before it counts as written."""
    folder = root
    for one in folders:
        folder = folder / one
        folder.mkdir(mode=0o700, exist_ok=True)
    part = folder / _PART
    with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    part.replace(folder / name)
    # The name, and those of the folders that may be new.
    for place in (folder, folder.parent):
        descriptor = os.open(place, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
