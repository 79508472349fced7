"""Reading a journal onward from where the last reader stopped: blocks of whole records, each with its place.

What belongs here: finding the next bytes across rotation and truncation, and cutting them into records. What does not: what a record
says (`Journal` and its parsers), and what follows from it (`audit`). A claim's own reader (`Journal.evidence`) is stricter: it wants
proof that nothing is missing, where this one goes on behind a gap and says that there was one.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

from mail_pipelines.dispatch.journal import Entry, Journal, Position

BLOCK_BYTES = 1 << 20
# The last record of a log that is being written may go on: it is read once nothing has been added for so long.
SETTLED_SECONDS = 1.0
# Who was about to write when a file was renamed still writes there: it is left for the next one once nothing has been added for so long.
LEFT_SECONDS = 5.0


@dataclass(frozen=True)
class Block:
    """Whole records, each with its line break. `start` is the place of the first byte; `gap`: what came before it is gone."""

    start: Position
    data: bytes
    gap: bool = False

    @property
    def end(self) -> Position:
        """The place from which to go on."""
        return Position(self.start.inode, self.start.offset + len(self.data))


def quiet_seconds(written_at: float, now: float) -> float:
    """How long nothing has been added to a file, by its date (epoch seconds); or how far its date is ahead: then nothing has been since the host's clock
    was set back, and waiting for the clock to come there again would leave the end of the file unread for so long.
    """
    return abs(now - written_at)


def blocks(journal: Journal, start: Position | None, now: float) -> Iterator[Block]:
    """Everything from `start` on (None: all there is), at most about `BLOCK_BYTES` at a time. `now` is epoch seconds.

    A file is told by its inode: one that was renamed is read to its end before the next, which waits until nobody adds to that one any more. If the
    file of `start` is gone, reading begins with the oldest that is left; if it was cut short, with its beginning. Reading something again is for
    the caller to bear.
    """
    files = journal.files()
    gap = False
    offset = 0
    if start is not None:
        inodes = [inode for inode, _ in files]
        if start.inode in inodes:
            files = files[inodes.index(start.inode) :]
            offset = start.offset
            if files[0][1].stat().st_size < offset:
                offset, gap = 0, True
        else:
            gap = True
    for inode, path in files:
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            if status.st_ino != inode:
                # Rotated at this moment: the next reader goes on where this one ends.
                return
            file.seek(offset)
            is_last = inode == files[-1][0]
            quiet = quiet_seconds(status.st_mtime, now)
            for block in _blocks(journal, file, Position(inode, offset), may_end=quiet >= (SETTLED_SECONDS if is_last else LEFT_SECONDS)):
                yield Block(block.start, block.data, gap)
                gap = False
            if not is_last and quiet < LEFT_SECONDS:
                return
            if is_last and (gap or not file.tell()):
                # Nothing is in the newest file yet; still the next reader begins there.
                yield Block(Position(inode, 0), b"", gap)
        offset = 0


def lines_about(journal: Journal, start: Position, token: str, now: float) -> list[bytes]:
    """The records from `start` on about the message of `token`, each without its last line break. A gap is passed over."""
    found = _lines_naming(journal, start, token.encode(), now)
    # In a queue it has another name, and some lines have only that.
    names = {entry.message for line in found if (entry := _entry(journal, line)) is not None and entry.message}
    return _lines_naming(journal, start, names.pop().encode(), now) if len(names) == 1 else found


def _entry(journal: Journal, line: bytes) -> Entry | None:
    try:
        return journal.parse(line)
    except ValueError:
        return None


def _lines_naming(journal: Journal, start: Position, word: bytes, now: float) -> list[bytes]:
    found = []
    for block in blocks(journal, start, now):
        at = block.data.find(word)
        while at >= 0:
            begin, end = journal.record_around(block.data, at)
            found.append(block.data[begin:end].rstrip(b"\n"))
            at = block.data.find(word, end)
    return found


def _blocks(journal: Journal, file: BinaryIO, start: Position, *, may_end: bool) -> Iterator[Block]:
    """The rest of an open file; its last record only if nothing will be added to that (`may_end`)."""
    rest = b""
    while chunk := file.read(BLOCK_BYTES):
        data = rest + chunk
        whole = journal.whole_records(data)
        if whole:
            yield Block(start, data[:whole])
            start = Position(start.inode, start.offset + whole)
        rest = data[whole:]
    if may_end and (end := rest.rfind(b"\n") + 1):
        yield Block(start, rest[:end])
