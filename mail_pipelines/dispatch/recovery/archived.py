"""The part of a server that will not come back, read from the archive of logs at the centre.

What belongs here: which pieces count, and whether they prove that nothing is missing. What does not: what lines say (`reading`).

What a lost server logged after its last piece nobody knows, so its part stays incomplete: all outcomes of the archive are taken over, and what still
waits is in doubt. Only retirement waits until everything is shipped and writes that down; then the archive stands for the log.
"""

from __future__ import annotations

import datetime as dt
import itertools
from collections.abc import Callable, Iterator, Sequence

from mail_pipelines.dispatch import tail
from mail_pipelines.dispatch.archive import Archive, Piece
from mail_pipelines.dispatch.journal import Journal, Position
from mail_pipelines.dispatch.recovery import reading
from mail_pipelines.dispatch.recovery.reading import Found, Offers
from mail_pipelines.dispatch.recovery.standing import Part, ServerPart
from mail_pipelines.messages.keyring import KeyRing

# Longer than a session may take between a line and what it records of it, and than two clocks may differ.
OVERLAP = reading.OVERLAP
# Longer than from the first line about a claim to its last one: from there on it is known whose the lines are, where several servers share the log.
_BEFORE = dt.timedelta(minutes=10)


def read(
    archive: Archive, part: ServerPart, journal: Journal, keys: KeyRing, store: Callable[[Offers], None], *, shares: bool = False
) -> tuple[Part, str] | None:
    """Give `store` what the archive has of a server since the backup; what its part is by that, and why it is not the whole. None: nothing is there.

    `journal` says how the lines of this kind of server are read, `keys` has those that it may have worked with, `shares` says whether its log is another
    server's, to which its lines have come. Raises `ArchiveError` if the archive is away.
    """
    since = part.heartbeat_at - OVERLAP if part.heartbeat_at is not None else None
    incarnations = archive.incarnations(part.server)
    found = [Found(0, 0)]
    complete: str | None = None
    for incarnation in incarnations:
        pieces = archive.pieces(part.server, incarnation)
        recent = _since(pieces, since)
        if not recent:
            continue
        blocks = _blocks(archive, part.server, incarnation, _since(pieces, since - _BEFORE if since is not None else None))
        found.append(reading.read(part.server, journal, blocks, since, keys, store, shares=shares))
        if incarnation == part.incarnation:
            complete = _missing(archive, part, incarnation, pieces, recent)
    if len(found) == 1:
        return None
    if complete is None or len(found) > 2:
        complete = "its log folder was replaced"
    complete = complete or reading.foreign(sum(one.foreign for one in found))
    unreadable = sum(one.unreadable for one in found)
    notes = [complete, f"{unreadable} lines could not be read" if unreadable else ""]
    return (Part.INCOMPLETE if complete else Part.READ), "; ".join(["from the archive", *filter(None, notes)])


def _since(pieces: Sequence[Piece], since: dt.datetime | None) -> list[Piece]:
    """From the first on that may have a line since a moment: no line is younger than its piece."""
    return list(itertools.dropwhile(lambda piece: since is not None and piece.at < since.timestamp(), pieces))


def _missing(archive: Archive, part: ServerPart, incarnation: str, pieces: Sequence[Piece], recent: Sequence[Piece]) -> str:
    """What the archive may lack of the log since the backup; "" if nothing."""
    before = pieces[: len(pieces) - len(recent)][-1:]
    if not all(piece.follows(earlier) for earlier, piece in itertools.pairwise([*before, *recent])):
        return "pieces are missing"
    if not before and not _begins(recent[0], part):
        return "it begins later than the backup"
    closed = archive.closed(part.server, incarnation)
    if closed is None or closed.last != pieces[-1].name:
        return "the end of its log was not shipped"
    if part.boot_id != closed.boot_id:
        return "the host was started again, which may have cost the last lines before"
    return ""


def _begins(first: Piece, part: ServerPart) -> bool:
    """Whether nothing of the log before the first of all pieces was written after the backup."""
    return first.number == 1 and first.offset == 0 and part.journal_inode in (None, first.inode)


def _blocks(archive: Archive, server: str, incarnation: str, pieces: Sequence[Piece]) -> Iterator[tail.Block]:
    """The records of pieces, each once: two processes may have shipped the same."""
    before: Piece | None = None
    for piece in pieces:
        data = archive.read(server, incarnation, piece)
        known = max(0, before.end.offset - piece.offset) if before is not None and piece.inode == before.inode and piece.follows(before) else 0
        if known < piece.size:
            yield tail.Block(Position(piece.inode, piece.offset + known), data[known:])
            before = piece
