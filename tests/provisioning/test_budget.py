"""Money: what a month costs, and whether one more may be ordered."""

from __future__ import annotations

import datetime as dt
from dataclasses import replace

import pytest

from mail_pipelines.config import ProvisioningSettings
from mail_pipelines.provisioning import budget, proposals
from mail_pipelines.provisioning.proposals import Wanted
from mail_pipelines.provisioning.states import State, Step
from mail_pipelines.provisioning.store import Provision

NOW = dt.datetime(2026, 11, 16, tzinfo=dt.UTC)


def server(ordered: str | None, ended: str | None = None, cost: float = 1.0) -> Provision:
    times = [dt.datetime.fromisoformat(text).replace(tzinfo=dt.UTC) if text else None for text in (ordered, ended)]
    return Provision(1, "mx1", State.ACTIVE, Step.NONE, 0, None, NOW, None, "", None, None, "north", "1", None, None, cost, NOW, times[0], times[0], times[1])


@pytest.mark.parametrize(
    ("ordered", "ended", "hours"),
    [
        # From before this month, and as if it stayed until its end.
        ("2026-10-01", None, 720),
        ("2026-11-16", None, 360),
        ("2026-11-02", "2026-11-03", 24),
        ("2026-10-20", "2026-11-02", 24),
        ("2026-10-20", "2026-10-21", 0),
        (None, None, 0),
    ],
)
def test_a_server_costs_from_its_order_to_its_end_within_the_month(ordered: str | None, ended: str | None, hours: float) -> None:
    assert budget.cost_this_month([server(ordered, ended, 0.5)], NOW) == hours * 0.5


def test_the_month_of_december_ends_with_the_year() -> None:
    assert budget.month_of(dt.datetime(2026, 12, 31, 23, tzinfo=dt.UTC)) == (dt.datetime(2026, 12, 1, tzinfo=dt.UTC), dt.datetime(2027, 1, 1, tzinfo=dt.UTC))


def test_one_more_is_allowed_up_to_the_budget_and_not_beyond() -> None:
    running = [server("2026-11-16")]
    assert budget.too_dear(running, 1.0, ProvisioningSettings(budget=720), NOW) == ""
    assert "360.00" in budget.too_dear(running, 1.0, ProvisioningSettings(budget=719.99), NOW)
    # Without a budget only what costs nothing.
    assert budget.too_dear([], 0.0, ProvisioningSettings(), NOW) == ""
    assert budget.too_dear([], 0.01, ProvisioningSettings(), NOW) != ""


def test_a_server_is_kept_for_its_shortest_lifetime() -> None:
    until = budget.may_be_given_back_at(server("2026-11-16"), ProvisioningSettings(minimum_hours=24))
    assert until == dt.datetime(2026, 11, 17, tzinfo=dt.UTC)
    assert budget.may_be_given_back_at(server(None), ProvisioningSettings()) is None


def requested(identity: int) -> Provision:
    return replace(server(None), id=identity, state=State.REQUESTED, step=Step.RESERVE, source=None)


@pytest.mark.parametrize(
    ("budget_for", "most", "asked", "allowed"),
    [
        # Servers at 1.0 an hour, from the middle of the month: 360 each.
        (1080, 20, 0, 3),
        # What is asked for is promised.
        (1080, 20, 2, 1),
        (1080, 20, 4, 0),
        (1080, 2, 1, 1),
        (0, 20, 0, 0),
    ],
)
def test_no_more_servers_are_ordered_than_may_be_made(budget_for: float, most: int, asked: int, allowed: int) -> None:
    settings = ProvisioningSettings(mode="auto", budget=budget_for, most=most)
    known = [requested(number) for number in range(asked)]
    assert budget.allowed(known, 1.0, settings, NOW) == allowed
    assert budget.allowed(known, 0.0, settings, NOW) == most - asked
    wanted = Wanted(5, "because", as_of=NOW)
    servers, said = proposals.missing(wanted, known, None, 1.0, settings, NOW)
    assert (servers, bool(said)) == (allowed, allowed == 0)
    # A proposal tells what is missing, and what it would cost.
    assert proposals.missing(wanted, known, None, 1.0, ProvisioningSettings(mode="propose", budget=budget_for), NOW) == (5, "")
