"""What a server that is ordered is worth on which day: nothing while it is made, then what its warm-up allows (`new_server.toml`)."""

from __future__ import annotations

import datetime as dt
import functools
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from mail_pipelines.capacity.warm_up_rules import rules

_DATA = Path(__file__).with_name("new_server.toml")


@dataclass(frozen=True)
class NewServer:
    """`per_day` are the messages it may send to each provider on its first day of sending and the days after; later it is warm."""

    lead_days: int
    per_day: tuple[int, ...]

    def first_day(self, ordered: dt.date) -> dt.date:
        """The first whole day on which it sends."""
        return ordered + dt.timedelta(days=self.lead_days + 1)

    def cap(self, age_days: int, warm: float) -> float:
        """What it may send to a provider on the day that is so many days after its first (negative: it is not there), of `warm` when it is warm."""
        if age_days < 0:
            return 0.0
        return min(warm, self.per_day[age_days]) if age_days < len(self.per_day) else warm

    def days_to(self, level: float) -> int:
        """After how many days of sending it may send so much a day to a provider."""
        return next((day for day, cap in enumerate(self.per_day) if cap >= level), len(self.per_day))


@dataclass(frozen=True)
class NextSource:
    """Where the next server would come from: its curve, "" if its addresses are warm, and what it costs an hour."""

    curve: str
    cost_per_hour: float

    @property
    def helps_at_once(self) -> bool:
        """Whether its servers send enough in their first days to matter to the campaigns of the near plan."""
        return not self.curve or rules().curve(self.curve).fast


@functools.cache
def new_server() -> NewServer:
    data = tomllib.loads(_DATA.read_text(encoding="utf-8"))
    return NewServer(data["lead_days"], rules().curve(data["curve"]).caps)


def of_curve(curve: str | None) -> NewServer:
    """What a server is worth that is warmed up by this curve, or is warm (""). Where nobody knows (None), and where an operator takes each step, no more is
    promised than `new_server.toml` has.
    """
    if curve is None or (curve and not rules().curve(curve).by_itself):
        return new_server()
    return NewServer(new_server().lead_days, rules().curve(curve).caps if curve else ())


@dataclass(frozen=True)
class HostSources:
    """The sources of hosts as plans see them: where the `next` server would come from (None: from nowhere), and the curve of each source by its name."""

    next: NextSource | None = None
    curves: Mapping[str, str] = field(default_factory=dict)

    @property
    def new_server(self) -> NewServer:
        """What a server is worth that is ordered now."""
        return of_curve(None if self.next is None else self.next.curve)

    def of(self, name: str | None) -> NewServer:
        """What a server is worth whose host comes from this source; as long as it has none (None), or that is not listed any more, from the next one."""
        return self.new_server if name is None or name not in self.curves else of_curve(self.curves[name])


NO_SOURCES = HostSources()
