"""A destination that takes long over the recipient: its message is sent late, unless somebody has decided otherwise meanwhile."""

from __future__ import annotations

import datetime as dt
import socketserver
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import sqlalchemy as sa

from mail_pipelines.contacts import consent
from mail_pipelines.database.engine import transact
from mail_pipelines.database.models import Contact, State
from mail_pipelines.dispatch.lane import OFFER_SECONDS
from tests.dispatch.test_session import session
from tests.dispatch.world import Servers, World, make_world, write_play
from tests.parts.processes import wait_for

pytestmark = [pytest.mark.server, pytest.mark.parametrize("database_url", ["mariadb"], indirect=True)]
# Longer than anything of a claim may be offered.
RECIPIENT_SECONDS = OFFER_SECONDS + 2
# Exim waits for 20 s.
LONGEST_SECONDS = 18.0
RECIPIENTS = 3


class Slow(socketserver.ThreadingTCPServer):
    """A destination that answers RCPT after `RECIPIENT_SECONDS`, and not before somebody has decided what becomes of the messages."""

    allow_reuse_address = daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Conversation)
        self.asked = 0
        self.decided = threading.Event()
        self.bodies: list[bytes] = []


class _Conversation(socketserver.StreamRequestHandler):
    server: Slow

    def handle(self) -> None:
        self.wfile.write(b"220 slow.test ESMTP\r\n")
        while line := self.rfile.readline():
            match line[:4].upper():
                case b"RCPT":
                    self.server.asked += 1
                    time.sleep(RECIPIENT_SECONDS)  # this is what the destination does
                    self.server.decided.wait(LONGEST_SECONDS - RECIPIENT_SECONDS)
                    self.wfile.write(b"250 2.1.5 Ok\r\n")
                case b"DATA":
                    self.wfile.write(b"354 Go on\r\n")
                    body = b""
                    while (line := self.rfile.readline()) not in (b".\r\n", b""):
                        body += line
                    if line:
                        self.server.bodies.append(body)
                        self.wfile.write(b"250 2.0.0 Ok\r\n")
                case b"QUIT":
                    self.wfile.write(b"221 2.0.0 Bye\r\n")
                    return
                case _:
                    self.wfile.write(b"250 slow.test\r\n")


@contextmanager
def slow_destination() -> Iterator[Slow]:
    with Slow() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def unsubscribe(world: World) -> None:
    everybody = range(1, RECIPIENTS + 1)
    transact(world.engine, lambda connection: consent.unsubscribe(connection, everybody, scope="all", now=dt.datetime.now(dt.UTC)))


@pytest.mark.parametrize(
    ("decide", "left"),
    [
        (lambda _: None, State.DELIVERED),
        (lambda world: world.set_campaign(state="paused"), State.PENDING),
        (unsubscribe, State.SUPPRESSED),
    ],
    ids=["nothing", "pause", "suppression"],
)
def test_a_late_message_goes_out_if_it_is_still_wanted(
    engine: sa.Engine, tmp_path: Path, running: Servers, decide: Callable[[World], None], left: State
) -> None:
    world = make_world(engine, tmp_path / "home", recipients=RECIPIENTS, kind="exim", reply_timeout_seconds=30)
    # Each has a domain of its own, so that none is held until another has been answered.
    address = sa.func.concat("person", Contact.id, "@slow", Contact.id, ".test")
    domain = sa.func.concat("slow", Contact.id, ".test")
    transact(engine, lambda connection: connection.execute(sa.update(Contact).values(email=address, address=address, domain=domain)))
    server = world.server(connections=RECIPIENTS)
    with slow_destination() as slow:
        port = slow.server_address[1]
        running.start(world, server, write_play(tmp_path / "play.toml"), *(f"slow{number}.test=127.0.0.1:{port}" for number in range(1, RECIPIENTS + 1)))
        thread = threading.Thread(target=lambda: session(world, server).run())
        thread.start()
        wait_for(lambda: slow.asked == RECIPIENTS, what="the destination is asked")
        decide(world)
        slow.decided.set()
        thread.join()
        assert world.states() == {left: RECIPIENTS}
        assert len(slow.bodies) == (RECIPIENTS if left is State.DELIVERED else 0)
    world.check_counters()
