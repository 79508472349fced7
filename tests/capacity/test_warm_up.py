"""Sixty days of a warm-up, each with its own claims, answers and judgement, by the clock of the database."""

from __future__ import annotations

import datetime as dt
import threading
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from mail_pipelines.capacity import allotments, warm_up, warm_up_rules
from mail_pipelines.capacity.warm_up import ANY, DAY, day_of
from mail_pipelines.capacity.warm_up_rules import Verdict, WarmUpError, rules
from mail_pipelines.commands import context
from mail_pipelines.database.engine import database_now, reading, transact
from mail_pipelines.database.models import Allotment, Campaign, ProviderUsage, Server, State
from mail_pipelines.delivery import counters, evidence, recording, upkeep
from mail_pipelines.delivery.evidence import Evidence, Kind
from mail_pipelines.delivery.ledger_archive import LedgerArchive
from mail_pipelines.delivery.recording import Result, slot_at
from mail_pipelines.dispatch import registry, servers
from mail_pipelines.dispatch.claims import NothingClaimed
from mail_pipelines.dispatch.registry import ServerState
from tests.dispatch.test_hold_commands import says
from tests.dispatch.world import World, make_world
from tests.parts.database_clock import DatabaseClock

# A day's window begins at midnight UTC.
BEGIN = dt.datetime(2026, 3, 2, tzinfo=dt.UTC)
MINUTE = dt.timedelta(minutes=1)
HEARTBEAT = 10.0
# Small enough to be claimed row by row.
CURVES = """
[curve.careful]
by_itself = true
caps = [4, 5, 7, 10, 14, 20, 28, 39]

[curve.normal]
by_itself = true
caps = [10, 20, 40]

[curve.manual]
by_itself = false
caps = [5, 50, 500]
"""


