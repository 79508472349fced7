"""What providers tell days later gates a warm-up: held while it is bad, one or two steps back for what is worse, never twice for the same mail."""

from __future__ import annotations

import datetime as dt
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from mail_pipelines.capacity import warm_up
from mail_pipelines.capacity.warm_up import DAY, day_of
from mail_pipelines.capacity.warm_up_rules import Counts, Judgement, Told, Verdict, judge, rules
from mail_pipelines.database.engine import reading, transact
from mail_pipelines.reputation import readings
from mail_pipelines.reputation.readings import GOOGLE, MICROSOFT, Reading
from tests.capacity.test_warm_up import BEGIN, Fleet, _small_curves  # noqa: F401
from tests.dispatch.world import make_world
from tests.parts.database_clock import DatabaseClock

ADDRESS = "192.0.2.7"
# The part of the mail of each day that Gmail's users reported as spam; Google tells of a day when the one after it is over, and from the 14th on of none.
GOOGLE_RATES = {5: 0.0025, 6: 0.0012, 8: 0.004, 9: 0.0035, 13: 0.0015}
GOOGLE_TELLS = 14
MICROSOFT_DAYS: dict[int, dict[str, Any]] = {
    3: {"filter_result": "RED"},
    5: {"trap_hits": 12},
    6: {"trap_hits": 1},
    7: {"spam_rate": 0.004},
    8: {"filter_result": "YELLOW"},
}
# The step that each day was begun with. Google: back for the 5th, held for the 6th, two back for the 8th, held for the 9th, which was before that step, and for
# the 13th as long as it is the newest of a week.
GOOGLE_STEPS = [0, 1, 2, 3, 4, 5, 6, 5, 5, 6, 4, 4, 5, 6, 7, *[7] * 5, 7, 8]
# Microsoft: back for RED, two back for the traps, held for one trap, back for the complaints, held for YELLOW.
MICROSOFT_STEPS = [0, 1, 2, 3, 4, 3, 4, 2, 2, 1, 1, 2, 3, 4, 5, 6, 7, *[8] * 5]


@pytest.fixture
def fleet(engine: sa.Engine, tmp_path: Path) -> Fleet:
    world = make_world(engine, tmp_path / "home", recipients=1600, domains=("google.test", "microsoft.test"))
    world.set_campaign(expire_at=None, started_at=BEGIN)
    clock = DatabaseClock(engine, BEGIN)
    server = world.server("new")
    world.set_server("new", health={"addresses": [ADDRESS, "10.0.0.7"]})
    transact(engine, lambda connection: warm_up.set_by_hand(connection, "new", BEGIN, curve="careful"))
    return Fleet(world, clock, server)


def test_three_weeks_of_what_google_and_microsoft_tell(fleet: Fleet) -> None:
    begun: dict[str, list[int]] = {"google": [], "microsoft": []}
    for day in range(22):
        fleet.begin_day(day)
        told_of = day - 2
        moment = day_of(BEGIN) + told_of * DAY
        found = [Reading(MICROSOFT, ADDRESS, moment, **{"spam_rate": 0.0, "filter_result": "GREEN", "trap_hits": 0} | MICROSOFT_DAYS.get(told_of, {}))]
        # Neither somebody else's domain nor another address is the server's.
        found += [Reading(GOOGLE, "other.test", moment, 0.5), Reading(MICROSOFT, "192.0.2.8", moment, 0.5, None, 1000, "RED", 99)]
        if told_of < GOOGLE_TELLS:
            found.append(Reading(GOOGLE, "shop.test", moment, GOOGLE_RATES.get(told_of, 0.0004)))
        transact(fleet.world.engine, lambda connection, found=found: readings.keep(connection, found, fleet.now))  # type: ignore[misc]
        fleet.tick()
        for provider, steps in begun.items():
            steps.append(fleet.step(provider))
            fleet.send(provider, most=45)
    assert begun == {"google": GOOGLE_STEPS, "microsoft": MICROSOFT_STEPS}
    with reading(fleet.world.engine) as connection:
        reasons = {(one.provider, (one.day - BEGIN.date()).days): one.why for one in warm_up.history(connection, fleet.server.id, 100)}
    assert reasons["google", 6] == "0.25% reported as spam of shop.test on 2026-03-07 (google_postmaster), the limit is 0.20%"
    assert reasons["google", 10] == "0.35% reported as spam of shop.test on 2026-03-11 (google_postmaster), the limit is 0.10%"
    assert reasons["microsoft", 4] == f"RED as filter result of {ADDRESS} on 2026-03-05 (microsoft_snds), the limit is RED"
    assert reasons["microsoft", 6] == f"12 trap hits of {ADDRESS} on 2026-03-07 (microsoft_snds), the limit is 10"


@pytest.mark.parametrize(
    ("value", "fresh", "expected"),
    [
        (0.0009, True, (6, Verdict.UP)),
        (0.001, True, (5, Verdict.HOLD)),
        (0.002, True, (4, Verdict.BACK)),
        (0.003, True, (3, Verdict.BACK)),
        (0.5, False, (5, Verdict.HOLD)),
    ],
)
def test_a_full_day_with_good_answers_is_judged_by_what_was_told(value: float, fresh: bool, expected: tuple[int, Verdict]) -> None:
    curve, known = rules().curves["careful"], rules()
    (signal,) = (signal for signal in known.told if signal.by == GOOGLE)
    cap = curve.caps[5]
    told = [Told(signal, Reading(GOOGLE, "shop.test", 10 * DAY, value))]
    counts = Counts(cap, cap)
    found: Judgement = judge(curve, 5, counts, counts, idle_days=0, volume=0, known=known, told=told, told_since=(10 if fresh else 11) * DAY)
    assert (found.step, found.verdict) == expected


def test_each_signal_is_a_measure_with_limits_in_order() -> None:
    example = Reading(MICROSOFT, ADDRESS, 0, 0.0, 0.0, 0, "GREEN", 0)
    for signal in rules().told:
        assert example.measure(signal.of) == 0.0
        assert 0 < signal.hold < signal.back < (signal.far_back or 1e9)
    assert {(signal.by, signal.provider) for signal in rules().told} == set(readings.PROVIDERS.items())
    assert dt.timedelta(days=rules().told_days) <= dt.timedelta(days=14)
