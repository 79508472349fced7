"""The warm-ups of a simulated fleet: each line's course, judged at the end of a day by the rules of production."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import numpy as np

from mail_pipelines.capacity.fleet import Pair
from mail_pipelines.capacity.horizon import DAY, DAYS
from mail_pipelines.capacity.warm_up import Course, Standing
from mail_pipelines.capacity.warm_up_rules import Counts as DayCounts
from mail_pipelines.capacity.warm_up_rules import Verdict, rules
from mail_pipelines.simulation.scenario import BEGIN, Numbers, Scenario, world
from mail_pipelines.simulation.sending import Slot


class Warming:
    """`verdicts` counts what came of all days of all lines with mail."""

    def __init__(self, scenario: Scenario, rng: np.random.Generator) -> None:
        self.verdicts: Counter[str] = Counter()
        self._scenario, self._rng = scenario, rng
        self._curve = rules().curve(world()["fleet"]["curve"])
        self._courses: dict[tuple[int, int], Course] = {}
        self._offered, self._deferred, self._bounced = (np.zeros(scenario.per_day.shape, dtype=np.int64) for _ in range(3))
        self._caps: dict[Pair, tuple[int | None, ...]] | None = None
        for server, provider in np.argwhere(scenario.steps >= 0).tolist():
            self._add(server, provider, int(scenario.steps[server, provider]), BEGIN)

    def add(self, server: int, now: int) -> None:
        """A new server begins."""
        for provider in range(len(self._scenario.providers)):
            self._add(server, provider, 0, now)

    def _add(self, server: int, provider: int, step: int, now: int) -> None:
        judged = now // DAY * DAY - DAY
        standing = Standing(server + 1, self._scenario.providers[provider], self._curve.name, step, self._curve.cap(step), judged, None, "begun")
        self._courses[server, provider] = Course(standing, [])
        self._caps = None

    def see(self, slot: Slot) -> None:
        self._offered += slot.offered
        self._deferred += slot.deferred
        self._bounced += slot.bounced

    def end_day(self, day: int) -> None:
        """Judge the day that began at `day` (epoch seconds)."""
        for (server, provider), course in self._courses.items():
            sent, deferred, bounced = (int(counts[server, provider]) for counts in (self._offered, self._deferred, self._bounced))
            delivered = max(0, sent - deferred - bounced)
            complaints = int(self._rng.poisson(delivered * world()["answers"]["complained"]))
            volume = max((counts.sent for _, counts, _ in course.recent), default=0)
            judgement = course.judge(day, DayCounts(sent, delivered, bounced, deferred, complaints), volume, rules())
            if judgement.verdict is not Verdict.IDLE and course.at.per_day is not None:
                self.verdicts[judgement.verdict.value] += 1
            course.written.clear()
        for counts in (self._offered, self._deferred, self._bounced):
            counts[:] = 0
        self._caps = None

    def day_caps(self) -> Mapping[Pair, tuple[int | None, ...]]:
        """What `warm_up.day_caps` would read of lines that have a cap, for the days of a far plan."""
        if self._caps is None:
            standings = [course.at for course in self._courses.values() if course.at.per_day is not None]
            self._caps = {(at.server_id, at.provider): (at.per_day, *(self._curve.cap(at.step + ahead) for ahead in range(1, DAYS))) for at in standings}
        return self._caps

    def caps(self) -> Numbers:
        """The caps of today by the step of each line: V × P, infinite where there is none."""
        found = np.full(self._scenario.per_day.shape, np.inf)
        for place, course in self._courses.items():
            if (cap := self._curve.cap(course.at.step)) is not None:
                found[place] = cap
        return found
