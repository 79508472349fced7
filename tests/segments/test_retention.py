"""Whatever is rolled up, segments find whom they found: the same snapshot later, one made anew, and after events that came late."""

from __future__ import annotations

import datetime as dt
import random
import shutil
from typing import Any

import pyarrow.parquet as pq
import pytest
import sqlalchemy as sa

from mail_pipelines.campaigns import store
from mail_pipelines.contacts import consent
from mail_pipelines.database.engine import reading, transact
from mail_pipelines.database.models import Campaign, EngagementEvent, EngagementSum, Link
from mail_pipelines.delivery import engagement, retention
from mail_pipelines.segments import evaluation
from mail_pipelines.segments.criteria import AllOf
from mail_pipelines.segments.snapshots import engagement_read_until, open_snapshots, refresh_engagement
from tests.segments.world import NOW, World, members, rank_of, truth

DAY = dt.timedelta(days=1)
PEOPLE = range(1, 41)
CAMPAIGNS = {"old": 900, "spring": 500, "summer": 250, "autumn": 20}
LAST = ["autumn", "summer", "spring", "old"]
KEPT_FROM = retention.first_kept(NOW.date(), 13)
WHICH: list[dict[str, Any]] = [{}, {"campaign": "old"}, {"campaign": "summer"}, {"last": 1}, {"last": 9}]
# The oldest month of which single events stay begins 402 days before.
WITHIN: list[dict[str, Any]] = [{}, *({"within_days": days} for days in (30, 400, 410, 700))]
CRITERIA = [
    {form: kind, **which, **within}
    for form, kind in (("did", "opened"), ("did", "clicked"), ("did", "received"), ("did_not", "opened"))
    for which in WHICH
    for within in WITHIN
    if (form, kind) in (("did", "opened"), ("did", "clicked")) or which == within == {}
]


class Past:
    """Three years of random reactions, and what the slow evaluator knows of them."""

    def __init__(self, world: World, seed: int) -> None:
        self.world, self.chance = world, random.Random(seed)
        self.people: dict[int, dict[str, Any]] = {
            number: {"id": number, "attributes": {}, "lists": set(), "received": [], "opened": [], "clicked": []} for number in PEOPLE
        }
        for key, days in CAMPAIGNS.items():
            campaign_id = world.campaign(key, NOW - days * DAY)
            links = [
                {"id": campaign_id * 10 + number, "campaign_id": campaign_id, "url": f"https://{key}/{number}", "url_sha256": str(number)} for number in (1, 2)
            ]
            transact(world.engine, lambda connection, links=links: connection.execute(sa.insert(Link), links))
        world.contacts((number, {}, []) for number in PEOPLE)
        for key in LAST:
            at = NOW - CAMPAIGNS[key] * DAY
            receivers = self.chance.sample(PEOPLE, 15)
            world.delivered(key, dict.fromkeys(receivers, at))
            for number in receivers:
                self.people[number]["received"].append((key, at, False))
        named = sa.update(Campaign).values(segments={"include": [], "exclude": []})
        transact(world.engine, lambda connection: connection.execute(named))
        self.number = 0
        self.react(200, recorded_at=NOW)

    def react(self, count: int, *, recorded_at: dt.datetime, only_old: bool = False) -> None:
        events = []
        for _ in range(count):
            self.number += 1
            number, key, kind = self.chance.choice(PEOPLE), self.chance.choice(LAST), self.chance.choice(["open", "open", "click", "unsubscribe"])
            # To the edges of months and of the days that criteria look back.
            days = self.chance.choice([self.chance.randint(0, 1000), *(within.get("within_days", 0) for within in WITHIN), 399, 401])
            at = NOW - max(days, 450 * only_old) * DAY - dt.timedelta(microseconds=self.chance.choice([0, 1, 999_999]))
            link = self.world.campaigns[key] * 10 + self.chance.randint(1, 2) if kind == "click" else None
            machine = self.chance.random() < 0.3
            events.append({"id": self.number, "contact_id": number, "campaign": key, "kind": kind, "occurred_at": at, "link_id": link, "machine": machine})
            if kind != "unsubscribe":
                self.people[number][f"{kind}ed"].append((key, at, machine))
        self.world.events(events, recorded_at=recorded_at)

    def check(self, now: dt.datetime = NOW) -> None:
        """Every criterion, and everybody's rank, by the snapshot as it is."""
        with open_snapshots(self.world.engine, self.world.folder) as snapshots:
            for tree in CRITERIA:
                expected = {number for number, person in self.people.items() if truth(tree, person, now, LAST)}
                assert members(snapshots, tree, now) == expected, tree
            ranks = {row["contact_id"]: row["engagement_rank"] for row in evaluation.members(AllOf(()), snapshots, now=now).to_pylist()}
        for number, person in self.people.items():
            engaged = [time for _, time, machine in (*person["opened"], *person["clicked"]) if not machine]
            assert ranks[number] == (rank_of((now - max(engaged)).days) if engaged else 9999)

    def refresh(self, now: dt.datetime = NOW) -> None:
        refresh_engagement(self.world.engine, self.world.folder, now=now, min_free_mb=0, singles_from=KEPT_FROM)

    def make_anew(self, now: dt.datetime = NOW) -> None:
        shutil.rmtree(self.world.folder / "engagement")
        self.refresh(now)

    def counts(self) -> dict[int, tuple[int, int]]:
        """Opens and clicks of people, as the snapshot has counted them."""
        found: dict[int, tuple[int, int]] = {}
        with open_snapshots(self.world.engine, self.world.folder) as snapshots:
            for layer in snapshots.engagement.rollups:
                for part in layer:
                    for row in pq.read_table(snapshots.engagement_folder / part.name).to_pylist():
                        opens, clicks = found.get(row["contact_id"], (0, 0))
                        found[row["contact_id"]] = (opens + row["opens"], clicks + row["clicks"])
        return found

    def statistics(self) -> list[Any]:
        found = []
        with reading(self.world.engine) as connection:
            for key in LAST:
                read = engagement.read(connection, store.load(connection, key))
                found.append((read.numbers(), read.hourly.to_dict("records"), read.links.to_dict("records")))
        return found

    def roll_up(self, now: dt.datetime = NOW) -> int:
        return retention.roll_up(self.world.engine, KEPT_FROM, now + DAY)

    def left(self) -> int:
        """How many old events are still single ones in the database."""
        with reading(self.world.engine) as connection:
            return connection.execute(sa.select(sa.func.count()).where(EngagementEvent.month < KEPT_FROM)).scalar_one()


