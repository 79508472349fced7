"""A simulated fleet: campaigns end, no limit is exceeded, and one that is would be seen."""

from __future__ import annotations

import datetime as dt
import json
from dataclasses import asdict, replace
from zoneinfo import ZoneInfo

import numpy as np
import pytest
from typer.testing import CliRunner

from mail_pipelines.campaigns.send_window import SendWindow
from mail_pipelines.cli import app
from mail_pipelines.simulation.buying import Mode
from mail_pipelines.simulation.checking import Checker
from mail_pipelines.simulation.events import Events
from mail_pipelines.simulation.run import Outcome, simulate
from mail_pipelines.simulation.scenario import BEGIN, Scenario, Size, world
from mail_pipelines.simulation.sending import Ledger

SIZE = Size(recipients=300_000, servers=8, campaigns=3, days=6)
# Long enough for the far plan to order servers that send while they are needed.
SHORT = Size(recipients=1_600_000, servers=8, campaigns=4, days=10)
TIMES = {"median seconds of a plan", "most seconds of a plan", "processor seconds", "seconds", "memory (MB)"}


def without_times(outcome: Outcome) -> Outcome:
    return replace(outcome, figures={name: value for name, value in outcome.figures.items() if name not in TIMES})


def test_campaigns_end_within_all_limits_and_the_same_seed_says_the_same() -> None:
    outcome = simulate(SIZE)
    assert [one.finished is not None for one in outcome.campaigns] == [True] * 3
    assert {name: outcome.figures[name] for name in ("messages", "lost", "extra", "still waiting", "limits broken")} == {
        "messages": 300_000, "lost": 0, "extra": 0, "still waiting": 0, "limits broken": 0,
    }  # fmt: skip
    assert outcome.violations == []
    assert without_times(simulate(SIZE)) == without_times(outcome)
    assert without_times(simulate(replace(SIZE, seed=2))) != without_times(outcome)


@pytest.mark.parametrize(("mode", "servers"), [("auto", True), ("off", False)])
def test_servers_are_ordered_where_campaigns_are_too_large_for_the_fleet(mode: Mode, servers: bool) -> None:
    outcome = simulate(SHORT, mode)
    assert bool(outcome.figures["servers ordered"]) is servers
    if mode == "off":
        assert not any("given back" in one.what for one in outcome.decisions)
    assert bool(outcome.figures["messages by ordered servers"]) is servers
    assert outcome.figures["limits broken"] == 0


def test_sick_and_lost_servers_are_taken_out_of_service_replaced_and_later_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(world()["bad_names"], "each_day", 0.15)
    monkeypatch.setitem(world()["losses"], "each_day", 0.05)
    outcome = simulate(SIZE)
    reasons = [one.why for one in outcome.decisions if one.what.endswith("is out of service")]
    assert any(why.startswith("it was declared lost") for why in reasons)
    assert any("has stopped it" in why for why in reasons)
    assert any(one.why.startswith("in the place of mx") and "servers ordered" in one.what for one in outcome.decisions)
    assert outcome.figures["servers taken out of service"] == len(reasons)
    assert outcome.figures["given back after they were out of service"] > 0
    assert {name: outcome.figures[name] for name in ("lost", "extra", "limits broken")} == {"lost": 0, "extra": 0, "limits broken": 0}


def test_a_server_that_nobody_needs_is_given_back_and_not_in_the_first_days() -> None:
    outcome = simulate(Size(recipients=20_000, servers=4, campaigns=3, days=9))
    gone = [one for one in outcome.decisions if one.what.endswith("is given back")]
    assert gone
    assert outcome.figures["given back as not needed"] == len(gone)
    assert all("needed not within eight weeks" in one.why for one in gone)
    assert min(one.at for one in gone) >= "2026-03-05"
    assert all(one.finished is not None for one in outcome.campaigns)


