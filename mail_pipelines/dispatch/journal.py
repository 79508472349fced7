"""The journal: a mail server's own log, read as written proof of what it did with each message.

What belongs here: finding lines from a known place on, across rotation, and saying whether the log covers a claim
without a gap. What does not: how a particular mail server words its lines (`catcher.log`, and one module for Exim).

Lines (one `Entry` each):
  MARK    a sender greeted with a permit; the first one of a claim proves where the claim begins
  INTENT  the body is here and is about to go to the destination (written before the permit is looked at)
  DONE    how that ended: the destination's own reply, or `unknown` when it gave none, or `void` when nothing was offered
"""

from __future__ import annotations

import contextlib
import enum
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, NamedTuple

from mail_pipelines.dispatch.files import DispatchError

_BLOCK = 1 << 20
# A rotation renames one file after another and makes a new one last: what is missing for so long is gone.
_ROTATION_SECONDS = 1.0
_POLL_SECONDS = 0.01
# With less than so much (MB) free on the journal's disk nothing is claimed, and no burst goes on: what is under way by then still finds room for
# its lines. Exim's own limit (`check_log_space`) is half of it.
MIN_FREE_MB = 100


class Kind(enum.StrEnum):
    """What became of one offer."""

    DELIVERED = "delivered"
    BOUNCED = "bounced"
    DEFERRED = "deferred"
    UNKNOWN = "unknown"
    # The destination could not be asked: no connection, or no answer. To be tried later, at no cost of an attempt.
    UNREACHABLE = "unreachable"
    # Nothing reached a destination: no permit, refused before the recipient was named.
    VOID = "void"


class Outcome(NamedTuple):
    """How an offer ended. `code` and `enhanced` (RFC 3463) are the destination's, `text` its words."""

    kind: Kind
    code: int | None = None
    enhanced: str | None = None
    text: str = ""


class Entry(NamedTuple):
    """One line: exactly one of `mark` (a permit's name), `intent_pid`, `outcome` and `alarm` is set; `token` names the message.

    `message`: the mail server's own name of the message. A line may have only that; one with both and nothing else says that they are one.

    `unless_known`: the outcome counts only while the message has an INTENT and no other outcome, and no line is damaged or torn that may be one.
    `early`: it was said before the body, so it says nothing of a message whose body has gone out.
    `permit`: the permit under which the message was offered, where the line names it.
    `server`: whose the permit of a `mark` is, where several servers share the log.
    `alarm`: the mail server does what it should never have to do, and somebody should look why.
    """

    token: str = ""
    mark: str | None = None
    intent_pid: int | None = None
    outcome: Outcome | None = None
    unless_known: bool = False
    early: bool = False
    alarm: bool = False
    message: str = ""
    permit: str = ""
    server: str = ""


class UnknownForm(ValueError):
    """A whole line of a form that nobody has foreseen. It is counted and left out; unlike a damaged line it hides nothing."""


class Torn(ValueError):
    """A record that holds the beginnings of lines that nobody could end, since the disk was full, and perhaps a whole line behind them.

    Who could not end a line has ended there and then, so the beginning of an INTENT is none. Unlike another damaged record this one hides no
    INTENT: those that are whole are among its `entries`, and so is a MARK. What it may hide is an outcome of `tokens`.
    """

    def __init__(self, message: str, tokens: Iterable[str] = (), entries: Iterable[Entry] = ()) -> None:
        super().__init__(message)
        self.tokens = frozenset(tokens)
        self.entries = tuple(entries)


@dataclass(frozen=True)
class Position:
    """A place in the log: the file's inode, and the offset of the first byte not yet read."""

    inode: int
    offset: int