@pytest.fixture(autouse=True)
def _small_curves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The shipped rules, with smaller curves and with signals that few messages give."""
    text = warm_up_rules.RULES.read_text(encoding="utf-8").partition("[curve.careful]")[0].replace("least = 5", "least = 1").replace("least = 2", "least = 1")
    path = tmp_path / "warm_up.toml"
    path.write_text(text + CURVES, encoding="utf-8")
    monkeypatch.setattr(warm_up_rules, "RULES", path)
    rules.cache_clear()
    context.settings.cache_clear()
    yield
    rules.cache_clear()


@dataclass
class Fleet:
    """A campaign to google and yahoo, and a server `new` that is warmed up, on a database whose clock this sets."""

    world: World
    clock: DatabaseClock
    server: servers.ServerInfo
    day: int = 0
    # By provider and day: messages claimed.
    sent: defaultdict[str, Counter[int]] = field(default_factory=lambda: defaultdict(Counter))
    delivered: defaultdict[str, list[tuple[int, int]]] = field(default_factory=lambda: defaultdict(list))

    @property
    def now(self) -> dt.datetime:
        return self.clock.now

    def begin_day(self, day: int, hour: int = 10) -> None:
        self.day = day
        self.clock.set(BEGIN + dt.timedelta(days=day, hours=hour))
        self.world.set_server("new", heartbeat_at=self.now)

    def tick(self) -> list[warm_up.Change]:
        """What the centre does: `server_health` and `open_shards`."""
        changes = warm_up.judge(self.world.engine)
        self.fill()
        return changes

    def fill(self) -> None:
        allotments.fill(self.world.engine, HEARTBEAT)

    def send(self, provider: str, most: int = 1000, *, deferred: float = 0, bounced: float = 0, complaints: int = 0) -> int:
        """Claim and record up to so many messages of a provider, of which some parts are answered so; returns how many."""
        sent = 0
        while sent < most:
            claim = self.world.claim(self.server, provider=provider, limit=min(7, most - sent))
            if isinstance(claim, NothingClaimed):
                break
            results = []
            for number, row in enumerate(claim.rows, sent + 1):
                if int(number * deferred) > int((number - 1) * deferred):
                    due = int(self.now.timestamp()) + 200 * DAY
                    results.append(Result(row.contact_id, row.attempt, State.DEFERRED, 450, "4.7.1", "rate_limited", due))
                elif int(number * bounced) > int((number - 1) * bounced):
                    results.append(Result(row.contact_id, row.attempt, State.BOUNCED, 550, "5.1.1", "invalid_recipient"))
                else:
                    results.append(Result(row.contact_id, row.attempt, State.DELIVERED, 250))
                    self.delivered[provider].append((row.contact_id, row.attempt))
            transact(self.world.engine, lambda connection, claim=claim, results=results: recording.record(connection, claim.ref, results, claim_state="open"))
            sent += len(claim.rows)
        self.sent[provider][self.day] += sent
        self.complain(provider, complaints)
        return sent

    def complain(self, provider: str, count: int) -> None:
        who = [self.delivered[provider].pop() for _ in range(count)]
        pieces = [Evidence(Kind.COMPLAINT, self.world.campaign_id, contact, attempt, self.now) for contact, attempt in who]
        transact(self.world.engine, lambda connection: evidence.apply(connection, pieces, self.now, LedgerArchive("")))

    def standing(self, provider: str) -> warm_up.Standing:
        with reading(self.world.engine) as connection:
            found = {one.provider: one for one in warm_up.standings(connection, self.now, self.server.id)}
        return found.get(provider, found[ANY])

    def step(self, provider: str) -> int:
        return self.standing(provider).step

    def state(self) -> str:
        with reading(self.world.engine) as connection:
            return servers.find(connection, "new").state

    def history(self, provider: str) -> dict[int, tuple[int, Verdict]]:
        """By day the step that it had, and what followed."""
        with reading(self.world.engine) as connection:
            days = warm_up.history(connection, self.server.id, 1000)
        return {(day.day - BEGIN.date()).days: (day.step, day.verdict) for day in days if day.provider == provider}

    def unspent(self, provider: str, start: int) -> int:
        query = sa.select(sa.func.sum(Allotment.granted - Allotment.used)).where(Allotment.provider == provider, Allotment.slot_start == start)
        with reading(self.world.engine) as connection:
            return int(connection.execute(query.where(Allotment.server_id == self.server.id)).scalar_one() or 0)


def make_fleet(engine: sa.Engine, home: Path, curve: str | None, recipients: int = 2400) -> Fleet:
    world = make_world(engine, home, recipients=recipients, domains=("google.test", "yahoo.test"))
    world.set_campaign(expire_at=None, started_at=BEGIN)
    clock = DatabaseClock(engine, BEGIN)
    server = world.server("new")
    if curve is not None:
        transact(engine, lambda connection: warm_up.set_by_hand(connection, "new", BEGIN, curve=curve))
    return Fleet(world, clock, server)


@pytest.fixture
def fleet(engine: sa.Engine, tmp_path: Path) -> Fleet:
    return make_fleet(engine, tmp_path / "home", "careful")


# --- days ---------------------------------------------------------------------------------------------------------

# What happens to the mail of a day; of other days it is good, and uses up the cap, or is 45 messages where there is none. No day of the week-ends has mail.
TROUBLE: dict[int, dict[str, dict[str, Any]]] = {
    7: {"google": {"deferred": 0.5}},
    8: {"google": {"deferred": 0.25}, "yahoo": {"complaints": 1}},
    11: {"google": {"most": 1}, "yahoo": {"bounced": 0.25}},
}
WEEK_ENDS = {5, 6, 12, 13}
# Nobody judges from the 15th day until the 18th, and grants are given without.
AWAY = {15, 16, 17}
IDLE = set(range(26, 57))
# The step that each day was begun with.
GOOGLE = [0, 1, 2, 3, 4, 5, 5, 5, 3, 2, 3, 4, 4, 4, 4, 4, 4, 4, 5, 6, 7, *[8] * 35, 5, 5, 6, 7]
YAHOO = [0, 1, 2, 3, 4, 5, 5, 5, 6, 4, 5, 6, 4, 4, 4, 4, 4, 4, 3, 4, 5, 6, 7, *[8] * 33, 5, 5, 6, 7]


def test_sixty_days_with_good_and_bad_ones(fleet: Fleet) -> None:
    caps = (*rules().curves["careful"].caps, None)
    begun: defaultdict[str, list[int]] = defaultdict(list)
    states = []
    for day in range(60):
        fleet.begin_day(day)
        if day in AWAY:
            fleet.fill()
        else:
            fleet.tick()
            # A day is judged once.
            assert fleet.tick() == []
        states.append(fleet.state())
        for provider in ("google", "yahoo"):
            begun[provider].append(fleet.step(provider))
            if day in WEEK_ENDS | IDLE:
                continue
            cap = caps[begun[provider][-1]]
            sent = fleet.send(provider, **{"most": 45} | TROUBLE.get(day, {}).get(provider, {}))
            assert 0 < sent <= (cap or 45)
            if day not in AWAY and "most" not in TROUBLE.get(day, {}).get(provider, {}):
                assert sent == (cap or 45)
        if day == 12:
            # About mail of the days before, and weighed with the next that has some.
            fleet.complain("yahoo", 1)
    assert begun == {"google": GOOGLE, "yahoo": YAHOO}
    assert states == ["warming"] * 23 + ["active"] * 33 + ["warming"] * 4
    # As long as it is not known what the days before came to, there is no more than the worst of them would leave.
    assert [fleet.sent["google"][day] for day in sorted(AWAY)] == [7, 4, 4]
    google, yahoo = fleet.history("google"), fleet.history("yahoo")
    assert google.keys() == set(range(60)) - WEEK_ENDS - IDLE - {59} | {55}
    assert [google[day] for day in (6, 7, 8) if day in google] == [(5, Verdict.BACK), (3, Verdict.BACK)]
    assert (google[11], google[14], google[15], google[55]) == ((4, Verdict.HOLD), (4, Verdict.UP), (5, Verdict.HOLD), (8, Verdict.REWARM))
    assert (yahoo[8], yahoo[11], yahoo[12], yahoo[14]) == ((6, Verdict.BACK), (6, Verdict.BACK), (4, Verdict.IDLE), (4, Verdict.BACK))
    fleet.world.check_counters()


def test_week_ends_cost_days_and_nothing_else(fleet: Fleet) -> None:
    for day in range(60):
        fleet.begin_day(day)
        fleet.tick()
        if day % 7 < 5:
            fleet.send("google", most=45)
    # Eight working days lead to the end of the curve, and a few more messages of yahoo's leave it where it is.
    assert {day: step for day, (step, verdict) in fleet.history("google").items() if verdict is Verdict.UP} == dict(
        zip((0, 1, 2, 3, 4, 7, 8, 9), range(8), strict=True)
    )
    assert (fleet.step("google"), fleet.step("yahoo"), fleet.state()) == (8, 0, "active")


def test_a_provider_that_is_new_to_an_active_server_begins_at_the_first_step(fleet: Fleet) -> None:
    transact(fleet.world.engine, lambda connection: warm_up.set_by_hand(connection, "new", fleet.now, provider="google", step=99))
    assert fleet.state() == "active"
    fleet.begin_day(0)
    fleet.tick()
    assert fleet.send("google", most=45) == 45
    assert fleet.send("yahoo") == 4
    fleet.begin_day(1)
    assert [str(change) for change in fleet.tick()] == ["warm-up of new to yahoo: step 0 → 1 after 2026-03-02: used 100% of 4 with good signals"]
    assert (fleet.state(), fleet.step("google"), fleet.step("yahoo")) == ("warming", 8, 1)


def test_a_day_is_judged_once_whoever_comes(fleet: Fleet) -> None:
    for day in range(3):
        fleet.begin_day(day)
        if not day:
            fleet.tick()
            fleet.send("google")
    together = threading.Barrier(4)
    changes: list[warm_up.Change] = []

    def judge() -> None:
        together.wait()
        changes.extend(warm_up.judge(fleet.world.engine))

    threads = [threading.Thread(target=judge) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert [(change.before, change.judgement.step) for change in changes] == [(0, 1)]
    assert fleet.step("google") == 1


def test_what_was_sent_is_kept_until_it_is_judged(fleet: Fleet) -> None:
    """The centre was away for a week, and its nightly upkeep comes first."""
    fleet.begin_day(0)
    fleet.tick()
    fleet.send("google")
    fleet.begin_day(8)
    upkeep.prune(fleet.world.engine, fleet.now)
    fleet.tick()
    assert fleet.step("google") == 1
    assert fleet.history("google") == {0: (0, Verdict.UP)}
    fleet.begin_day(130)
    upkeep.prune(fleet.world.engine, fleet.now)
    assert fleet.history("google") == {}


# --- grants -------------------------------------------------------------------------------------------------------


def test_nobody_is_granted_more_than_what_is_left_of_the_day(fleet: Fleet) -> None:
    transact(fleet.world.engine, lambda connection: warm_up.set_by_hand(connection, "new", fleet.now, curve="normal", step=1))
    second_campaign(fleet.world)
    fleet.begin_day(0)
    fleet.fill()
    slot = slot_at(fleet.now)
    assert (fleet.unspent("google", slot), fleet.unspent("google", slot + 900)) == (20, 20)
    assert fleet.send("google", 9) == 9
    fleet.fill()
    assert (fleet.unspent("google", slot), fleet.unspent("google", slot + 900)) == (11, 11)
    # In the next slot it is the same day, and what was granted beforehand goes.
    fleet.send("google", 8)
    fleet.clock.set(fleet.now + 15 * MINUTE)
    fleet.fill()
    assert (fleet.unspent("google", slot + 900), fleet.unspent("google", slot + 1800)) == (3, 3)
    assert fleet.unspent("yahoo", slot + 900) == 20
    fleet.send("google")
    fleet.fill()
    assert fleet.sent["google"][0] + fleet.unspent("google", slot + 900) == 20
    # The last slot of a day promises nothing of the next.
    fleet.begin_day(0, hour=23)
    fleet.clock.set(fleet.now + 50 * MINUTE)
    fleet.fill()
    assert fleet.unspent("yahoo", slot_at(fleet.now) + 900) == 0
    fleet.begin_day(1, hour=0)
    fleet.tick()
    assert fleet.unspent("google", slot_at(fleet.now)) == 40


def test_grants_are_not_all_written_anew_for_a_few_messages(fleet: Fleet) -> None:
    """Of one in fifty messages: all but the grant of the campaign that sent them stay, for claims wait while they are written."""
    transact(fleet.world.engine, lambda connection: warm_up.set_by_hand(connection, "new", fleet.now, curve="manual", step=2))
    second_campaign(fleet.world)
    fleet.begin_day(0)
    fleet.fill()
    assert fleet.send("google", 9) == 9
    assert allotments.fill(fleet.world.engine, HEARTBEAT) == 1
    assert allotments.fill(fleet.world.engine, HEARTBEAT) == 0


def test_the_last_message_of_a_day_is_the_most_urgent_campaigns(fleet: Fleet) -> None:
    second_campaign(fleet.world, priority=3)
    fleet.begin_day(0)
    usage = {"server_id": fleet.server.id, "provider": "google", "window_seconds": DAY, "window_start": day_of(fleet.now), "used": 3}
    transact(fleet.world.engine, lambda connection: connection.execute(sa.insert(ProviderUsage).values(usage)))
    fleet.fill()
    with reading(fleet.world.engine) as connection:
        query = sa.select(Allotment.campaign_id, Allotment.granted).where(Allotment.provider == "google", Allotment.slot_start == slot_at(fleet.now))
        assert dict(connection.execute(query).tuples().all()) == {1: 0, 2: 1}


def second_campaign(world: World, priority: int = 0) -> None:
    def work(connection: sa.Connection) -> None:
        given = dict(connection.execute(sa.select(Campaign.__table__).where(Campaign.id == world.campaign_id)).one()._mapping)
        connection.execute(sa.insert(Campaign).values(given | {"id": 2, "key": "second", "priority": priority}))
        counters.add(connection, 2, counters.CENTRE, Counter({(0, "google", State.PENDING, ""): 50}), BEGIN)

    transact(world.engine, work)


def test_the_cap_holds_whatever_is_granted_or_allowed(fleet: Fleet) -> None:
    servers.set_limits(fleet.world.engine, "new", "google", {"per_day": 1000})
    fleet.begin_day(0)
    now = int(fleet.now.timestamp())
    grant = {"campaign_id": fleet.world.campaign_id, "server_id": fleet.server.id, "provider": "google", "used": 0}
    rows = [grant | {"slot_start": now - now % 900, "granted": 10**6}]
    transact(fleet.world.engine, lambda connection: connection.execute(sa.insert(Allotment), rows))
    assert fleet.send("google") == 4
    answer = fleet.world.claim(fleet.server)
    assert isinstance(answer, NothingClaimed)
    assert (answer.reason, answer.retry_seconds) == ("the limit of 4 in 86400 s is used up", 14 * 3600)
    # A lower limit of the provider's own holds as well.
    servers.set_limits(fleet.world.engine, "new", "google", {"per_day": 3})
    with reading(fleet.world.engine) as connection:
        assert connection.execute(sa.select(ProviderUsage.used).where(ProviderUsage.window_seconds == DAY)).scalar_one() == 4
    answer = fleet.world.claim(fleet.server)
    assert isinstance(answer, NothingClaimed)
    assert answer.reason == "the limit of 3 in 86400 s is used up"


def test_what_a_planner_may_count_on(fleet: Fleet) -> None:
    server = fleet.server.id
    with reading(fleet.world.engine) as connection:
        assert warm_up.day_caps(connection, 10) == {(server, ANY): (4, 5, 7, 10, 14, 20, 28, 39, None, None)}
        assert warm_up.day_caps(connection, 1) == {(server, ANY): (4,)}
        assert warm_up.day_caps(connection, 0) == {(server, ANY): ()}

    def by_hand(connection: sa.Connection) -> None:
        warm_up.set_by_hand(connection, "new", fleet.now, provider="yahoo", curve="manual", step=1)
        warm_up.set_by_hand(connection, "new", fleet.now, provider="google", step=8)

    transact(fleet.world.engine, by_hand)
    with reading(fleet.world.engine) as connection:
        assert warm_up.day_caps(connection, 3) == {(server, ANY): (4, 5, 7), (server, "yahoo"): (50, 50, 50), (server, "google"): (None, None, None)}


# --- by hand ------------------------------------------------------------------------------------------------------


def test_a_warm_up_as_an_operator_sees_it(engine: sa.Engine, tmp_path: Path) -> None:
    make_world(engine, tmp_path / "home", recipients=8)
    assert says("server", "add", "s1", "--port", "2601", "--warm-up", "careful") == "server s1 at 127.0.0.1:2601 is warming\n"
    assert says("server", "add", "s2", "--port", "2602") == "server s2 at 127.0.0.1:2602 is active\n"
    # Another port changes nothing of it.
    assert says("server", "add", "s1", "--port", "2603") == "server s1 at 127.0.0.1:2603 is warming\n"
    with pytest.raises(WarmUpError, match="there is no warm-up curve 'carefull'; did you mean 'careful'"):
        says("server", "add", "s3", "--port", "2604", "--warm-up", "carefull")
    with reading(engine) as connection:
        assert [server.key for server in servers.all_servers(connection)] == ["s1", "s2"]
        today = day_of(database_now(connection))
    assert says("server", "warm-up", "s2") == "server s2 is active, without a warm-up\n"
    with pytest.raises(WarmUpError, match="server s2 has no warm-up; `mail-pipelines server warm-up s2 --curve NAME` begins one: careful, normal, manual"):
        says("server", "warm-up", "s2", "--step", "3")
    assert "*: step 0 of 8 (careful): 0 of 4 used today; set by hand on 20" in says("server", "warm-up", "s1")
    shown = says("server", "warm-up", "s1", "--provider", "google", "--curve", "manual", "--step", "2")
    assert shown.startswith("server s1 is warming\ngoogle: step 2 of 3 (manual): 0 of 500 used today; set by hand on 20")
    assert " warm-up to google step 2 of 3 (manual): 0 of 500 used today; set by hand on 20" in says("server", "show", "s1")
    assert " s1 catcher default 127.0.0.1:2603 warming " in says("server", "list")
    # A manual one is judged and stays.
    server = 1
    used = {"server_id": server, "window_seconds": DAY, "window_start": today - DAY, "provider": "google", "used": 500}
    transact(engine, lambda connection: connection.execute(sa.insert(ProviderUsage).values(used)))
    transact(engine, lambda connection: connection.execute(sa.text(f"UPDATE warm_ups SET judged = {today - 2 * DAY}")))
    assert warm_up.judge(engine) == []
    assert " google 2 500 500 0 0 0 hold: used 100% of 500; steps are taken by hand" in says("server", "warm-up", "s1")
    # States that it is brought into by hand lead back to this one, as long as it lasts.
    assert says("server", "pause", "s1") == "server s1 is paused\n"
    assert says("server", "activate", "s1") == "server s1 is warming\n"
    assert says("server", "warm-up", "s1", "--step", "99").startswith("server s1 is active\n")
    assert "google: warm (manual)" in says("server", "warm-up", "s1")
    assert says("server", "drain", "s1") == "server s1 is draining\n"
    assert says("server", "activate", "s1") == "server s1 is active\n"
    assert says("server", "warm-up", "s1", "--step", "0").startswith("server s1 is warming\n")
    with pytest.raises(WarmUpError, match="a warm-up is ended for all providers"):
        says("server", "warm-up", "s1", "--provider", "google", "--curve", "none")
    assert says("server", "warm-up", "s1", "--curve", "none").startswith("server s1 is active, without a warm-up\n")
    assert says("server", "warm-up", "s2", "--curve", "normal").startswith("server s2 is warming\n*: step 0 of 3 (normal)")


def test_a_warming_server_is_lost_and_retired_as_any(fleet: Fleet) -> None:
    engine = fleet.world.engine
    with reading(engine) as connection:
        assert registry.may_be_lost(servers.find(connection, "new")) is False
    fleet.begin_day(0)
    with reading(engine) as connection:
        assert registry.may_be_lost(servers.find(connection, "new"))
    assert registry.lose(engine, "new") == 0
    assert fleet.state() == ServerState.LOST
    assert transact(engine, lambda connection: registry.move(connection, "new", "activate")) is ServerState.WARMING
    registry.retire_lost(engine, "new")
    fleet.begin_day(3)
    assert warm_up.judge(engine) == []
    assert transact(engine, lambda connection: connection.execute(sa.select(sa.func.count()).select_from(Server)).scalar_one()) == 1
