"""Whose turn it is among the rows of a lane's claims, so that a domain that does not answer holds one connection and not all of them.

A domain from which nothing has come yet in this session is *met* by one message; its other rows are held until that has been answered. If it is
silent, they are not offered, and from then on claims leave them out. Rows that ask for a dead domain, which is likely to stay silent, have a few
connections between them (the slow lane).

What belongs here: order and counting. What does not: connections (`lane`), and what is known of domains for good (`delivery.domain_health`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from mail_pipelines.dispatch.claiming.terms import Row

# Of a lane's connections, so many parts of a hundred may wait for domains held for dead; one always may.
SLOW_PERCENT = 5
# A session remembers so many domains that have answered.
_KNOWN = 50_000


class Meetings:
    """The domains of a lane that have answered, and those that are being met. `connections` is how many the lane has."""

    def __init__(self, connections: int) -> None:
        self._slow = max(1, connections * SLOW_PERCENT // 100)
        self._asking = 0
        self._known: dict[str, None] = {}
        self._met: set[str] = set()

    @property
    def may_ask(self) -> bool:
        """Whether a dead domain may be asked now."""
        return self._asking < self._slow

    def may_offer(self, domain: str) -> bool:
        return domain in self._known or domain not in self._met

    def begin(self, row: Row) -> None:
        """The row is being offered."""
        if row.asks:
            self._asking += 1
        if row.domain not in self._known:
            self._met.add(row.domain)

    def end(self, row: Row, answered: bool | None) -> bool:
        """The offer is over (`answered` is None if it was not made); returns whether rows that were held for it may have their turn.

        After silence they may not: the meeting lasts until that is `recorded`, for a claim made before then would have the domain's rows again.
        """
        if row.asks:
            self._asking -= 1
        domain = row.domain
        if answered is False:
            self._known.pop(domain, None)
            self._met.add(domain)
            return False
        waited = domain in self._met
        self._met.discard(domain)
        if answered and waited:
            self._known[domain] = None
            if len(self._known) > _KNOWN:
                del self._known[next(iter(self._known))]
        return waited

    def recorded(self, domain: str) -> bool:
        """The ledger has what became of a slow offer to the domain; returns whether rows were held for that."""
        waited = domain in self._met
        self._met.discard(domain)
        return waited


class Turns:
    """The rows of one claim that have not had their turn."""

    def __init__(self, rows: Iterable[Row], meetings: Meetings) -> None:
        self._meetings = meetings
        self._rows: deque[Row] = deque()
        self._asking: deque[Row] = deque()
        self._held: dict[str, list[Row]] = {}
        # How many rows wait for their domain to be met.
        self.held = 0
        for row in rows:
            (self._asking if row.asks else self._rows).append(row)

    @property
    def quick(self) -> int:
        """Rows that wait for nothing but a connection."""
        return len(self._rows)

    @property
    def waiting(self) -> int:
        return len(self._rows) + len(self._asking) + self.held

    @property
    def is_empty(self) -> bool:
        return not self.waiting

    @property
    def has_next(self) -> bool:
        """Whether `next` may have a row now. It may still find that all of them are to be held."""
        return bool(self._rows) or (bool(self._asking) and self._meetings.may_ask)

    def next(self) -> Row | None:
        """The row whose turn it is; its offer has to end by `Meetings.end`."""
        row = self._asking.popleft() if self._asking and self._meetings.may_ask else self._next_quick()
        if row is not None:
            self._meetings.begin(row)
        return row

    def _next_quick(self) -> Row | None:
        while self._rows:
            row = self._rows.popleft()
            domain = row.domain
            if self._meetings.may_offer(domain):
                return row
            self._held.setdefault(domain, []).append(row)
            self.held += 1
        return None

    def settle(self, domain: str, answered: bool | None) -> None:
        """A meeting is over: give the held rows of the domain their turns, or leave them out if it was silent."""
        held = self._held.pop(domain, [])
        self.held -= len(held)
        if answered is not False:
            self._rows.extendleft(reversed(held))

    def clear(self) -> None:
        """No more turns."""
        self._rows.clear()
        self._asking.clear()
        self._held.clear()
        self.held = 0
