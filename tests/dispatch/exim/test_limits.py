"""Promise 3 at the far end: four session processes of two campaigns on one server, and each of the four kinds of limit at a provider of its own."""

from __future__ import annotations

import asyncio
import functools
import itertools
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import sqlalchemy as sa

from mail_pipelines.database.engine import transact
from mail_pipelines.database.models import Campaign, Delivery, State
from mail_pipelines.delivery import counters
from mail_pipelines.dispatch import servers
from tests.dispatch.sessions import SessionProcess
from tests.dispatch.world import Servers, make_world, write_play
from tests.parts.processes import wait_for

pytestmark = [pytest.mark.server, pytest.mark.parametrize("database_url", ["mariadb"], indirect=True)]
# Of each campaign; a quarter is at each provider.
RECIPIENTS = 120
OF_PROVIDER = 2 * RECIPIENTS // 4
CONNECTIONS, PER_SECOND, PER_HOUR, PER_DAY = 2, 5.0, 7, 9
REPLY_SECONDS = 0.1
HOUR, DAY = 3600, 86400
# Beside its turn, a message may wait for the reply to the one before it.
LATE_SECONDS = 1.0
# And where the destination stands still so many wait for it at once.
MOST_WAITING = 4
WINDOW_SECONDS = 4


@dataclass
class Destination:
    """A destination that counts: when each message came, and how many connections were in use at once at most."""

    port: int = 0
    messages: list[float] = field(default_factory=list)
    open: int = 0
    most: int = 0

    async def talk(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        # Counted from the greeting on: whoever ended a connection before opening this one has been heard by then.
        greeted = False
        writer.write(b"220 counts\r\n")
        try:
            while line := await reader.readline():
                match line[:4].upper():
                    case b"EHLO" if not greeted:
                        greeted = True
                        self.open += 1
                        self.most = max(self.most, self.open)
                        writer.write(b"250-counts\r\n250 PIPELINING\r\n")
                    case b"DATA":
                        writer.write(b"354 go on\r\n")
                        await reader.readuntil(b"\r\n.\r\n")
                        self.messages.append(time.time())
                        await asyncio.sleep(REPLY_SECONDS)  # this is what the destination does
                        writer.write(b"250 2.0.0 kept\r\n")
                    case b"QUIT":
                        break
                    case _:
                        writer.write(b"250 2.0.0 ok\r\n")
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            self.open -= greeted
            writer.close()

    def most_within(self, seconds: float) -> int:
        return max(sum(start <= moment < start + seconds for moment in self.messages) for start in self.messages)

    def windows(self, length: int, begin: float) -> int:
        """In how many hours or days this has gone on."""
        return int(time.time() // length - begin // length) + 1


@contextmanager
def listening() -> Iterator[Destination]:
    destination = Destination()
    loop = asyncio.new_event_loop()
    listener = loop.run_until_complete(asyncio.start_server(destination.talk, "127.0.0.1", 0))
    destination.port = listener.sockets[0].getsockname()[1]
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        yield destination
    finally:
        listener.close()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()


def second_campaign(connection: sa.Connection) -> None:
    """One to the same recipients."""
    given = dict(connection.execute(sa.select(Campaign.__table__).where(Campaign.id == 1)).mappings().one())
    connection.execute(sa.insert(Campaign).values(given | {"id": 2, "key": "summer"}))
    rows = [dict(row) | {"campaign_id": 2} for row in connection.execute(sa.select(Delivery.__table__)).mappings()]
    connection.execute(sa.insert(Delivery), rows)
    providers = {str(row["provider"]) for row in rows}
    moves = {(0, provider, State.PENDING, ""): sum(row["provider"] == provider for row in rows) for provider in providers}
    counters.add(connection, 2, counters.CENTRE, moves, given["created_at"])


@pytest.mark.parametrize("kind", ["exim", "burst"])
def test_two_campaigns_in_four_processes_exceed_no_limit_of_a_provider(engine: sa.Engine, tmp_path: Path, running: Servers, kind: str) -> None:
    spring = make_world(engine, tmp_path / "home", recipients=RECIPIENTS, kind=kind)
    transact(engine, second_campaign)
    summer = replace(spring, campaign_id=2, campaign_key="summer")
    server = spring.server()
    mode = {"mode": "burst" if kind == "burst" else "cutthrough", "connections": 10, "per_second": 500.0}
    limits = {
        "google": {"connections": CONNECTIONS},
        "microsoft": {"per_second": PER_SECOND, "connections": MOST_WAITING},
        "yahoo": {"per_hour": PER_HOUR},
        "other": {"per_day": PER_DAY},
    }
    for provider, limit in limits.items():
        servers.set_limits(engine, "s1", provider, mode | limit)
    for campaign in (spring, summer):
        campaign.grant(server)
    with ExitStack() as stack:
        at = {name: stack.enter_context(listening()) for name in ("google", "microsoft", "yahoo", "small")}
        running.start(spring, server, write_play(tmp_path / "play.toml"), *(f"{name}.test=127.0.0.1:{there.port}" for name, there in at.items()))
        begin = time.time()
        ids = itertools.count(1)
        start = [functools.partial(SessionProcess, campaign, "s1") for campaign in (spring, summer) for _ in range(2)]
        sessions = [one(f"run-{next(ids)}") for one in start]

        def all_sent() -> bool:
            """Sessions that have ended are asked for again meanwhile, as the sensor does."""
            for number, session in enumerate(sessions):
                if not session.process.is_alive():
                    sessions[number] = start[number](f"run-{next(ids)}")
            return all(len(there.messages) >= number for there, number in zip(at.values(), least, strict=True))

        least = [OF_PROVIDER, OF_PROVIDER, PER_HOUR, PER_DAY]
        wait_for(all_sent, what=lambda: f"all but the rest: {at}")
        for session in sessions:
            session.wait()
        hours, days = at["yahoo"].windows(HOUR, begin), at["small"].windows(DAY, begin)
    assert at["google"].most == CONNECTIONS
    assert at["microsoft"].most_within(WINDOW_SECONDS) <= PER_SECOND * (WINDOW_SECONDS + LATE_SECONDS) + 1
    assert PER_HOUR <= len(at["yahoo"].messages) <= PER_HOUR * hours
    assert PER_DAY <= len(at["small"].messages) <= PER_DAY * days
    assert spring.states() + summer.states() == {
        State.DELIVERED: sum(len(there.messages) for there in at.values()),
        State.PENDING: 2 * RECIPIENTS - sum(len(there.messages) for there in at.values()),
    }
    assert spring.open_claims() == 0
    spring.check_counters()
    summer.check_counters()