# On SQLite it takes as long and finds as much: what it asks of the database `tests/delivery/test_retention.py` asks of both.
@pytest.mark.slow
@pytest.mark.parametrize("database_url", [pytest.param("mariadb", marks=pytest.mark.server)], indirect=True)
def test_every_criterion_finds_the_same_people(world: World) -> None:
    past = Past(world, 1)
    world.refresh()
    past.check()
    counts, statistics = past.counts(), past.statistics()
    old = past.left()
    assert past.roll_up() == old > 50
    assert (past.left(), past.roll_up()) == (0, 0)
    # The snapshot as it was, with single events thinned out, and one made from the sums.
    past.check()
    past.refresh(NOW + dt.timedelta(minutes=1))
    past.check()
    assert past.counts() == counts
    past.make_anew()
    past.check()
    assert (past.counts(), past.statistics()) == (counts, statistics)
    # And what comes late, after its month was rolled up.
    later = NOW + dt.timedelta(hours=1)
    past.react(60, recorded_at=later, only_old=True)
    past.refresh(later)
    past.check()
    counts, statistics = past.counts(), past.statistics()
    assert past.roll_up(later) == 60
    past.make_anew(later)
    past.check()
    assert (past.counts(), past.statistics()) == (counts, statistics)


def test_a_snapshot_keeps_single_events_only_of_young_months(world: World) -> None:
    world.contacts([(1, {}, [])])
    world.campaign("spring", NOW)
    old, young = NOW - 600 * DAY, NOW - 60 * DAY
    acts = [{"contact_id": 1, "campaign": "spring", "kind": "open", "occurred_at": at + minute * DAY / 1440} for at in (old, young) for minute in range(5)]
    world.events(acts)

    def kept() -> dict[int, list[dt.datetime]]:
        with open_snapshots(world.engine, world.folder) as snapshots:
            folder, months = snapshots.engagement_folder, snapshots.engagement.months
            return {month.month: [time for part in month.parts for time in pq.read_table(folder / part.name)["occurred_at"].to_pylist()] for month in months}

    world.refresh()
    assert [len(times) for times in kept().values()] == [5, 5]
    refresh_engagement(world.engine, world.folder, now=NOW, min_free_mb=0, singles_from=KEPT_FROM)
    last = (old + 4 * DAY / 1440).replace(tzinfo=None)
    assert kept()[old.year * 100 + old.month] == [last]
    assert len(kept()[young.year * 100 + young.month]) == 5
    # What comes late for such a month is thinned out with the next refresh.
    world.events([{"contact_id": 1, "campaign": "spring", "kind": "open", "occurred_at": old - dt.timedelta(hours=1)}], recorded_at=NOW + DAY)
    refresh_engagement(world.engine, world.folder, now=NOW + DAY, min_free_mb=0, singles_from=KEPT_FROM)
    assert kept()[old.year * 100 + old.month] == [last]


