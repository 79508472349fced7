"""Processor time by groups of processes, from /proc: what a rate is bounded by."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

_TICKS = os.sysconf("SC_CLK_TCK")
Group = Callable[[], Iterable[int]]


def seconds(pids: Iterable[int]) -> float:
    """User and system time of processes and of their children that have ended."""
    total = 0
    for pid in pids:
        try:
            fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        total += sum(map(int, fields[11:15]))
    return total / _TICKS


def busy_seconds() -> float:
    """Processor time of everything on this machine, since it started."""
    fields = Path("/proc/stat").read_text(encoding="ascii").split("\n", 1)[0].split()[1:]
    idle = int(fields[3]) + int(fields[4])
    return (sum(map(int, fields[:8])) - idle) / _TICKS


class Meter:
    """Measures several groups between `start` and `stop`. A group is a function, since its processes may change."""

    def __init__(self, groups: Mapping[str, Group]) -> None:
        self._groups = groups

    def start(self) -> None:
        self._before = self._now()

    def stop(self) -> dict[str, float]:
        """Seconds by group."""
        return {name: now - self._before[name] for name, now in self._now().items()}

    def _now(self) -> dict[str, float]:
        return {name: seconds(group()) for name, group in self._groups.items()}