@dataclass
class Evidence:
    """What the journal says from a claim's position to its end.

    With a `claim_id` what is known to be about an offer of another claim is left out. A row that was released is offered again under the same token,
    and what is still said of the first offer, late (it found no permit, its destination refused the recipient), must not end the second.
    """

    # The claim's marker line was found, and no line between it and the end can hide an INTENT.
    covered: bool = False
    # Offers without an end so far: token → id of the mail server's process.
    intents: dict[str, int] = field(default_factory=dict)
    outcomes: dict[str, Outcome] = field(default_factory=dict)
    # What the mail server calls its messages → token, where it does not name the token on every line.
    messages: dict[str, str] = field(default_factory=dict)
    # Messages of which a torn record may hide an outcome.
    torn: set[str] = field(default_factory=set)
    # Damaged lines that may hide anything.
    bad_lines: int = 0
    unknown_forms: int = 0
    alarms: int = 0
    claim_id: int | None = None
    # Of a claim: what the journal itself calls an offer of it. A delivery alone names no claim, so outcomes are those of others, too.
    offered: set[str] = field(default_factory=set)

    def take(self, entry: Entry) -> Outcome | None:
        """Note an entry about a message, in the order of the journal; returns the outcome that was noted.

        After an INTENT only words about the body end the doubt: without any, or with those of another host that was asked next (in the queue,
        Exim goes on to it), a destination may have the message. There a doubt keeps its INTENT, so that it is known to what comes later.
        """
        if self.claim_id is not None:
            if self._is_foreign(entry):
                return None
            if entry.token and (entry.permit or entry.intent_pid is not None):
                self.offered.add(entry.token)
        token = entry.token or self.messages.get(entry.message, "")
        if entry.intent_pid is not None:
            self.intents[token] = entry.intent_pid
            self.outcomes.pop(token, None)
        outcome = entry.outcome
        if outcome is None:
            if entry.message and entry.token:
                self.messages[entry.message] = entry.token
            return None
        known = self.outcomes.get(token)
        if not token or (entry.unless_known and (token not in self.intents or known is not None or self.bad_lines or token in self.torn)):
            return None
        if entry.early or outcome.kind is Kind.UNREACHABLE:
            if known is not None and known.kind not in (Kind.UNREACHABLE, Kind.VOID):
                return None
            if token in self.intents:
                outcome = Outcome(Kind.UNKNOWN, text=outcome.text)
        if not entry.token and known == outcome:
            # Said once more.
            return None
        if outcome.kind is not Kind.UNKNOWN or not entry.message:
            self.intents.pop(token, None)
        self.outcomes[token] = outcome
        if outcome.kind in (Kind.DELIVERED, Kind.BOUNCED):
            self.messages.pop(entry.message, None)
        return outcome

    def _is_foreign(self, entry: Entry) -> bool:
        """Whether an entry is about an offer of another claim. What is in the mail server's queue by this one has been named to it before."""
        if entry.permit:
            return not entry.permit.startswith(f"c{self.claim_id}.")
        return bool(entry.message) and entry.message not in self.messages


LineParser = Callable[[bytes], Entry | None]
# The ordinary records of a block: where each begins and ends (with its line break), and its entry as `LineParser` gives it.
BlockScanner = Callable[[bytes], Iterator[tuple[int, int, Entry | None]]]


class Read(NamedTuple):
    """One record of a block: where it begins and ends, and its entry, or else what is wrong with it."""

    start: int
    end: int
    entry: Entry | None
    error: ValueError | None = None


