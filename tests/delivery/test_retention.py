"""Old events become sums: none is lost or counted twice, whatever is killed, comes late or runs at the same time; and what is still asked for stays."""

from __future__ import annotations

import datetime as dt
import random
import subprocess
import sys
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pydantic
import pytest
import sqlalchemy as sa

from mail_pipelines.benchmarks.mariadb import MariaDB
from mail_pipelines.campaigns import archiving, why
from mail_pipelines.config import RetentionSettings, Settings
from mail_pipelines.config import load as load_settings
from mail_pipelines.database import copying, migrate, partitions
from mail_pipelines.database.engine import create_engine, is_mysql, reading, transact
from mail_pipelines.database.models import Delivery, DeliveryEvent, EngagementEvent, EngagementHour, EngagementSum, State
from mail_pipelines.delivery import retention, suppression
from mail_pipelines.delivery.evidence import Kind
from tests.campaigns.parts import NOW, add_contacts, contact_rows, fill_ledger, make_campaign
from tests.parts.kills import killed_at
from tests.parts.processes import wait_for
from tests.parts.transactions import sizes_of_transactions

KEPT_FROM = retention.first_kept(NOW.date(), 13)
KINDS = ("open", "click", "unsubscribe", "complaint")
DAY = dt.timedelta(days=1)
Sums = dict[tuple[Any, ...], tuple[int, dt.datetime, dt.datetime]]


def events(count: int, seed: int = 1, days: tuple[int, int] = (430, 720), **more: Any) -> list[dict[str, Any]]:
    """Reactions between 14 and 24 months ago, of so few people and hours that many belong to one sum."""
    chance, made = random.Random(seed), []
    for number in range(count):
        at = NOW - dt.timedelta(days=chance.randint(*days), seconds=chance.randint(0, 7200), microseconds=chance.choice([0, 1, 999_999]))
        kind = chance.choice(KINDS)
        made.append(
            {
                "month": at.year * 100 + at.month, "id": seed * 10**9 + number, "occurred_at": at, "recorded_at": at, "campaign_id": chance.randint(1, 3),
                "contact_id": chance.randint(1, 30), "kind": kind, "link_id": chance.randint(1, 2) if kind == "click" else None,
                "machine": chance.random() < 0.3,
            }
            | more
        )  # fmt: skip
    return made


def write(engine: sa.Engine, rows: list[dict[str, Any]]) -> None:
    transact(engine, lambda connection: connection.execute(sa.insert(EngagementEvent), rows))


def summed(rows: list[dict[str, Any]]) -> Sums:
    """The slow, obvious sums."""
    times: defaultdict[tuple[Any, ...], list[dt.datetime]] = defaultdict(list)
    for row in rows:
        times[row["campaign_id"], row["kind"], row["contact_id"], row["link_id"] or 0, row["machine"]].append(row["occurred_at"])
    return {key: (len(found), min(found), max(found)) for key, found in times.items()}


def sums(engine: sa.Engine) -> Sums:
    with reading(engine) as connection:
        return {tuple(row[:5]): (row.count, row.first_at, row.last_at) for row in connection.execute(sa.select(EngagementSum.__table__))}


def hours(engine: sa.Engine) -> Counter[tuple[Any, ...]]:
    with reading(engine) as connection:
        return Counter({tuple(row[:4]): row.count for row in connection.execute(sa.select(EngagementHour.__table__))})


