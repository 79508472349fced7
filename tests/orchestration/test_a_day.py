"""A day of 40 servers and 5 campaigns in the ledger: Dagster's list of runs stays short, and no retry waits long.

Its time is simulated. What the sensor asks (`openings.find`) is the real thing on a real database; the sessions are a model of what sessions do
(`tests/dispatch/test_session.py` shows that they do): take what is due, in their own shard first, do errands for other campaigns, wait for what falls due
soon, and end after 45 minutes.
"""

from __future__ import annotations

import datetime as dt
import heapq
import math
import random
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import sqlalchemy as sa

from mail_pipelines.config import Settings
from mail_pipelines.database.engine import reading, transact
from mail_pipelines.database.models import Allotment, Campaign, CampaignCounter, Delivery, Server, State
from mail_pipelines.database.upsert import add_to
from mail_pipelines.delivery.recording import SLOT_SECONDS, slot_at
from mail_pipelines.dispatch import openings
from mail_pipelines.dispatch.giving_way import ERRAND_AFTER_SECONDS
from mail_pipelines.dispatch.greylisting import REASON
from mail_pipelines.dispatch.openings import Opening
from tests.dispatch.world import World, make_world

SERVERS, SLOTS, CAMPAIGNS, SHARDS = 40, 2, 5, 64
PROVIDERS = ("google", "other")
ROWS = SHARDS * len(PROVIDERS) * 60
# As long as there is much to send, and later.
TICK_SECONDS, CALM_TICK_SECONDS = 60, 300
# Of one session to one provider: slow, so that campaigns of this size take as long as larger ones.
ROWS_PER_SECOND = 0.1
# Of the first offers; and of those put off, how many are so again each time.
GREYLISTED, PUT_OFF, AGAIN = 0.05, 0.05, 0.5
MOST_RUNS_AN_HOUR = 400
# Of what destinations say.
SEED = 16
# One campaign is of higher priority than the others.
URGENT = "campaign-5"
Place = tuple[int, str]
# When it is due, contact, attempt, and the server it waits for (0: any).
Deferred = tuple[int, int, int, int]


@dataclass
class Ledger:
    """The rows of one campaign beside the database: what waits at each place."""

    id: int
    pending: dict[Place, list[int]]
    deferred: defaultdict[Place, list[Deferred]] = field(default_factory=lambda: defaultdict(list))
    # The same by server, with some that have been offered since.
    waiting: defaultdict[int, list[Deferred]] = field(default_factory=lambda: defaultdict(list))
    offered: set[tuple[int, int]] = field(default_factory=set)

    def defer(self, place: Place, row: Deferred) -> None:
        heapq.heappush(self.deferred[place], row)
        heapq.heappush(self.waiting[row[3]], row)

    def next_due(self, server_id: int) -> float:
        """When a server next has something to do."""
        if any(self.pending.values()):
            return 0
        firsts = []
        for waiting in (self.waiting[0], self.waiting[server_id]):
            while waiting and waiting[0][1:3] in self.offered:
                heapq.heappop(waiting)
            firsts += [row[0] for row in waiting[:1]]
        return min(firsts, default=math.inf)

    @property
    def open(self) -> int:
        return sum(map(len, self.pending.values())) + sum(map(len, self.deferred.values()))


@dataclass
class Working:
    """A session of the model."""

    opening: Opening
    server_id: int
    until: int
    idle_since: int | None = None


