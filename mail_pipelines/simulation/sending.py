"""Sending under grants, a slot at a time: what was offered to whom, and what became of it.

As in production a claim gets no more than its grant and what the usage windows leave. What only the windows kept is counted: so much was granted too much.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mail_pipelines.capacity.placing import split
from mail_pipelines.simulation.events import Events
from mail_pipelines.simulation.scenario import Counts, Numbers, Scenario, world

# A claim holds what may be sent in so many seconds: that is in the hands of a server that is lost.
_CLAIM_SECONDS = 2
# So many are refused by a provider that blocks a server before the breaker has opened.
_REFUSED = 50
# Deferred rows are due ten minutes later, so from the second slot after theirs on.
_RETRY_SLOTS = 2


@dataclass(frozen=True)
class Slot:
    """What was done in a slot, V × P: `offered` became delivered, bounced, deferred (`refused` by a block), or nobody knows (of a lost server).

    `of_campaign` is what was offered of each (C). `held_back` messages were granted, and a usage window did not allow them, or nobody's send window was open.
    """

    offered: Counts
    deferred: Counts
    refused: Counts
    bounced: Counts
    of_campaign: Counts
    held_back: int


class Ledger:
    """Rows by campaign and provider (C × P): waiting, deferred by the slots until they are due, and those that are over. Sums equal the audience, always."""

    def __init__(self, scenario: Scenario, rng: np.random.Generator) -> None:
        self.waiting = np.zeros_like(scenario.rows)
        self.due = [np.zeros_like(scenario.rows) for _ in range(_RETRY_SLOTS)]
        self.delivered, self.bounced, self.unknown = (np.zeros_like(scenario.rows) for _ in range(3))
        self._scenario, self._rng = scenario, rng

    @property
    def deferred(self) -> Counts:
        waiting: Counts = np.sum(self.due, axis=0, dtype=np.int64)
        return waiting

    @property
    def open(self) -> Counts:
        """Rows of each campaign that are not over: C."""
        left: Counts = (self.waiting + self.deferred).sum(axis=1)
        return left

    def start(self, campaign: int) -> None:
        self.waiting[campaign] = self._scenario.rows[campaign]

    def send(self, granted: Counts, events: Events, trials: Counts, shut: NDArray[np.bool_], room: Numbers, opened: NDArray[np.bool_]) -> Slot:
        """Use the grants (C × V × P) of one slot. `shut` lines (V × P) send only their `trials`, messages of whoever has most; `room` is what usage windows
        leave, `opened` (C) whose send window is open.
        """
        rng = self._rng
        first = self.due.pop(0)
        self.waiting += first
        offered = granted.copy()
        offered[:, shut] = 0
        may = np.where(opened[:, None], self.waiting, 0)
        for server, provider in np.argwhere(np.where(may.any(axis=0), trials, 0)).tolist():
            offered[int(may[:, provider].argmax()), server, provider] = trials[server, provider]
        offered[:, ~events.up] = 0
        asked = offered.sum(axis=0)
        offered[~opened] = 0
        for server, provider in np.argwhere(offered.sum(axis=0) > room).tolist():
            offered[:, server, provider] = split(int(room[server, provider]), offered[:, server, provider])
        held_back = int((asked - offered.sum(axis=0)).sum())
        offered[:, events.lost] = (offered[:, events.lost] * rng.random()).astype(np.int64)
        offered = np.where(events.blocked, np.minimum(offered, _REFUSED), offered)
        for campaign, provider in np.argwhere(offered.sum(axis=1) > self.waiting).tolist():
            offered[campaign, :, provider] = split(int(self.waiting[campaign, provider]), offered[campaign, :, provider])
        deferred = np.where(events.blocked, offered, rng.binomial(offered, events.deferred))
        in_hand = np.ceil(self._scenario.per_second * _CLAIM_SECONDS).astype(np.int64) * events.lost[:, None]
        unknown = np.minimum(offered - deferred, in_hand)
        taken = offered - deferred - unknown
        bounced = rng.binomial(taken, world()["answers"]["bounced"])
        self.waiting -= offered.sum(axis=1)
        self.due.append(deferred.sum(axis=1))
        self.unknown += unknown.sum(axis=1)
        self.bounced += bounced.sum(axis=1)
        self.delivered += (taken - bounced).sum(axis=1)
        refused = np.where(events.blocked, deferred, 0)
        return Slot(offered.sum(axis=0), deferred.sum(axis=0), refused.sum(axis=0), bounced.sum(axis=0), offered.sum(axis=(1, 2)), held_back)