def test_what_the_snapshot_has_not_read_is_left_to_it(world: World) -> None:
    world.contacts((number, {}, []) for number in (1, 2))
    world.campaign("spring", NOW)
    assert engagement_read_until(world.engine, world.folder) is None
    world.refresh()
    read_until = engagement_read_until(world.engine, world.folder)
    assert read_until is not None
    # Both came two days ago; the snapshot was refreshed three days ago, and is behind.
    late = [{"contact_id": number, "campaign": "spring", "kind": "open", "occurred_at": NOW - 600 * DAY} for number in (1, 2)]
    world.events(late[:1], recorded_at=read_until - DAY)
    world.events(late[1:], recorded_at=NOW + DAY)
    months = retention.RetentionSettings()
    assert retention.keep(world.engine, months, NOW + 3 * DAY, read_until).rolled_up == 1
    world.refresh(NOW + 3 * DAY)
    assert world.members({"did": "opened"}) == {2}
    read_until = engagement_read_until(world.engine, world.folder)
    # It was recorded more than a day ago, and now it is read.
    assert retention.keep(world.engine, months, NOW + 3 * DAY, read_until).rolled_up == 1
    world.refresh(NOW + 4 * DAY)
    assert world.members({"did": "opened"}) == {2}


def test_events_are_moved_while_a_snapshot_is_made_and_none_is_missed_or_met_twice(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the two statements by which a first snapshot reads events and sums, all of them are moved."""
    from mail_pipelines.segments import engagement_snapshot

    past = Past(world, 3)
    world.refresh()
    expected, sums = past.counts(), engagement_snapshot._sums
    moved = []

    def moving(connection: sa.Connection) -> Any:
        moved.append(past.roll_up())
        yield from sums(connection)

    monkeypatch.setattr(engagement_snapshot, "_sums", moving)
    past.make_anew()
    assert moved[0] > 50
    past.check()
    assert past.counts() == expected


def test_an_erased_contact_is_a_number_in_the_sums_and_in_no_segment(world: World) -> None:
    past = Past(world, 4)
    past.roll_up()
    who = max(past.people, key=lambda number: len(past.people[number]["opened"]))
    of_them = sa.select(sa.func.count()).where(EngagementSum.contact_id == who)
    assert transact(world.engine, lambda connection: consent.erase(connection, who, now=NOW))
    with reading(world.engine) as connection:
        assert connection.execute(of_them).scalar_one() > 0
    columns = {column.name for column in EngagementSum.__table__.columns}
    assert columns == {"campaign_id", "kind", "contact_id", "link_id", "machine", "count", "first_at", "last_at"}
    del past.people[who]
    world.refresh()
    past.check()
    past.make_anew()
    past.check()


def test_a_campaign_that_runs_keeps_its_events(world: World) -> None:
    past = Past(world, 5)
    running = sa.update(Campaign).where(Campaign.key == "old").values(state="paused")
    transact(world.engine, lambda connection: connection.execute(running))
    before = past.statistics()
    past.roll_up()
    with reading(world.engine) as connection:
        left = connection.execute(sa.select(EngagementEvent.campaign_id).where(EngagementEvent.month < KEPT_FROM).distinct()).scalars().all()
        assert left == [world.campaigns["old"]]
    world.refresh()
    past.check()
    assert past.statistics() == before
