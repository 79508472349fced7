"""The archive of the servers' logs, outside the central database: each server ships its log there in pieces, and a recovery reads those of servers that
are gone.

What belongs here: pieces, their names and order, and the process's part that ships. What does not: what the lines say, and whether an archive proves
enough (`recovery.archived`).

A piece is a file `<server>/<incarnation>/<number>-<second>-<inode>-<offset>-<size>.log.gz`: whole records of one file of the log from `offset` on,
`size` bytes before they were compressed, shipped in that second of the epoch. Pieces are numbered from 1. Where the server found that something of its log
was gone before it was shipped it leaves a number out, so a number that is missing is a gap, whoever made it. Inodes alone would not tell: file systems
give them again.
"""

from __future__ import annotations

import asyncio
import datetime as dt
import gzip
import json
import logging
import re
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from mail_pipelines.dispatch import last_error, tail
from mail_pipelines.dispatch.files import DispatchError, ServerFolders
from mail_pipelines.dispatch.journal import Journal, Position
from mail_pipelines.object_store import ObjectStore

# A piece is shipped when so much has come, or so long after the one before. It is of the moment of a loss what may be missing.
PIECE_BYTES = 4 << 20
PIECE_SECONDS = 60.0
# Between two looks whether a piece is due.
INTERVAL_SECONDS = 5.0
# A process that is told to end has to wait for no more.
_PIECES_A_ROUND = 8
# Fast enough beside a server at full speed; a higher level saves a tenth.
_LEVEL = 3
# So much of the last piece is compared with the log before the next one.
_COMPARED_BYTES = 4096
# Of a server that lacks the file of its last piece: no file has this inode, so all that is left is shipped, behind a gap.
_NOWHERE = Position(0, 0)
_NAME = re.compile(r"(\d{8})-(\d{10})-(\d+)-(\d{12})-(\d+)\.log\.gz")
_CLOSED = "closed"
_log = logging.getLogger(__name__)


class ArchiveError(DispatchError):
    """The archive of logs cannot be used now."""


class Piece(NamedTuple):
    """A piece by its name. `at` is the epoch second in which it was shipped: no line in it is younger."""

    number: int
    at: int
    inode: int
    offset: int
    size: int

    @classmethod
    def of_name(cls, name: str) -> Piece | None:
        found = _NAME.fullmatch(name)
        return cls(*map(int, found.groups())) if found else None

    @property
    def name(self) -> str:
        return f"{self.number:08d}-{self.at:010d}-{self.inode}-{self.offset:012d}-{self.size}.log.gz"

    @property
    def end(self) -> Position:
        return Position(self.inode, self.offset + self.size)

    def follows(self, before: Piece) -> bool:
        """Whether nothing is missing between another piece and this one. It may begin before the other ends."""
        if self.number not in (before.number, before.number + 1):
            return False
        return self.offset == 0 if self.inode != before.inode else self.offset <= before.offset + before.size


@dataclass(frozen=True)
class Closed:
    """What is written when a server is retired: the name of its last piece, and the boot of its host in which that was."""

    last: str
    boot_id: str | None


class Archive:
    """The archive at a folder or a URL that fsspec knows. Every method raises `ArchiveError` if it is away, full, or refuses."""

    def __init__(self, url: str) -> None:
        self._store = ObjectStore(url, "log archive", ArchiveError, "what is not shipped stays in the server's log, and is shipped when it can be")
        self.url = self._store.url

    @classmethod
    def of(cls, url: str) -> Archive | None:
        """The archive at `url`; none if that is empty."""
        return cls(url) if url else None

    def servers(self) -> list[str]:
        return self._store.names()

    def incarnations(self, server: str) -> list[str]:
        return self._store.names(server)

    def pieces(self, server: str, incarnation: str) -> list[Piece]:
        """All pieces, in the order in which they were logged."""
        return sorted(piece for name in self._store.names(server, incarnation) if (piece := Piece.of_name(name)) is not None)

    def has(self, server: str, incarnation: str, piece: Piece) -> bool:
        return self._store.has(server, incarnation, piece.name)

    def read(self, server: str, incarnation: str, piece: Piece) -> bytes:
        """The records of a piece. Raises `ArchiveError` for one that is damaged, too."""
        with self._store.told("read"):
            data = gzip.decompress(self._store.read(server, incarnation, piece.name))
        if len(data) != piece.size:
            raise ArchiveError(f"the piece {piece.name} of server {server} in {self.url} has {len(data)} bytes and not {piece.size}: it is damaged")
        return data

    def put(self, server: str, incarnation: str, piece: Piece, data: bytes) -> None:
        """Write a piece, which is there whole or not at all."""
        self._store.write(gzip.compress(data, _LEVEL, mtime=0), server, incarnation, piece.name)

    def close(self, server: str, incarnation: str, boot_id: str | None) -> None:
        """Write down that the server has logged nothing behind its last piece."""
        pieces = self.pieces(server, incarnation)
        if pieces:
            closed = {"last": pieces[-1].name, "boot_id": boot_id}
            self._store.write(json.dumps(closed).encode(), server, incarnation, _CLOSED)

    def closed(self, server: str, incarnation: str) -> Closed | None:
        """What retirement has written, if it has."""
        if _CLOSED not in self._store.names(server, incarnation):
            return None
        with self._store.told("read"):
            return Closed(**json.loads(self._store.read(server, incarnation, _CLOSED)))

    def prune(self, before: dt.datetime) -> int:
        """Delete pieces that were shipped before a moment; how many. Of a server that may go on, an empty piece keeps the place."""
        last = int(before.timestamp())
        count = 0
        for server in self.servers():
            for incarnation in self.incarnations(server):
                pieces = self.pieces(server, incarnation)
                old = [piece for piece in pieces if piece.at < last and piece.size]
                if not old:
                    continue
                is_all = old[-1] == pieces[-1]
                if is_all and self.closed(server, incarnation) is None:
                    self.put(server, incarnation, Piece(old[-1].number + 1, old[-1].at, old[-1].inode, old[-1].end.offset, 0), b"")
                for piece in old:
                    self._store.remove(server, incarnation, piece.name)
                if is_all and _CLOSED in self._store.names(server, incarnation):
                    self._store.remove_folder(server, incarnation)
                count += len(old)
        return count