def test_who_has_a_send_window_is_sent_within_it() -> None:
    outcome = simulate(SIZE)
    scenario = Scenario.of(SIZE, np.random.default_rng([SIZE.seed, 0]))
    (window,) = {window for window in scenario.windows if window is not None}
    (number,) = [number for number, found in enumerate(scenario.windows) if found is not None]
    ended = outcome.campaigns[number].finished
    assert ended is not None
    clock = dt.datetime.fromisoformat(ended).astimezone(ZoneInfo(window.zone))
    assert window.begin < clock.hour * 60 + clock.minute <= window.until
    assert outcome.figures["granted too much"] < 100


@pytest.mark.parametrize(("clock", "seen"), [("02T07:45", 1), ("02T08:00", 0), ("02T19:45", 0), ("02T20:00", 1), ("08T12:00", 1)])
def test_the_checker_sees_what_is_sent_outside_of_a_window(clock: str, seen: int) -> None:
    checker = one_line()
    window = SendWindow(8 * 60, 20 * 60, (0, 1, 2, 3, 4, 5), "Europe/Berlin")
    start = int(dt.datetime.fromisoformat(f"2026-03-{clock}").replace(tzinfo=ZoneInfo("Europe/Berlin")).timestamp())
    checker.see_clock(start, np.array([5, 0, 5]), [window, window, None])
    assert checker.violations == seen == len(checker.named)


def one_line() -> Checker:
    return Checker(per_second=np.array([[1.0]]), per_hour=np.array([[1000.0]]), per_day=np.array([[np.inf]]))


@pytest.mark.parametrize(
    ("sent", "warm_up", "shut", "seen"),
    [
        ([900], np.inf, False, 0),
        ([901], np.inf, False, 1),
        ([500, 500], np.inf, False, 0),
        ([500, 501], np.inf, False, 1),
        # A new hour.
        ([500, 500, 0, 0, 500], np.inf, False, 0),
        ([500, 500, 0, 0, 500], 1499, False, 1),
        ([1], np.inf, True, 1),
        ([0], np.inf, True, 0),
    ],
)
def test_the_checker_sees_what_is_sent_beyond_a_limit(sent: list[int], warm_up: float, shut: bool, seen: int) -> None:
    checker = one_line()
    for number, count in enumerate(sent):
        checker.see(BEGIN + number * 900, np.array([[count]]), np.array([[warm_up]]), np.array([[shut]]))
    assert checker.violations == seen == len(checker.named)


def test_grants_beyond_a_limit_would_be_seen() -> None:
    """Sending does as it is granted, so that it is the plan that is checked."""
    rng = np.random.default_rng(1)
    scenario = Scenario.of(SIZE, rng)
    shape = scenario.per_day.shape
    events, ledger = Events(SIZE.servers, shape, rng), Ledger(scenario, rng)
    ledger.start(0)
    granted = np.zeros((3, *shape), dtype=np.int64)
    granted[0, 2, 0] = int(scenario.per_second[2, 0] * 900) + 1
    nothing, free = np.zeros(shape, dtype=np.int64), np.full(shape, np.inf)
    everybody = np.full(3, True)
    slot = ledger.send(granted, events, nothing, nothing > 0, free, everybody)
    checker = Checker(scenario.per_second, scenario.per_hour, scenario.per_day)
    checker.see(BEGIN, slot.offered, free, nothing > 0)
    assert checker.named == [f"{BEGIN}: server 3, provider 0: more than allowed in 900 s"]
    held = ledger.send(granted, events, nothing, nothing > 0, np.where(free > 0, 10.0, 0.0), everybody)
    assert (held.offered.sum(), held.held_back) == (10, granted.sum() - 10)
    shut = ledger.send(granted, events, nothing, nothing > 0, free, ~everybody)
    assert (shut.offered.sum(), shut.held_back) == (0, granted.sum())


def test_the_command_prints_json() -> None:
    result = CliRunner().invoke(app, ["simulate", "--recipients", "20000", "--servers", "2", "--campaigns", "1", "--days", "5", "--json"])
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert document["figures"]["messages"] == 20_000
    assert document["campaigns"][0]["finished"] is not None
    assert set(document) == set(asdict(simulate(replace(SIZE, recipients=2_000, campaigns=1))))
