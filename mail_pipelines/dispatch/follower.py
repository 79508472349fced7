"""The journal read on from where it was read last, for the claims of a running session: each line is parsed once.

It says the same as `Journal.evidence` from a claim's position, which settlement asks for: a settler has no past.
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field

from mail_pipelines.dispatch.journal import Entry, Evidence, Journal, Position, Torn, UnknownForm


@dataclass(eq=False)
class Watch:
    """What has been read of one claim's messages so far."""

    claim_id: int
    found: Evidence = field(init=False)
    marked: bool = False
    # Something may have been missed: a gap in the chain of files.
    gap: bool = False
    tokens: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        self.found = Evidence(claim_id=self.claim_id)


class Follower:
    """Follows a journal for the claims that are watched. May be used by several threads."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self._position: Position | None = None
        self._watches: dict[int, Watch] = {}
        self._of_token: dict[str, Watch] = {}
        self._of_message: dict[str, Watch] = {}
        # Who was there when the last record came, which is read again as the first of the next reading; and whom it hides something from.
        self._at_end: Collection[Watch] | None = None
        self._bad_end: Collection[Watch] = ()
        self._lock = threading.Lock()

    def watch(self, claim_id: int) -> Watch:
        """Begin to follow a claim: before its position is taken, and so before its marker is written."""
        with self._lock:
            if not self._watches:
                self._position, self._at_end, self._bad_end = self._journal.end(), None, ()
            else:
                # What is there already is not about this claim, though it may be about a message that it offers again.
                self._read_on()
            watch = self._watches[claim_id] = Watch(claim_id)
            return watch

    def expect(self, watch: Watch, tokens: Iterable[str]) -> None:
        """Name the claim's messages: before the first of them is offered."""
        with self._lock:
            watch.tokens = frozenset(tokens)
            self._of_token.update(dict.fromkeys(watch.tokens, watch))

    def forget(self, watch: Watch) -> None:
        with self._lock:
            del self._watches[watch.claim_id]
            for token in watch.tokens:
                # A row that this claim has released may be in the next one already.
                if self._of_token.get(token) is watch:
                    del self._of_token[token]
            self._of_message = {message: other for message, other in self._of_message.items() if other is not watch}

    def evidence(self, watch: Watch) -> Evidence:
        """What the journal says now of the claim's messages: `covered`, `intents` and `outcomes` of its evidence."""
        with self._lock:
            self._read_on()
            found = watch.found
            covered = watch.marked and not watch.gap and not found.bad_lines and watch not in self._bad_end
            return Evidence(covered, dict(found.intents), dict(found.outcomes))

    def _read_on(self) -> None:
        assert self._position is not None
        read = self._journal.read_on(self._position)
        if read is None:
            for watch in self._watches.values():
                watch.gap = True
            self._position, self._at_end, self._bad_end = self._journal.end(), None, ()
            return
        records, self._position = read
        self._bad_end = ()
        for number, record in enumerate(records, 1):
            if number > 1 or self._at_end is None:
                self._at_end = set(self._watches.values())
            try:
                entry = self._journal.parse(record)
            except UnknownForm:
                continue
            except Torn as torn:
                # The last record is read again, and says the same again.
                for token in torn.tokens:
                    if (concerned := self._of_token.get(token)) is not None and concerned in self._at_end:
                        concerned.found.torn.add(token)
                for entry in torn.entries:
                    self._take(entry, self._at_end)
                continue
            except ValueError:
                if number == len(records):
                    # It may go on. It counts for good once another record follows.
                    self._bad_end = self._at_end
                    continue
                for watch in self._at_end:
                    watch.found.bad_lines += 1
                continue
            if entry is not None and not entry.alarm:
                self._take(entry, self._at_end)

    def _take(self, entry: Entry, present: Collection[Watch]) -> None:
        """Tell the watch that an entry concerns, if it is among those that were there when it came."""
        if entry.mark is not None:
            claim_id = entry.mark.partition(".")[0].removeprefix("c")
            if claim_id.isdigit() and (marked := self._watches.get(int(claim_id))) is not None and marked in present:
                marked.marked = True
        elif (concerned := self._concerned(entry)) is not None and concerned in present:
            concerned.found.take(entry)
            if entry.message:
                self._of_message[entry.message] = concerned

    def _concerned(self, entry: Entry) -> Watch | None:
        return self._of_token.get(entry.token) if entry.token else self._of_message.get(entry.message)
