"""What goes wrong: providers that block a server or slow all of them down, addresses that get a bad name, and servers that are lost, for hours or for good."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from mail_pipelines.capacity.horizon import DAY, HOUR
from mail_pipelines.delivery.recording import SLOT_SECONDS
from mail_pipelines.simulation.scenario import Counts, Numbers, world

_NEVER = 1 << 62


class Events:
    """The state of V servers and P providers. `up` (V): exists and runs; `gone` (V): lost for good; `lost` (V): lost in the slot that was drawn last.

    `deferred` (P) is the part of the messages that a provider defers, `blocked` (V × P) says whom it blocks.
    """

    def __init__(self, servers: int, shape: tuple[int, ...], rng: np.random.Generator) -> None:
        most, providers = shape
        self.up: NDArray[np.bool_] = np.arange(most) < servers
        self.gone = np.zeros(most, dtype=bool)
        self.lost = np.zeros(most, dtype=bool)
        self.deferred: Numbers = np.zeros(providers)
        self.blocked = np.zeros((most, providers), dtype=bool)
        self.counts = {"blocks": 0, "losses": 0, "losses for good": 0, "waves": 0, "bad names": 0}
        self._rng = rng
        self._back_at: Counts = np.full(most, _NEVER)
        self._blocked_until: Counts = np.zeros((most, providers), dtype=np.int64)
        self._slow_until: Counts = np.zeros(providers, dtype=np.int64)

    def draw(self, now: int) -> bool:
        """What happens in the slot that begins now; whether a server has come back, or was lost in the slot before, which nobody knew then.

        A server that is lost now sends for a part of the slot.
        """
        rng, data = self._rng, world()
        back = self._back_at <= now
        changed = bool(self.lost.any() or back.any())
        self.up &= ~self.lost
        self.up |= back
        self._back_at[back] = _NEVER
        # As many numbers are drawn whatever happened before, so that a change of plan does not change the weather.
        self.lost = (rng.random(self.up.shape) < _chance(data["losses"])) & self.up
        self.gone |= self.lost & (rng.random(self.up.shape) < data["losses"]["for_good"])
        until = now + SLOT_SECONDS + _hours(data["losses"], rng, self.up.shape)
        self._back_at = np.where(self.lost, np.where(self.gone, _NEVER, until), self._back_at)
        block = (rng.random(self.blocked.shape) < _chance(data["blocks"]) / self.blocked.shape[1]) & self.up[:, None]
        self._blocked_until = np.where(block, now + _hours(data["blocks"], rng, block.shape), self._blocked_until)
        bad = (rng.random(self.up.shape) < _chance(data["bad_names"])) & self.up
        by = bad[:, None] & (rng.random(self.blocked.shape) < data["bad_names"]["providers"])
        # By all of them for as long.
        until = now + _hours(data["bad_names"], rng, self.up.shape)[:, None]
        self._blocked_until = np.where(by, np.maximum(self._blocked_until, until), self._blocked_until)
        self.blocked = self._blocked_until > now
        least, most = data["waves"]["deferred"]
        wave = rng.random(self.deferred.shape) < _chance(data["waves"])
        self._slow_until = np.where(wave, now + _hours(data["waves"], rng, wave.shape), self._slow_until)
        self.deferred = np.where(wave, rng.uniform(least, most, wave.shape), np.where(self._slow_until > now, self.deferred, 0.0))
        for name, number in (("blocks", block), ("losses", self.lost), ("losses for good", self.lost & self.gone), ("waves", wave), ("bad names", bad)):
            self.counts[name] += int(number.sum())
        return changed

    def add(self, server: int) -> None:
        """A new server."""
        self.up[server] = True

    def remove(self, server: int) -> None:
        """One is given back."""
        self.up[server] = False
        self._back_at[server] = _NEVER


def _chance(event: dict[str, float]) -> float:
    return event["each_day"] * SLOT_SECONDS / DAY


def _hours(event: dict[str, list[float]], rng: np.random.Generator, shape: tuple[int, ...]) -> Counts:
    """Seconds."""
    low, high = event["hours"]
    return (rng.uniform(low, high, shape) * HOUR).astype(np.int64)