class Shipper:
    """Ships the log of one server, in the process that speaks for it. Where to go on is told by the pieces that are there, and by nothing else."""

    def __init__(self, url: str, server: str, folders: ServerFolders, journal: Journal) -> None:
        self._url = url
        self._server = server
        self._folders = folders
        self._journal = journal
        self._archive: Archive | None = None
        self._last: Piece | None = None
        self._last_bytes = b""
        self._end: Position | None = None
        self._tried_at = 0.0
        self._shipped_at: float | None = None
        self._error: str | None = None

    async def for_ever(self) -> None:
        """A look every few seconds. A failure is told, and tried again a minute later: sending does not depend on it."""
        while True:
            await asyncio.to_thread(self.look, time.time())
            await asyncio.sleep(INTERVAL_SECONDS)

    def look(self, now: float) -> None:
        """Ship what is due. `now` is epoch seconds."""
        try:
            # Before the last time: the host's clock was set back meanwhile.
            if 0 <= now - self._tried_at < PIECE_SECONDS and (self._error or self._pending() < PIECE_BYTES):
                return
            self._tried_at = now
            self.ship(now)
        except DispatchError as error:
            _log.warning("log archive of %s: %s", self._server, error)
            last_error.keep(self._folders, "log archive", error)
            self._error, self._last = str(error), None
        else:
            self._error = None

    def standing(self) -> Mapping[str, object]:
        """What a heartbeat tells: the place up to which everything is in the archive, since when, and why no further."""
        end = [self._end.inode, self._end.offset] if self._end is not None else None
        return {"shipped": {"end": end, "at": self._shipped_at, "error": self._error}}

    def ship(self, now: float) -> int:
        """Put what is not in the archive yet there, up to some pieces; how many."""
        if self._archive is None:
            self._archive = Archive(self._url)
        incarnation = self._folders.incarnation()
        start = self._start(self._archive, incarnation)
        number = self._last.number if self._last is not None else 0
        count = 0
        for block in _pieces(tail.blocks(self._journal, start, now)):
            if block.data:
                # A gap before the first piece of all is none.
                number += 2 if block.gap and number else 1
                piece = Piece(number, int(now), block.start.inode, block.start.offset, len(block.data))
                self._archive.put(self._server, incarnation, piece, block.data)
                self._last, self._last_bytes = piece, block.data[-_COMPARED_BYTES:]
                count += 1
            self._end = block.end
            if count == _PIECES_A_ROUND:
                break
        else:
            self._end = self._end or start
            self._shipped_at = now
        return count

    def _start(self, archive: Archive, incarnation: str) -> Position | None:
        """Behind the last piece; None if there is none."""
        if self._last is None or not archive.has(self._server, incarnation, self._last):
            self._last = max(archive.pieces(self._server, incarnation), default=None)
            if self._last is None:
                return None
            self._last_bytes = archive.read(self._server, incarnation, self._last)[-_COMPARED_BYTES:]
        return self._last.end if self._is_same_file(self._last) else _NOWHERE

    def _is_same_file(self, last: Piece) -> bool:
        """Whether the file with the inode of a piece is still the one that the piece is of."""
        path = next((path for inode, path in self._journal.files() if inode == last.inode), None)
        if path is None:
            return False
        with path.open("rb") as file:
            file.seek(last.end.offset - len(self._last_bytes))
            return file.read(len(self._last_bytes)) == self._last_bytes

    def _pending(self) -> int:
        """Bytes that were not shipped yet; of a log that was rotated since, a piece at least."""
        end = self._journal.end()
        if self._end is None or end.inode != self._end.inode:
            return PIECE_BYTES
        return end.offset - self._end.offset


def _pieces(blocks: Iterable[tail.Block]) -> Iterator[tail.Block]:
    """Blocks that follow each other in one file, joined to the size of a piece."""
    held: tail.Block | None = None
    for block in blocks:
        if held is not None and block.start == held.end and not block.gap and len(held.data) < PIECE_BYTES:
            held = tail.Block(held.start, held.data + block.data, held.gap)
            continue
        if held is not None:
            yield held
        held = block
    if held is not None:
        yield held
