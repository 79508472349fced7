"""Promise 1 when the disk of the journal fills up: at full speed, to its last byte, and so far that sending has to stop."""

from __future__ import annotations

import contextlib
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import sqlalchemy as sa

from mail_pipelines.database.engine import reading
from mail_pipelines.database.models import State
from mail_pipelines.dispatch import journal, servers
from tests.dispatch.sessions import SessionProcess
from tests.dispatch.test_crashes import check_promise, finish
from tests.dispatch.world import Servers, World, make_world, write_play
from tests.parts.processes import wait_for

pytestmark = [
    pytest.mark.server,
    pytest.mark.parametrize("database_url", ["mariadb"], indirect=True),
    pytest.mark.parametrize("kind", ["exim", "burst"]),
]

ONE = ("google.test",)
CONNECTIONS = 30
_PIECE = 4096


@contextmanager
def log_disk(folder: Path) -> Iterator[Callable[[int], contextlib.AbstractContextManager[None]]]:
    """A small file system for the journal; yields what leaves so many bytes of it free while a block runs."""
    folder.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={(journal.MIN_FREE_MB + 30) << 20},mode=755", "tmpfs", folder], check=True)

    @contextmanager
    def crowded(left: int) -> Iterator[None]:
        ballast = folder / "ballast"
        with ballast.open("wb", buffering=0) as file:
            with contextlib.suppress(OSError):
                while (free := shutil.disk_usage(folder).free) > left:
                    file.write(bytes(max(_PIECE, (free - left) // 2)))
            yield
        ballast.unlink()

    try:
        yield crowded
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


def shortage(world: World) -> str:
    """What the server's heartbeat says of its log disk."""
    with reading(world.engine) as connection:
        return servers.find(connection, "s1").shortage


def test_a_full_disk_leaves_in_doubt_only_what_was_at_destinations(
    engine: sa.Engine, tmp_path: Path, kind: str, running: Servers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All answers come while nothing can be written. The server itself goes on, says why nothing is sent, and settles."""
    monkeypatch.setenv("MAIL_PIPELINES_SERVER__HEARTBEAT_SECONDS", "1")
    # So many that much is still to be sent when the disk has been filled, however busy this machine is.
    recipients, times = 240, 2
    world = make_world(engine, tmp_path / "home", recipients=recipients, kind=kind, domains=ONE, linger_seconds=1, lease_seconds=20)
    with log_disk(world.folders("s1").log) as crowded:
        server = world.server("s1", connections=CONNECTIONS, per_second=200.0)
        exim = running.start(world, server, write_play(tmp_path / "play.toml", reply_seconds=[1.0, 2.0]))
        unknown = 0
        for number in range(times):
            before = len(world.kept())
            run = SessionProcess(world, "s1", f"run-{number}")
            wait_for(lambda before=before: len(world.kept()) > before + 20, what="sending")
            with crowded(0):
                run.process.join()
                wait_for(lambda: world.open_claims() == 0, what="settlement with a full disk")
                wait_for(lambda: shortage(world), what="a heartbeat that tells")
            assert exim.process.poll() is None
            now_unknown = world.states()[State.UNKNOWN]
            assert now_unknown - unknown <= CONNECTIONS, f"time {number}: {now_unknown - unknown} unknown"
            unknown = now_unknown
        assert unknown > 0, "no answer came while the disk was full: the test is too weak"
        finish(world, exim)
        states = check_promise(world, recipients)
        assert set(states.values()) == {State.DELIVERED, State.UNKNOWN}
        assert sum(state is State.UNKNOWN for state in states.values()) == unknown
        assert len(world.copies()) + unknown >= recipients
        wait_for(lambda: not shortage(world), what="a heartbeat that tells of the room")


def test_sending_stops_while_there_is_room_for_what_is_under_way(engine: sa.Engine, tmp_path: Path, kind: str, running: Servers) -> None:
    recipients = 100
    world = make_world(engine, tmp_path / "home", recipients=recipients, kind=kind, domains=ONE, linger_seconds=1)
    with log_disk(world.folders("s1").log) as crowded:
        # Slow, so that most are still to be sent when the disk has been filled, however busy this machine is.
        server = world.server("s1", connections=CONNECTIONS, per_second=4.0)
        exim = running.start(world, server, write_play(tmp_path / "play.toml", reply_seconds=[0.1, 0.5]))
        run = SessionProcess(world, "s1", "run")
        wait_for(lambda: len(world.kept()) > 10, what="sending")
        # More than Exim itself wants to have.
        with crowded((journal.MIN_FREE_MB - 20) << 20):
            assert re.search(rf"the log disk of s1 has \d\d MB free, fewer than {journal.MIN_FREE_MB}", run.wait())
            states = world.states()
        assert set(states) == {State.DELIVERED, State.PENDING}
        assert states[State.DELIVERED] == len(world.copies())
        world.limit(connections=CONNECTIONS, per_second=200.0)
        finish(world, exim)
        assert world.states() == {State.DELIVERED: recipients}
        assert world.copies() == dict.fromkeys(range(1, recipients + 1), 1)
