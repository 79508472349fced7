"""A domain whose mail a provider's users report as spam goes there no more, and everything else goes on; a trial shows when it may again."""

from __future__ import annotations

import datetime as dt
from dataclasses import replace
from pathlib import Path

import pytest
import sqlalchemy as sa

from mail_pipelines.capacity import allotments, demand, domain_breakers, grants
from mail_pipelines.capacity.domain_breakers import CLOSED, OPEN, TRIAL, DomainBreaker
from mail_pipelines.capacity.fleet import Fleet
from mail_pipelines.capacity.grants import Grant
from mail_pipelines.capacity.warm_up_days import DAY, day_of
from mail_pipelines.commands import context
from mail_pipelines.database.engine import reading, transact
from mail_pipelines.database.models import Allotment
from mail_pipelines.delivery.breakers import domain_rules
from mail_pipelines.delivery.recording import slot_at
from mail_pipelines.dispatch.claims import NothingClaimed, OpenClaim
from mail_pipelines.metrics.centre import CentreMetrics
from mail_pipelines.reputation import readings
from mail_pipelines.reputation.readings import GOOGLE, Reading
from tests.dispatch.test_hold_commands import says
from tests.dispatch.world import World, make_world
from tests.parts.database_clock import DatabaseClock

NOW = dt.datetime(2026, 3, 12, 9, 0, tzinfo=dt.UTC)
HOURS = dt.timedelta(hours=1)
TODAY = day_of(NOW)
RULES = domain_rules()


def step(before: DomainBreaker | None, rates: dict[int, float], now: dt.datetime) -> DomainBreaker | None:
    """By days before the day of `now`."""
    days = {day_of(now) - ago * DAY: rate for ago, rate in rates.items()}
    changed = domain_breakers.decide({"shop.test": days}, [before] if before else [], RULES, now)
    assert len(changed) <= 1
    return changed[0] if changed else None


@pytest.mark.parametrize(
    ("rates", "opens"),
    [
        ({}, False),
        ({2: 0.0029}, False),
        ({2: 0.003}, True),
        ({3: 0.01, 2: 0.002}, False),
        ({3: 0.001, 2: 0.004}, True),
        ({6: 0.004}, True),
        ({7: 0.004}, False),
    ],
)
def test_the_newest_day_of_the_last_week_opens_a_breaker(rates: dict[int, float], opens: bool) -> None:
    after = step(None, rates, NOW)
    assert (after is not None and after.state == OPEN) is opens


def test_every_move_of_a_breaker() -> None:
    opened = step(None, {2: 0.0041}, NOW)
    assert opened is not None
    assert (opened.state, opened.trips, opened.until, opened.day) == (OPEN, 1, NOW + 24 * HOURS, TODAY - 2 * DAY)
    assert "0.41% reported as spam on 2026-03-10" in opened.reason
    # A day between, that is as bad, says nothing new; a correction of the day itself does.
    assert step(opened, {2: 0.0041, 1: 0.009}, NOW + 10 * HOURS) is None
    corrected = step(opened, {2: 0.0011}, NOW + 10 * HOURS)
    assert corrected is not None
    assert (corrected.state, corrected.trips) == (CLOSED, 0)
    assert step(corrected, {2: 0.0041}, NOW + 10 * HOURS) is None

    later = NOW + 24 * HOURS
    trial = step(opened, {3: 0.0041, 2: 0.01}, later)
    assert trial is not None
    assert (trial.state, trial.until, trial.day) == (TRIAL, later + 168 * HOURS, day_of(later))
    # Days before the trial, and its own first one, are not its.
    assert step(trial, {2: 0.02, 1: 0.02}, later + 24 * HOURS) is None
    assert step(trial, {2: 0.002}, later + 96 * HOURS) is None
    good = step(trial, {2: 0.0009}, later + 96 * HOURS)
    assert good is not None
    assert (good.state, good.until) == (CLOSED, None)
    bad = step(trial, {2: 0.003}, later + 96 * HOURS)
    assert bad is not None
    assert (bad.state, bad.trips, bad.until) == (OPEN, 2, later + (96 + 48) * HOURS)
    quiet = step(trial, {}, later + 168 * HOURS)
    assert quiet is not None
    assert (quiet.state, quiet.reason) == (CLOSED, "no day of the trial had 0.30% reported as spam")

    again = step(good, {1: 0.01}, later + 150 * HOURS)
    assert again is not None
    assert again.trips == 2
    forgotten = step(good, {1: 0.01}, later + 96 * HOURS + RULES.forget + HOURS)
    assert forgotten is not None
    assert forgotten.trips == 1
    longest = step(replace(trial, trips=30), {1: 0.01}, later + 96 * HOURS)
    assert longest is not None
    assert longest.until == later + 96 * HOURS + RULES.last_wait


