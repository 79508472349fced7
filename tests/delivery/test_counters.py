"""Counters add up whatever the order of changes, and each outcome is counted in its minute."""

from __future__ import annotations

import datetime as dt
import random
import threading
from collections import Counter

import sqlalchemy as sa
from sqlalchemy import event

from mail_pipelines.database.engine import reading, transact
from mail_pipelines.database.models import CampaignCounter, CampaignMinute, State
from mail_pipelines.delivery import counters
from mail_pipelines.delivery.counters import Place

NOW = dt.datetime(2026, 3, 1, 9, 30, 15, tzinfo=dt.UTC)


def states(engine: sa.Engine, campaign_id: int = 1) -> dict[tuple[int, str, int, State], int]:
    with reading(engine) as connection:
        rows = connection.execute(sa.select(CampaignCounter.__table__).where(CampaignCounter.campaign_id == campaign_id))
        return {(row.shard, row.provider, row.server_id, State(row.state)): row.count for row in rows}


def minutes(engine: sa.Engine) -> dict[tuple[int, str, State, str], int]:
    with reading(engine) as connection:
        return {(row.minute, row.provider, State(row.state), row.reason): row.count for row in connection.execute(sa.select(CampaignMinute.__table__))}


def test_deltas_of_many_changes_sum_up(engine: sa.Engine) -> None:
    chance = random.Random(7)
    expected: Counter[tuple[int, str, int, State]] = Counter()
    for _ in range(30):
        moves: dict[Place, int] = {}
        server = chance.randint(0, 2)
        for _ in range(chance.randint(1, 20)):
            place = (chance.randint(0, 3), chance.choice(["google", "other"]), chance.choice(list(State)), chance.choice(["", "mailbox-full"]))
            moves[place] = moves.get(place, 0) + chance.randint(-5, 5)
        for (shard, provider, state, _), delta in moves.items():
            expected[shard, provider, server, state] += delta
        transact(engine, lambda connection, moves=moves, server=server: counters.add(connection, 1, server, moves, NOW))
    found = states(engine)
    assert {key: value for key, value in found.items() if value} == {key: value for key, value in expected.items() if value}


def test_only_arrivals_at_an_outcome_count_in_the_minute(engine: sa.Engine) -> None:
    def work(connection: sa.Connection) -> None:
        counters.add(
            connection,
            1,
            4,
            {
                (0, "google", State.CLAIMED, ""): -5,
                (0, "google", State.PENDING, ""): 1,
                (0, "google", State.DELIVERED, ""): 2,
                (1, "google", State.DELIVERED, ""): 1,
                (0, "google", State.BOUNCED, "mailbox-unknown"): 1,
                (0, "google", State.DEFERRED, "greylisted"): 1,
                (0, "google", State.DEFERRED, ""): -1,
            },
            NOW,
        )

    transact(engine, work)
    minute = int(NOW.timestamp()) // 60
    assert minutes(engine) == {
        (minute, "google", State.DELIVERED, ""): 3,
        (minute, "google", State.BOUNCED, "mailbox-unknown"): 1,
        (minute, "google", State.DEFERRED, "greylisted"): 1,
    }
    assert states(engine)[0, "google", 4, State.CLAIMED] == -5
    assert (0, "google", 4, State.DEFERRED) not in states(engine)


def test_a_change_without_rows_writes_nothing(engine: sa.Engine) -> None:
    transact(engine, lambda connection: counters.add(connection, 1, 0, {(0, "google", State.PENDING, ""): 0}, NOW))
    assert states(engine) == {}
    assert minutes(engine) == {}


def test_a_change_of_many_places_is_one_statement_for_the_server(engine: sa.Engine) -> None:
    """Not a statement for each place: on MariaDB the server's own count of statements is asked."""
    moves: dict[Place, int] = {(shard, f"provider-{number}", State.PENDING, ""): 1 for shard in range(64) for number in range(20)}
    sent: list[bool] = []
    event.listen(engine, "before_cursor_execute", lambda *arguments: sent.append(arguments[5]))

    def work(connection: sa.Connection) -> int:
        def inserts() -> int:
            return 0 if engine.dialect.name == "sqlite" else int(connection.exec_driver_sql("SHOW SESSION STATUS LIKE 'Com_insert'").one()[1])

        before = inserts()
        del sent[:]
        counters.add(connection, 1, 0, moves, NOW)
        assert sent == [True]
        return inserts() - before

    assert transact(engine, work) <= 2
    assert sum(states(engine).values()) == 1280


def test_writers_of_the_same_places_lose_nothing(engine: sa.Engine) -> None:
    def write(number: int) -> None:
        chance = random.Random(number)
        places: list[Place] = [(shard, provider, State.DELIVERED, "") for shard in range(4) for provider in ("google", "other")]
        for _ in range(10):
            chance.shuffle(places)
            moves = dict.fromkeys(places, 1)
            transact(engine, lambda connection, moves=moves: counters.add(connection, 1, 0, moves, NOW))

    writers = [threading.Thread(target=write, args=(number,)) for number in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert set(states(engine).values()) == {40}
    assert sum(minutes(engine).values()) == 320