class Journal:
    """The log at `path` and its rotated predecessors in the same folder (`main.log.1`, …), told apart by inode.

    `parse` raises `ValueError` for a line that cannot be read (`Torn` if that hides no INTENT). `continues` says whether a line belongs to the
    one before. `scan` finds the ordinary records of a block quickly; it says of each what `parse` would say.
    """

    def __init__(self, path: Path, parse: LineParser, continues: Callable[[bytes], bool] | None = None, scan: BlockScanner | None = None) -> None:
        self.path = path
        self.parse = parse
        self._continues = continues
        self._scan = scan

    def end(self) -> Position:
        """The current end. Raises `DispatchError` without a log: a server that writes none cannot be trusted with a claim."""
        until = time.monotonic() + _ROTATION_SECONDS
        while True:
            try:
                status = self.path.stat()
            except FileNotFoundError as error:
                if time.monotonic() > until or not self._listed():
                    raise DispatchError(f"there is no journal at {self.path}: does the mail server run, and write there?") from error
                time.sleep(_POLL_SECONDS)
            else:
                return Position(status.st_ino, status.st_size)

    def free_mb(self) -> int:
        """How much is free on the disk of the journal for who is not root."""
        return shutil.disk_usage(self.path.parent).free >> 20

    def evidence(self, start: Position, claim_id: int) -> Evidence:
        """Everything from `start` on. `covered` is false if a file of the chain is gone, truncated, or the marker is missing."""
        found = Evidence(claim_id=claim_id)
        with self._chain(start) as chain:
            self._take(found, chain, start, claim_id)
        return found

    def _take(self, found: Evidence, chain: list[BinaryIO], start: Position, claim_id: int) -> None:
        marked = False
        for line in self._records(chain, start.offset):
            try:
                entry = self.parse(line)
            except UnknownForm:
                found.unknown_forms += 1
                continue
            except Torn as torn:
                found.torn |= torn.tokens
                entries: Iterable[Entry] = torn.entries
            except ValueError:
                found.bad_lines += 1
                continue
            else:
                entries = () if entry is None else (entry,)
            for entry in entries:
                if entry.alarm:
                    found.alarms += 1
                elif entry.mark is not None:
                    marked = marked or entry.mark.startswith(f"c{claim_id}.")
                else:
                    found.take(entry)
        # An unreadable line may have been an INTENT: it proves that something is missing.
        found.covered = bool(chain) and marked and not found.bad_lines

    def read_on(self, start: Position) -> tuple[list[bytes], Position] | None:
        """The records from `start` on, and where the last of them begins: it may still be continued. None if a file of the chain is gone or truncated."""
        records: list[bytes] = []
        last, offset = start, start.offset
        with self._chain(start) as chain:
            for file in chain:
                inode = os.fstat(file.fileno()).st_ino
                file.seek(offset)
                for line in file.read().split(b"\n")[:-1]:
                    if records and self._continues is not None and self._continues(line):
                        records[-1] += b"\n" + line
                    else:
                        records.append(line)
                        last = Position(inode, offset)
                    offset += len(line) + 1
                offset = 0
            return (records, last) if chain else None

    def files(self) -> list[tuple[int, Path]]:
        """All files of the log that are left, each with its inode, oldest first."""
        return [(inode, path) for _, inode, path in self._numbered()]

    def read(self, block: bytes) -> Iterator[Read]:
        """The records of a block of whole records that say something about a message or cannot be read; those of an `UnknownForm` among these."""
        done = 0
        for start, end, entry in self._scan(block) if self._scan is not None else ():
            if start > done:
                yield from self._one_by_one(block, done, start)
            if entry is not None:
                yield Read(start, end, entry)
            done = end
        if done < len(block):
            yield from self._one_by_one(block, done, len(block))

    def _one_by_one(self, block: bytes, start: int, end: int) -> Iterator[Read]:
        while start < end:
            stop = self._end_of_record(block, start)
            try:
                entry = self.parse(block[start:stop].rstrip(b"\n"))
            except ValueError as error:
                yield Read(start, stop, None, error)
            else:
                if entry is not None:
                    yield Read(start, stop, entry)
            start = stop

    def _end_of_record(self, block: bytes, start: int) -> int:
        """The place behind the record that begins at `start`, of a block that ends with a line break."""
        stop = block.index(b"\n", start) + 1
        while self._continues is not None and stop < len(block) and self._continues(block[stop : stop + 4]):
            stop = block.index(b"\n", stop) + 1
        return stop

    def record_around(self, block: bytes, place: int) -> tuple[int, int]:
        """Begin and end of the record of the block that the byte at `place` belongs to."""
        start = block.rfind(b"\n", 0, place) + 1
        while self._continues is not None and start and self._continues(block[start : start + 4]):
            start = block.rfind(b"\n", 0, start - 1) + 1
        return start, self._end_of_record(block, start)

    def whole_records(self, data: bytes) -> int:
        """How many bytes at the front are records that nothing can be added to: all but the last one and what is torn behind it."""
        last = data.rfind(b"\n", 0, data.rfind(b"\n")) + 1 if self._continues is not None else data.rfind(b"\n") + 1
        while self._continues is not None and last and self._continues(data[last : last + 4]):
            last = data.rfind(b"\n", 0, last - 1) + 1
        return last

    def _numbered(self) -> list[tuple[int, int, Path]]:
        """Number (0 is the current file), inode and path of each file, oldest first. Looked at until nobody renames any."""
        until = time.monotonic() + _ROTATION_SECONDS
        files = self._listed()
        while (again := self._listed()) != files and time.monotonic() < until:
            files = again
        return again

    def _listed(self) -> list[tuple[int, int, Path]]:
        files: list[tuple[int, int, Path]] = []
        for path in self.path.parent.glob(f"{self.path.name}*"):
            try:
                status = path.stat()
            except FileNotFoundError:
                continue
            if path == self.path:
                number = 0
            else:
                suffix = path.name.removeprefix(f"{self.path.name}.")
                if not suffix.isdigit():
                    continue
                number = int(suffix)
            files.append((number, status.st_ino, path))
        return sorted(files, reverse=True)

    @contextlib.contextmanager
    def _chain(self, start: Position) -> Iterator[list[BinaryIO]]:
        """The files from the one with `start` to the current one, oldest first; empty if there is a gap. They are open: a rotation changes nothing any more."""
        with contextlib.ExitStack() as opened:
            yield self._open_chain(start, opened)

    def _open_chain(self, start: Position, opened: contextlib.ExitStack) -> list[BinaryIO]:
        with contextlib.suppress(FileNotFoundError):
            current: BinaryIO = opened.enter_context(self.path.open("rb"))
            if (status := os.fstat(current.fileno())).st_ino == start.inode:
                return [current] if status.st_size >= start.offset else []
        until = time.monotonic() + _ROTATION_SECONDS
        while True:
            files = self._numbered()
            begin = next((index for index, (_, inode, _) in enumerate(files) if inode == start.inode), None)
            if begin is None:
                return []
            chain = self._opened(files[begin:], opened)
            if chain:
                return chain if os.fstat(chain[0].fileno()).st_size >= start.offset else []
            if time.monotonic() > until:
                return []
            time.sleep(_POLL_SECONDS)

    def _opened(self, files: list[tuple[int, int, Path]], opened: contextlib.ExitStack) -> list[BinaryIO]:
        """Files of which none is missing between the first and the current one; empty if one is, or was renamed meanwhile."""
        if [number for number, _, _ in files] != list(range(len(files) - 1, -1, -1)):
            return []
        chain: list[BinaryIO] = []
        for _, inode, path in files:
            try:
                chain.append(opened.enter_context(path.open("rb")))
            except FileNotFoundError:
                return []
            if os.fstat(chain[-1].fileno()).st_ino != inode:
                return []
        return chain

    def _records(self, chain: list[BinaryIO], offset: int) -> Iterator[bytes]:
        """Lines, each with those that continue it."""
        if self._continues is None:
            yield from self._lines(chain, offset)
            return
        record: bytes | None = None
        for line in self._lines(chain, offset):
            if record is not None and self._continues(line):
                record += b"\n" + line
                continue
            if record is not None:
                yield record
            record = line
        if record is not None:
            yield record

    def _lines(self, chain: list[BinaryIO], offset: int) -> Iterator[bytes]:
        """Complete lines only: the last line of a log that is being written may be torn."""
        for file in chain:
            file.seek(offset)
            rest = b""
            while block := file.read(_BLOCK):
                *lines, rest = (rest + block).split(b"\n")
                yield from lines
            offset = 0


def process_alive(pid: int) -> bool:
    """Whether a process exists and is no zombie: a process that ended but was not reaped delivers nothing."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:  # noqa: PTH123 (called in loops)
            return file.read().rpartition(b")")[2].split()[0] not in (b"Z", b"X")
    except (FileNotFoundError, ProcessLookupError):
        return False


class JournalWriter:
    """Appends lines so that each is on file, whole, before `write` returns; a torn line of a killed predecessor is ended first."""

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
        size = os.fstat(self._file).st_size
        self._torn = bool(size) and os.pread(self._file, 1, size - 1) != b"\n"

    def write(self, line: bytes) -> None:
        """Append one line. `OSError` if the disk is full: the caller then must not go on with the message."""
        data = (b"\n" if self._torn else b"") + line + b"\n"
        written = os.write(self._file, data)
        self._torn = written != len(data)
        if self._torn:
            raise OSError("the journal could not be written whole")

    def close(self) -> None:
        os.close(self._file)