def by_hour(rows: list[dict[str, Any]]) -> Counter[tuple[Any, ...]]:
    return Counter((row["campaign_id"], int(row["occurred_at"].timestamp()) // 3600 * 3600, row["kind"], row["machine"]) for row in rows)


def left(engine: sa.Engine, table: type[DeliveryEvent] | type[EngagementEvent] = EngagementEvent) -> int:
    with reading(engine) as connection:
        return connection.execute(sa.select(sa.func.count()).select_from(table)).scalar_one()


def counted(engine: sa.Engine) -> int:
    """Events and sums together, as one statement sees them."""
    one = sa.select(sa.func.count()).select_from(EngagementEvent).scalar_subquery()
    two = sa.select(sa.func.coalesce(sa.func.sum(EngagementSum.count), 0)).scalar_subquery()
    with reading(engine) as connection:
        return int(connection.execute(sa.select(one + two)).scalar_one())


def roll_up(engine: sa.Engine, **more: Any) -> int:
    return retention.roll_up(engine, KEPT_FROM, NOW, **more)


# --- engagement -----------------------------------------------------------------------------------------------------


def test_the_sums_are_those_of_the_events_in_bounded_transactions(engine: sa.Engine) -> None:
    # All in one month.
    rows = events(5_000, days=(560, 575))
    write(engine, rows)
    with sizes_of_transactions(engine, "DELETE") as sizes:
        assert roll_up(engine) == 5_000
    assert sum(sizes) == 5_000
    assert 1_000 < max(sizes) <= 2_000
    assert (left(engine), sums(engine), hours(engine)) == (0, summed(rows), by_hour(rows))
    assert roll_up(engine) == 0


def test_young_months_stay_and_so_does_everything_where_nothing_is_to_go(engine: sa.Engine) -> None:
    first_day = dt.datetime(KEPT_FROM // 100, KEPT_FROM % 100, 1, tzinfo=dt.UTC)
    rows = [
        events(1, month=at.year * 100 + at.month, id=number, occurred_at=at, recorded_at=first_day)[0]
        for number, at in enumerate([first_day - dt.timedelta(microseconds=1), first_day, NOW])
    ]
    write(engine, rows)
    forever = RetentionSettings(engagement_months=0, deferral_months=0)
    assert retention.keep(engine, forever, NOW, None).rolled_up == 0
    assert roll_up(engine) == 1
    assert sums(engine) == summed(rows[:1])


def test_what_comes_late_counts_with_what_was_there(engine: sa.Engine) -> None:
    rows = events(500)
    write(engine, rows)
    roll_up(engine)
    late = events(300, seed=2)
    write(engine, late)
    assert counted(engine) == 800
    assert roll_up(engine) == 300
    assert (sums(engine), hours(engine)) == (summed(rows + late), by_hour(rows + late))


def test_a_night_does_not_go_on_for_ever(engine: sa.Engine) -> None:
    rows = events(5_000)
    write(engine, rows)
    assert 1_000 <= roll_up(engine, most=1_000) <= 3_000
    assert counted(engine) == 5_000
    roll_up(engine)
    assert sums(engine) == summed(rows)


def test_killed_anywhere_nothing_is_lost_or_counted_twice(engine: sa.Engine, database_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retention, "ROWS_AT_ONCE", 20)
    rows = events(300)
    write(engine, rows)
    step, kills = 1, 0
    while left(engine):
        engine.dispose()
        if not killed_at(step, database_url, lambda engine, _: roll_up(engine)):
            break
        kills += 1
        assert counted(engine) == 300
        step += 1
    # Every statement of the first transaction at least, and of some that follow.
    assert kills > 8
    roll_up(engine)
    assert (left(engine), sums(engine), hours(engine)) == (0, summed(rows), by_hour(rows))


BIG = 200_000
# With a fourth argument it stands still in the transaction of that number, until it is killed.
ROLL_UP = """
import datetime as dt, itertools, sys
import sqlalchemy as sa
from mail_pipelines.database.engine import create_engine
from mail_pipelines.delivery import retention
engine, commits = create_engine(sys.argv[1]), itertools.count(1)
if last := sys.argv[4:]:
    sa.event.listen(engine, "commit", lambda _: next(commits) == int(last[0]) and sys.stdin.read())
print(retention.roll_up(engine, int(sys.argv[2]), dt.datetime.fromisoformat(sys.argv[3])), flush=True)
"""


# Half a minute on an idle machine, and five where each process waits for twenty others.
@pytest.mark.timeout(900)
@pytest.mark.slow
def test_200_000_events_through_killed_processes(engine: sa.Engine, database_url: str) -> None:
    rows: list[dict[str, Any]] = []
    for part in range(20):
        rows += events(BIG // 20, seed=part + 1)
        write(engine, rows[-BIG // 20 :])
    command = [sys.executable, "-c", ROLL_UP, database_url, str(KEPT_FROM), NOW.isoformat()]
    remaining = BIG
    for _ in range(3):
        with subprocess.Popen([*command, "30"], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
            wait_for(lambda before=remaining: left(engine) <= before - 20_000, seconds=240, what="20,000 more events moved")  # type: ignore[misc]
            process.kill()
        assert counted(engine) == BIG
        remaining = left(engine)
        assert remaining > 0
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    # Of the killed one the server may have finished the last transaction since.
    assert remaining - 2_000 <= int(done.stdout) <= remaining
    assert (left(engine), sums(engine), hours(engine)) == (0, summed(rows), by_hour(rows))


def test_two_at_once_and_somebody_who_writes_meanwhile(engine: sa.Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retention, "ROWS_AT_ONCE", 50)
    rows, late = events(2_000), events(400, seed=2)
    write(engine, rows)

    def add() -> list[int]:
        seen = []
        for start in range(0, len(late), 20):
            write(engine, late[start : start + 20])
            seen.append(counted(engine))
        return seen

    with ThreadPoolExecutor(3) as pool:
        movers = [pool.submit(roll_up, engine) for _ in range(2)]
        seen = pool.submit(add).result()
        moved = sum(mover.result() for mover in movers)
    # Whoever looks sees each event once.
    assert seen == [2_000 + 20 * number for number in range(1, 21)]
    assert moved + roll_up(engine) == 2_400
    assert (left(engine), sums(engine), hours(engine)) == (0, summed(rows + late), by_hour(rows + late))


def test_emptied_months_are_dropped_as_partitions_and_take_no_late_event_with_them(mariadb: MariaDB) -> None:
    engine = create_engine(mariadb.database())
    migrate.upgrade(engine)
    with engine.connect() as connection:
        first, second, third, *rest = partitions._bounds(connection, "engagement_events")
    # Rows of the months before the first three bounds, and years later.
    then = dt.datetime(first // 100 + 3, 6, 15, tzinfo=dt.UTC)
    ends = [dt.datetime(bound // 100, bound % 100, 1, tzinfo=dt.UTC) for bound in (first, second, third)]
    running = make_campaign(engine, state="sending").id
    rows = []
    for number, end in enumerate(ends):
        at = end - DAY
        rows += events(10, seed=number + 1, month=at.year * 100 + at.month, occurred_at=at, recorded_at=at, campaign_id=99)
    # The second month has one that stays.
    rows[10]["campaign_id"] = running
    write(engine, rows)
    settings = RetentionSettings(deferral_months=0)
    report = retention.keep(engine, settings, then, None)
    assert report.rolled_up == 29
    names = [f"engagement_events.m{bound}" for bound in (first, third, *rest[:-1])]
    assert [name for name in report.partitions_dropped if name.startswith("engagement")] == names
    partitions.extend(engine, then.date())
    # An event of the first month, whose partition is gone, comes into the second's, and one of the third into this month's.
    late = [events(1, seed=9 - number, month=month, recorded_at=ends[0], campaign_id=99)[0] for number, month in enumerate((202001, rows[20]["month"]))]
    write(engine, late)
    assert retention.keep(engine, settings, then, None).rolled_up == 2
    assert sums(engine) == summed([row for row in rows + late if row["campaign_id"] != running])
    engine.dispose()


def test_sums_are_copied_to_another_database(both_engines: tuple[sa.Engine, sa.Engine], monkeypatch: pytest.MonkeyPatch) -> None:
    """Their keys have names, links and truth values in them, whose order both databases must agree on."""
    monkeypatch.setattr(copying, "ROWS", 7)
    source, target = both_engines
    write(source, events(500))
    roll_up(source)
    with reading(source) as connection:
        for table in (EngagementSum.__table__, EngagementHour.__table__):
            assert isinstance(table, sa.Table)
            copying.copy(connection, target, table, lambda _: None)
            here, there = copying.compare(connection, target, table, lambda _: None)
            assert here == there
    assert (sums(target), hours(target)) == (sums(source), hours(source))


# --- deferrals ------------------------------------------------------------------------------------------------------

STATES = ("draft", "scheduled", "building", "sending", "paused", "finished", "cancelled", "archived")
ALL_KINDS = ("deferred", "bounced", "unknown", "resent", "resolved", *Kind)


def say(engine: sa.Engine, campaign_id: int, at: dt.datetime, kind: str, number: int, **more: Any) -> None:
    row = {"month": at.year * 100 + at.month, "id": number, "occurred_at": at, "campaign_id": campaign_id, "contact_id": 1, "attempt": 0, "kind": kind} | more
    transact(engine, lambda connection: connection.execute(sa.insert(DeliveryEvent).values(row)))


def test_only_old_deferrals_of_campaigns_that_are_over_are_dropped(engine: sa.Engine) -> None:
    old, young = NOW - 400 * DAY, NOW - 300 * DAY
    ids = {state: make_campaign(engine, state, state=state).id for state in STATES}
    number = 0
    for campaign_id in ids.values():
        for at in (old, young):
            for kind in ALL_KINDS:
                number += 1
                say(engine, campaign_id, at, kind, number)
    report = retention.keep(engine, RetentionSettings(), NOW, None)
    assert report.deferrals_dropped == 2
    with reading(engine) as connection:
        found = {(row.campaign_id, row.kind, row.occurred_at) for row in connection.execute(sa.select(DeliveryEvent.__table__))}
    everything = {(campaign_id, kind, at) for campaign_id in ids.values() for kind in ALL_KINDS for at in (old, young)}
    assert everything - found == {(ids["finished"], "deferred", old), (ids["cancelled"], "deferred", old)}


def test_refusals_that_count_against_addresses_are_never_dropped() -> None:
    longest = max(rule.within for rule in suppression.rules().values())
    for months in (3, 4, 13):
        for day in range(1500):
            today = dt.date(2024, 1, 1) + dt.timedelta(days=day)
            kept_from = retention.first_kept(today, months)
            assert dt.date(kept_from // 100, kept_from % 100, 1) <= today - longest
    with pytest.raises(pydantic.ValidationError, match="give 3 or more, or 0"):
        RetentionSettings(deferral_months=2)


def test_the_first_month_that_stays() -> None:
    examples = {(2026, 1, 13): 202412, (2026, 12, 12): 202512, (2026, 3, 3): 202512, (2026, 3, 24): 202403, (2026, 3, 0): 0}
    assert {given: retention.first_kept(dt.date(given[0], given[1], 15), given[2]) for given in examples} == examples


def test_why_answers_with_sums_and_says_what_is_not_kept(engine: sa.Engine, tmp_path: Path) -> None:
    settings: Settings = load_settings({"MAIL_PIPELINES_HOME": str(tmp_path)})
    Path(settings.campaigns.archive).mkdir(parents=True)
    started = NOW - 500 * DAY
    campaign = make_campaign(engine, state="finished", started_at=started, finished_at=started + DAY, audience_manifest={"rows": 1})
    add_contacts(engine, 1, 1)
    fill_ledger(engine, campaign.id, {State.DELIVERED: 1}, sort_key=int((started + DAY).timestamp()))
    values = {"address_hash": contact_rows([1])[0]["address_hash"], "attempt": 2}
    transact(engine, lambda connection: connection.execute(sa.update(Delivery).values(values)))
    for attempt in range(2):
        say(engine, campaign.id, started + dt.timedelta(hours=attempt), "deferred", attempt, attempt=attempt, code=450)
    acts = events(4, campaign_id=campaign.id, contact_id=1, link_id=None, machine=False)
    for number, (row, kind) in enumerate(zip(acts, ("open", "open", "click", "unsubscribe"), strict=True)):
        at = started + (number + 2) * DAY
        row |= {"kind": kind, "occurred_at": at, "recorded_at": at, "month": at.year * 100 + at.month}
    write(engine, acts)

    def told() -> list[str]:
        answer = why.of_campaign(engine, settings, str(contact_rows([1])[0]["email"]), campaign.key, NOW)
        assert answer.verdict == "delivered: it was taken by the destination"
        return [moment.what for moment in answer.moments[1:]]

    before = ["attempt 0: deferred, 450", "attempt 1: deferred, 450", "delivered", "open", "open", "click", "unsubscribe"]
    assert told() == before
    assert retention.keep(engine, settings.retention, NOW, None)[:2] == (4, 2)
    until = f"{started + 3 * DAY:%Y-%m-%d %H:%M:%S} UTC"
    after = ["delivered", f"open, 2 times until {until}, of which only this sum is kept", "click", "unsubscribe"]
    assert told() == ["put off 2 times before: answers of so long ago are not kept", *after]
    # The archive has what there is.
    assert archiving.archive_old(engine, settings, NOW).failed == {}
    assert left(engine, DeliveryEvent) == 0
    assert told() == ["put off 2 times before: answers of so long ago are not kept", *after]


def test_deferrals_are_not_dropped_while_an_archive_is_written(engine: sa.Engine) -> None:
    """The campaign becomes archived between the look at its events and the deletion."""
    campaign = make_campaign(engine, state="finished")
    for number in range(5):
        say(engine, campaign.id, NOW - 400 * DAY, "deferred", number)
    archived = sa.text("UPDATE campaigns SET state = 'archived'")
    other = create_engine(engine.url.render_as_string(hide_password=False))
    changed = []

    def change(_connection: object, _cursor: object, statement: str, *_rest: object) -> None:
        if statement.startswith("SELECT campaigns.id") and not changed:
            changed.append(transact(other, lambda connection: connection.execute(archived).rowcount))

    if is_mysql(engine):
        sa.event.listen(engine, "before_cursor_execute", change)
    else:
        # Nobody else writes during a transaction there.
        transact(other, lambda connection: changed.append(connection.execute(archived).rowcount))
    assert retention.drop_deferrals(engine, KEPT_FROM + 100) == 0
    assert (changed, left(engine, DeliveryEvent)) == ([1], 5)
    other.dispose()
