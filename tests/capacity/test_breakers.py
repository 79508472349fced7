"""A provider that refuses a server is left alone by that server only, and tried again with care."""

from __future__ import annotations

import datetime as dt
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from mail_pipelines.campaigns import scheduling, stopping
from mail_pipelines.capacity import breakers
from mail_pipelines.capacity.breakers import CLOSED, OPEN, TRIAL, Answers, Breaker
from mail_pipelines.database.engine import transact
from mail_pipelines.database.models import EngagementEvent, State
from mail_pipelines.delivery import counters
from mail_pipelines.delivery.breakers import CampaignRules, campaign_rules, provider_rules
from mail_pipelines.delivery.classes import classify
from tests.dispatch.world import World, make_world

NOW = dt.datetime(2026, 3, 2, 9, 0, tzinfo=dt.UTC)
MINUTE = dt.timedelta(minutes=1)


def answers(count: int, reason: str = "", at: dt.datetime = NOW, *, server_id: int = 1, provider: str = "microsoft") -> Answers:
    state = State.BOUNCED if reason else State.DELIVERED
    return Answers(server_id, provider, int(at.timestamp()) // 60, state, reason, count)


def step(found: list[Answers], before: Breaker | None, now: dt.datetime) -> Breaker | None:
    changed = breakers.decide(found, [before] if before else [], provider_rules(), now)
    assert len(changed) <= 1
    return changed[0] if changed else None


def test_every_class_of_the_rules_is_one_that_replies_can_have() -> None:
    assert classify("microsoft", 550, "5.7.1", "part of their network is on our block list (S3150)").reason == "ip_blocked"
    known = {
        classify("google", code, enhanced, "").reason for code in (421, 450, 550) for enhanced in ("4.7.28", "4.7.652", "5.7.26", "5.7.25", "5.7.29", "5.7.1")
    }
    assert set().union(*(rule.classes for rule in provider_rules().rules)) <= known
    assert {rule.counts for rule in campaign_rules().rules} == set(stopping.Counts)


@pytest.mark.parametrize(
    ("found", "opens"),
    [
        ([answers(4, "ip_blocked")], False),
        ([answers(5, "ip_blocked")], True),
        ([answers(5, "ip_blocked"), answers(46)], False),
        ([answers(5, "ip_blocked"), answers(45)], True),
        ([answers(19, "rate_limited")], False),
        ([answers(20, "rate_limited"), answers(20)], True),
        ([answers(20, "rate_limited"), answers(21)], False),
        ([answers(500, "invalid_recipient")], False),
    ],
)
def test_a_closed_breaker_opens_by_number_and_share(found: list[Answers], opens: bool) -> None:
    after = step(found, None, NOW)
    assert (after is not None and after.state == OPEN) is opens


def test_the_wait_doubles_and_is_forgotten() -> None:
    opened = step([answers(5, "ip_blocked")], None, NOW)
    assert opened is not None
    assert opened.until == NOW + 30 * MINUTE
    assert step([answers(50, "ip_blocked")], opened, NOW + 29 * MINUTE) is None
    trial = step([], opened, NOW + 30 * MINUTE)
    assert trial is not None
    assert trial.state == TRIAL
    again = step([answers(1, "ip_blocked", NOW + 30 * MINUTE)], trial, NOW + 31 * MINUTE)
    assert again is not None
    assert (again.state, again.trips, again.until) == (OPEN, 2, NOW + 91 * MINUTE)
    second_trial = replace(again, state=TRIAL, changed_at=NOW + 91 * MINUTE)
    closed = step([answers(1, at=NOW + 91 * MINUTE)], second_trial, NOW + 92 * MINUTE)
    assert closed is not None
    assert closed.state == CLOSED
    soon = step([answers(5, "ip_blocked", NOW + 95 * MINUTE)], closed, NOW + 95 * MINUTE)
    assert soon is not None
    assert soon.trips == 3
    late = NOW + dt.timedelta(days=2)
    forgotten = step([answers(5, "ip_blocked", late)], closed, late)
    assert forgotten is not None
    assert forgotten.trips == 1
    longest = step([answers(5, "ip_blocked", NOW + 95 * MINUTE)], replace(closed, trips=40), NOW + 95 * MINUTE)
    assert longest is not None
    assert longest.until == NOW + 95 * MINUTE + provider_rules().last_wait


def test_what_came_before_a_close_does_not_open_it_again() -> None:
    closed = Breaker(1, "microsoft", CLOSED, "blocked", "", 1, None, NOW, {"bounced ip_blocked": 50})
    assert step([answers(50, "ip_blocked"), answers(90, "ip_blocked", NOW - MINUTE)], closed, NOW + MINUTE) is None
    assert step([answers(55, "ip_blocked")], closed, NOW + MINUTE) is not None


def test_a_trial_in_the_minute_of_the_refusals_is_judged_by_its_own_answers() -> None:
    opened = step([answers(5, "ip_blocked")], None, NOW)
    assert opened is not None
    trial = replace(opened, state=TRIAL, until=None)
    assert step([answers(5, "ip_blocked")], trial, NOW) is None
    closed = step([answers(5, "ip_blocked"), answers(1)], trial, NOW)
    assert closed is not None
    assert closed.state == CLOSED


# --- campaigns ------------------------------------------------------------------------------------------------------


def count(world: World, state: State, reason: str, number: int, now: dt.datetime) -> None:
    transact(world.engine, lambda connection: counters.add(connection, world.campaign_id, 1, {(0, "google", state, reason): number}, now))


def rules(least: int) -> CampaignRules:
    return replace(campaign_rules(), rules=tuple(replace(rule, least=least) for rule in campaign_rules().rules))


@pytest.mark.parametrize(
    ("reason", "bad", "words"),
    [("invalid_recipient", 5, "5 bad addresses in 100 answers, the limit is 5.0%"), ("spam_content", 20, "20 refused content in 100 answers")],
)
def test_a_campaign_past_its_limit_is_held_with_the_reason(engine: sa.Engine, tmp_path: Path, reason: str, bad: int, words: str) -> None:
    world = make_world(engine, tmp_path / "home", recipients=4)
    changed = dt.datetime.now(dt.UTC)
    now = changed + 2 * MINUTE
    count(world, State.DELIVERED, "", 100 - bad + 1, now)
    count(world, State.BOUNCED, reason, bad - 1, now)
    assert stopping.stop_bad(engine, now, rules(100)) == {}
    count(world, State.BOUNCED, reason, 1, now)
    count(world, State.DELIVERED, "", -1, now)
    assert words in stopping.stop_bad(engine, now, rules(100))["spring"]
    assert words in str(world.held())
    assert "held: stopped itself" in str(world.claim(world.server()))

    scheduling.resume(engine, "spring", now, "tester")
    assert stopping.stop_bad(engine, now + MINUTE, rules(100)) == {}
    assert world.held() is None


def test_complaints_are_counted_by_person_against_what_was_delivered(engine: sa.Engine, tmp_path: Path) -> None:
    world = make_world(engine, tmp_path / "home", recipients=4)
    now = dt.datetime.now(dt.UTC) + MINUTE
    count(world, State.DELIVERED, "", 1000, now)

    def complain(contact_id: int, event: int) -> None:
        row: dict[str, Any] = {"month": 202603, "id": event, "occurred_at": now, "recorded_at": now, "campaign_id": world.campaign_id, "contact_id": contact_id}
        transact(engine, lambda connection: connection.execute(sa.insert(EngagementEvent).values(kind="complaint", **row)))

    for event, contact_id in enumerate((1, 2, 2, 1), 1):
        complain(contact_id, event)
    assert stopping.stop_bad(engine, now) == {}
    complain(3, 9)
    assert "3 complaints in 1,000 answers, the limit is 0.3%" in stopping.stop_bad(engine, now)["spring"]