class Day:
    def __init__(self, world: World, sending: Settings) -> None:
        self.world, self.sending = world, sending.sending
        self.begin = slot_at(dt.datetime(2026, 11, 24, 6, 0, tzinfo=dt.UTC))
        self.ledgers: dict[str, Ledger] = {}
        self.sessions: list[Working] = []
        self.started: Counter[int] = Counter()
        # How long after it was due each retry was made, of all campaigns and of the urgent one; and how many were errands.
        self.late: list[int] = []
        self.urgent_late: list[int] = []
        self.errands = 0
        self.fleet = {f"s{number:02d}": number for number in range(1, SERVERS + 1)}

    def prepare(self) -> None:
        end = dt.datetime.fromtimestamp(self.begin, dt.UTC) + dt.timedelta(days=2)
        servers = [
            {"id": number, "key": key, "kind": "catcher", "host": "127.0.0.1", "port": number, "state": "active", "pool_id": 1, "created_at": end}
            # They speak all day.
            | {"heartbeat_at": end}
            for key, number in self.fleet.items()
        ]

        def work(connection: sa.Connection) -> None:
            given = dict(connection.execute(sa.select(Campaign.__table__)).one()._mapping)
            connection.execute(sa.delete(Delivery))
            connection.execute(sa.delete(CampaignCounter))
            connection.execute(sa.insert(Server), servers)
            for number in range(1, CAMPAIGNS + 1):
                key = given["key"] if number == given["id"] else f"campaign-{number}"
                if number != given["id"]:
                    connection.execute(sa.insert(Campaign).values(given | {"id": number, "key": key, "priority": 2 if key == URGENT else given["priority"]}))
                self.ledgers[key] = self._fill(connection, number)

        transact(self.world.engine, work)

    def _fill(self, connection: sa.Connection, campaign_id: int) -> Ledger:
        places = [(shard, provider) for shard in range(SHARDS) for provider in PROVIDERS]
        ledger = Ledger(campaign_id, {place: [] for place in places})
        rows = []
        for contact in range(ROWS):
            shard, provider = place = places[contact % len(places)]
            ledger.pending[place].append(contact)
            rows.append(
                {"campaign_id": campaign_id, "contact_id": contact, "address_hash": contact.to_bytes(16, "big"), "shard": shard, "provider": provider}
                | {"state": int(State.PENDING), "sort_key": contact, "attempt": 0, "variant": 0}
            )
        connection.execute(sa.insert(Delivery), rows)
        counts = [
            {"campaign_id": campaign_id, "shard": shard, "provider": provider, "server_id": 0, "state": int(State.PENDING), "count": len(contacts)}
            for (shard, provider), contacts in ledger.pending.items()
        ]
        connection.execute(sa.insert(CampaignCounter), counts)
        return ledger

    def grant(self, now: int) -> None:
        """Enough for everything, as in each slot of a quarter of an hour."""
        rows = [
            {"campaign_id": ledger.id, "server_id": server, "provider": provider, "slot_start": slot_at(at(now)), "granted": 1_000_000, "used": 0}
            for ledger in self.ledgers.values()
            for server in self.fleet.values()
            for provider in PROVIDERS
        ]

        def work(connection: sa.Connection) -> None:
            connection.execute(sa.delete(Allotment))
            connection.execute(sa.insert(Allotment), rows)

        transact(self.world.engine, work)

    def tick(self, now: int, seconds: int) -> None:
        """What the sensor asks for begins, and every session works for the time of a tick."""
        if (now - self.begin) % SLOT_SECONDS == 0:
            self.grant(now)
        with reading(self.world.engine) as connection:
            found = openings.find(connection, at(now), slots=SLOTS, heartbeat_seconds=10, in_flight={session.opening for session in self.sessions})
        self.started[(now - self.begin) // 3600] += len(found)
        self.sessions += [Working(opening, self.fleet[opening.server], now + int(self.sending.session_seconds)) for opening in found]
        moves: dict[str, list[dict[str, int | str | None]]] = defaultdict(list)
        for session in self.sessions:
            self.work(session, now, int(ROWS_PER_SECOND * seconds), moves[session.opening.campaign])
        for session in self.sessions:
            self.do_errands(session, now, int(ROWS_PER_SECOND * seconds), moves)
        self.write({key: rows for key, rows in moves.items() if rows})
        self.sessions = [session for session in self.sessions if now < session.until and self.goes_on(session, now)]

    def work(self, session: Working, now: int, most: int, moves: list[dict[str, int | str | None]]) -> None:
        ledger = self.ledgers[session.opening.campaign]
        sent = False
        for provider in PROVIDERS:
            room = most
            for step in range(SHARDS):
                place = ((session.opening.shard + step) % SHARDS, provider)
                for contact, attempt, greylisted in self.take(ledger, place, session.server_id, now, room):
                    room -= 1
                    sent = True
                    moves.append(self.offer(ledger, place, contact, attempt, greylisted, session.server_id, now))
                if not room:
                    break
        session.idle_since = None if sent else session.idle_since or now

    def do_errands(self, session: Working, now: int, most: int, moves: dict[str, list[dict[str, int | str | None]]]) -> None:
        """What has been due for a while of campaigns that no session of its server sends, while all slots there are taken: the urgent one's, or any."""
        here = {other.opening.campaign for other in self.sessions if other.server_id == session.server_id}
        if sum(other.server_id == session.server_id for other in self.sessions) < SLOTS:
            return
        for key, ledger in self.ledgers.items():
            if key in here or (session.idle_since is None and key != URGENT):
                continue
            for place in ledger.deferred:
                before = len(self.late)
                for contact, attempt, greylisted in self.take(ledger, place, session.server_id, now - int(ERRAND_AFTER_SECONDS), most, errand=True):
                    moves[key].append(self.offer(ledger, place, contact, attempt, greylisted, session.server_id, now))
                self.errands += len(self.late) - before

    def take(self, ledger: Ledger, place: Place, server_id: int, now: int, room: int, *, errand: bool = False) -> Iterator[tuple[int, int, bool]]:
        """Rows that this server may send now: (contact, attempt, whether it was greylisted). An errand leaves those that were never offered."""
        waiting = ledger.deferred[place]
        others = []
        while room and waiting and waiting[0][0] <= now:
            due, contact, attempt, of_server = heapq.heappop(waiting)
            if of_server not in (0, server_id):
                others.append((due, contact, attempt, of_server))
                continue
            self.late.append(now - due)
            if ledger is self.ledgers[URGENT]:
                self.urgent_late.append(now - due)
            ledger.offered.add((contact, attempt))
            room -= 1
            yield contact, attempt, of_server != 0
        for row in others:
            heapq.heappush(waiting, row)
        while room and ledger.pending[place] and not errand:
            room -= 1
            yield ledger.pending[place].pop(), 0, False

    def offer(self, ledger: Ledger, place: Place, contact: int, attempt: int, greylisted: bool, server_id: int, now: int) -> dict[str, int | str | None]:
        """What the destination says."""
        row: dict[str, int | str | None] = {"of_contact": contact, "shard": place[0], "of_provider": place[1], "was_deferred": int(bool(attempt))}
        # Whoever sends it and when: what is left at the end of the day does not depend on the order.
        drawn = random.Random(f"{SEED} {ledger.id} {contact} {attempt}").random()
        again = AGAIN if attempt else GREYLISTED + PUT_OFF
        if drawn >= again:
            return row | {"to": int(State.DELIVERED), "due": now, "of_server": server_id, "why": None}
        wait = min(self.sending.first_retry_seconds * 2**attempt, self.sending.last_retry_seconds)
        greylisted = greylisted if attempt else drawn < GREYLISTED
        ledger.defer(place, (now + wait, contact, attempt + 1, server_id if greylisted else 0))
        return row | {"to": int(State.DEFERRED), "due": now + wait, "of_server": server_id, "why": REASON if greylisted else None}

    def write(self, moves: dict[str, list[dict[str, int | str | None]]]) -> None:
        change = (
            sa.update(Delivery.__table__)
            .where(Delivery.contact_id == sa.bindparam("of_contact"))
            .values(state=sa.bindparam("to"), sort_key=sa.bindparam("due"), server_id=sa.bindparam("of_server"), reason=sa.bindparam("why"))
        )

        def work(connection: sa.Connection) -> None:
            for key, rows in moves.items():
                campaign_id = self.ledgers[key].id
                connection.execute(change.where(Delivery.campaign_id == campaign_id), rows)
                deltas: Counter[tuple[object, object, int]] = Counter()
                for row in rows:
                    deltas[row["shard"], row["of_provider"], int(State.DEFERRED if row["was_deferred"] else State.PENDING)] -= 1
                    deltas[row["shard"], row["of_provider"], int(str(row["to"]))] += 1
                self.count(connection, campaign_id, deltas)

        if moves:
            transact(self.world.engine, work)

    def count(self, connection: sa.Connection, campaign_id: int, deltas: Counter[tuple[object, object, int]]) -> None:
        rows = [
            {"campaign_id": campaign_id, "shard": shard, "provider": provider, "server_id": 0, "state": state, "count": count}
            for (shard, provider, state), count in deltas.items()
            if count
        ]
        add_to(connection, CampaignCounter, rows, column="count")

    def goes_on(self, session: Working, now: int) -> bool:
        """A session that has nothing to do waits for what is due soon, but not longer than that."""
        wait = self.ledgers[session.opening.campaign].next_due(session.server_id) - now
        return session.idle_since is None or max(wait, now - session.idle_since) <= self.sending.linger_seconds


def at(second: int) -> dt.datetime:
    return dt.datetime.fromtimestamp(second, dt.UTC)


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
@pytest.mark.timeout(600)
def test_a_day_of_40_servers_and_5_campaigns_makes_few_runs(engine: sa.Engine, tmp_path: Path) -> None:
    world = make_world(engine, tmp_path / "home", recipients=1)
    day = Day(world, Settings(home=tmp_path))
    day.prepare()
    now = day.begin
    while now < day.begin + 24 * 3600:
        seconds = TICK_SECONDS if now < day.begin + 4 * 3600 else CALM_TICK_SECONDS
        day.tick(now, seconds)
        now += seconds
    late = sorted(day.late)
    assert max(day.started.values()) <= MOST_RUNS_AN_HOUR
    assert late[int(len(late) * 0.9)] <= TICK_SECONDS
    assert late[-1] <= day.sending.session_seconds
    assert late[int(len(late) * 0.99)] <= CALM_TICK_SECONDS
    # Half an hour without errands.
    assert max(day.urgent_late) <= 2 * CALM_TICK_SECONDS
    assert 0 < day.errands < len(late) * 0.1
    # All but the last retries of some rows has been done.
    assert sum(ledger.open for ledger in day.ledgers.values()) < ROWS / 1000
    assert len(late) > ROWS * CAMPAIGNS * (GREYLISTED + PUT_OFF)
