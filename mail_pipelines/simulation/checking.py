"""Counting what was sent against the limits. It knows nothing of plans, grants and usage windows: it has its own sums, and its own copy of the limits."""

from __future__ import annotations

import datetime as dt
from collections.abc import Sequence
from zoneinfo import ZoneInfo

import numpy as np
from numpy.typing import NDArray

from mail_pipelines.campaigns.send_window import SendWindow
from mail_pipelines.capacity.horizon import DAY, HOUR
from mail_pipelines.delivery.recording import SLOT_SECONDS
from mail_pipelines.simulation.scenario import Counts, Numbers

_NAMED = 10


class Checker:
    """`violations` counts the cases, of which `named` describes the first. Limits are V × P, infinite where there is none."""

    def __init__(self, per_second: Numbers, per_hour: Numbers, per_day: Numbers) -> None:
        self.violations = 0
        self.named: list[str] = []
        self._limits = {SLOT_SECONDS: np.floor(per_second * SLOT_SECONDS + 1e-9), HOUR: per_hour, DAY: per_day}
        self._sums = {length: np.zeros(per_second.shape, dtype=np.int64) for length in self._limits}
        self._windows = dict.fromkeys(self._limits, -1)

    def see_clock(self, start: int, sent: Counts, windows: Sequence[SendWindow | None]) -> None:
        """Messages of each campaign in the slot from `start` on, and when it may be sent: by the clock of its zone, of one day. C."""
        for number, window in enumerate(windows):
            if window is not None and sent[number]:
                clock = dt.datetime.fromtimestamp(start, ZoneInfo(window.zone))
                minute = clock.hour * 60 + clock.minute
                if clock.weekday() not in window.days or minute < window.begin or minute + SLOT_SECONDS // 60 > window.until:
                    self.violations += 1
                    self.named += [f"{start}: campaign {number + 1}: sent at {clock:%a %H:%M}"][: _NAMED - len(self.named)]

    def see(self, start: int, sent: Counts, warm_up: Numbers, shut: NDArray[np.bool_]) -> None:
        """Messages offered to providers in the slot from `start` on, the day's caps of warm-ups, and lines that may send nothing: all V × P."""
        for length, limit in self._limits.items():
            if self._windows[length] != start // length:
                self._windows[length] = start // length
                self._sums[length][:] = 0
            self._sums[length] += sent
            most = np.minimum(limit, warm_up) if length == DAY else limit
            self._name((self._sums[length] > most) & (sent > 0), start, f"more than allowed in {length} s")
        self._name(shut & (sent > 0), start, "sent where nothing may be sent")

    def _name(self, broken: NDArray[np.bool_], start: int, what: str) -> None:
        found = np.argwhere(broken)
        self.violations += len(found)
        self.named += [f"{start}: server {server + 1}, provider {provider}: {what}" for server, provider in found[: _NAMED - len(self.named)].tolist()]