def tell(world: World, domain: str, ago: int, rate: float, now: dt.datetime) -> None:
    found = [Reading(GOOGLE, domain, day_of(now) - ago * DAY, rate)]
    transact(world.engine, lambda connection: readings.keep(connection, found, now))


def unspent(world: World, provider: str, now: dt.datetime) -> int:
    query = sa.select(sa.func.coalesce(sa.func.sum(Allotment.granted - Allotment.used), 0))
    with reading(world.engine) as connection:
        return int(connection.execute(query.where(Allotment.provider == provider, Allotment.slot_start == slot_at(now))).scalar_one())


def test_a_stopped_domain_has_no_grants_there_a_few_on_trial_and_all_again(engine: sa.Engine, tmp_path: Path) -> None:
    world = make_world(engine, tmp_path / "home", recipients=400, domains=("google.test", "yahoo.test"))
    world.set_campaign(expire_at=None, started_at=NOW)
    clock = DatabaseClock(engine, NOW)
    server = world.server("s1")
    context.settings.cache_clear()

    def fill(now: dt.datetime) -> list[DomainBreaker]:
        """What the centre does at this time."""
        clock.set(now)
        world.set_server("s1", heartbeat_at=now)
        changed = domain_breakers.judge(engine)
        allotments.fill(engine, 10.0)
        return changed

    assert fill(NOW) == []
    room = unspent(world, "google", NOW)
    assert room > 1000
    tell(world, "other.test", 2, 0.05, NOW)
    assert [(one.domain, one.state) for one in fill(NOW)] == [("other.test", OPEN)]
    assert unspent(world, "google", NOW) == room

    tell(world, "shop.test", 2, 0.0041, NOW)
    (opened,) = fill(NOW)
    assert (opened.domain, opened.state) == ("shop.test", OPEN)
    assert domain_breakers.judge(engine) == []
    assert unspent(world, "google", NOW) == 0
    assert unspent(world, "yahoo", NOW) > 1000
    assert isinstance(world.claim(server, provider="google", limit=5), NothingClaimed)
    assert isinstance(world.claim(server, provider="yahoo", limit=5), OpenClaim)
    told = {(sample.name, *sample.labels.values()): sample.value for family in CentreMetrics(engine).collect() for sample in family.samples}
    assert told["mail_pipelines_domain_breaker", "shop.test", "google", "open"] == 1
    assert told["mail_pipelines_reputation_spam_rate", "google_postmaster", "shop.test"] == 0.0041
    # Whoever had made out grants before does not write them.
    with reading(engine) as connection:
        fleet = Fleet.read(connection, NOW, 10.0)
    place = (world.campaign_id, server.id, "google", slot_at(NOW))
    assert grants.write(engine, {place: Grant(50)}, fleet, 0, lowers=False) == 0
    assert unspent(world, "google", NOW) == 0
    # The plan counts on the time after.
    with reading(engine) as connection:
        _, demands = demand.read(connection, NOW, 48 * 3600, 600)
    until = int((NOW + 24 * HOURS).timestamp())
    assert {(one.provider, one.stopped, one.release) for one in demands} == {("google", True, until), ("yahoo", False, 0)}
    assert "mail of shop.test to google is stopped until 2026-03-13 09:00 UTC" in says("campaign", "show", "spring")

    later = NOW + 24 * HOURS
    assert {one.state for one in fill(later)} == {TRIAL}
    assert unspent(world, "google", later) == RULES.trial_messages
    assert unspent(world, "yahoo", later) > 1000
    trial = world.claim(server, provider="google", limit=5)
    assert isinstance(trial, OpenClaim)
    assert len(trial.rows) == 5

    after = later + 72 * HOURS
    tell(world, "shop.test", 2, 0.0004, after)
    assert [(one.domain, one.state) for one in fill(after)] == [("shop.test", CLOSED)]
    assert unspent(world, "google", after) > 1000
    assert "stopped" not in says("campaign", "show", "spring")
