"""The journal is rotated by logrotate, as on a real host, while Exim writes at full speed: no line is lost to any reader."""

from __future__ import annotations

import datetime as dt
import subprocess
import threading
from collections import Counter
from pathlib import Path

import pytest
import sqlalchemy as sa

from mail_pipelines import config
from mail_pipelines.database.models import State
from mail_pipelines.dispatch import audit
from mail_pipelines.dispatch.archive import Archive, Shipper
from mail_pipelines.dispatch.exim import instance
from mail_pipelines.dispatch.journal import Kind
from mail_pipelines.dispatch.session import journal_of
from tests.dispatch.sessions import SessionProcess
from tests.dispatch.test_audit import later
from tests.dispatch.test_crashes import check_promise, finish
from tests.dispatch.world import Servers, World, make_world, write_play
from tests.parts.processes import wait_for

pytestmark = [pytest.mark.server, pytest.mark.parametrize("database_url", ["mariadb"], indirect=True)]
ROOT = Path(__file__).resolve().parents[3]
# Of the bytes that the configuration keeps.
MOST_ROTATIONS = 90


class Logrotate:
    """The real program, with the configuration that is in `infra/`, told to rotate now."""

    def __init__(self, world: World, folder: Path) -> None:
        account = instance.account_for(instance.find_binary())
        text = (ROOT / "infra/logrotate/mail-pipelines").read_text()
        text = text.replace("/var/log/mail-pipelines/*", f"{world.settings.server.log_folder}/s1")
        assert "su Debian-exim Debian-exim" in text
        for debian, here in (
            ("su Debian-exim Debian-exim", f"su {account.user} {account.group}"),
            ("=Debian-exim --regid=Debian-exim", f"={account.user} --regid={account.group}"),
        ):
            text = text.replace(debian, here)
        self.configuration, self.state = folder / "logrotate.conf", folder / "logrotate.state"
        self.configuration.write_text(text)
        self.configuration.chmod(0o644)
        self.done = 0

    def rotate(self) -> None:
        done = subprocess.run(["/usr/sbin/logrotate", "--force", "--state", self.state, self.configuration], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        self.done += 1


@pytest.mark.parametrize("kind", ["exim", "burst"])
def test_nothing_is_lost_to_any_reader_while_the_log_is_rotated(engine: sa.Engine, tmp_path: Path, kind: str, running: Servers) -> None:
    """Sessions follow the log, one of them is killed, the settler settles, audits and the shipper read on, all while files are renamed."""
    recipients, connections = 1500, 6
    (tmp_path / "archive").mkdir()
    world = make_world(engine, tmp_path / "home", recipients=recipients, kind=kind)
    server = world.server("s1", connections=connections, per_second=250.0)
    exim = running.start(world, server, write_play(tmp_path / "play.toml", reply_seconds=[0.01, 0.1], refuse_percent=3))
    logrotate = Logrotate(world, tmp_path)
    journal = journal_of(world.folders("s1"), server.kind)
    shipper = Shipper(str(tmp_path / "archive"), "s1", world.folders("s1"), journal)
    over = threading.Event()
    totals: Counter[str] = Counter()

    def read_on() -> None:
        while not over.wait(0.3):
            totals.update(audit.run(engine, world.settings, server, journal, dt.datetime.now(dt.UTC)).numbers())
            shipper.ship(dt.datetime.now(dt.UTC).timestamp())

    def rotate() -> None:
        while not over.wait(0.15) and logrotate.done < MOST_ROTATIONS:
            logrotate.rotate()

    threads = [threading.Thread(target=read_on), threading.Thread(target=rotate)]
    for thread in threads:
        thread.start()
    try:
        run = SessionProcess(world, "s1", "run-1")
        wait_for(lambda: len(world.kept()) > recipients // 3 and logrotate.done > 5, what="sending")
        run.kill()
        finish(world, exim)
        # A session ends before the last line about its messages, "Completed", is written.
        wait_for(lambda: not exim.children(), what="the end of Exim's processes")
    finally:
        over.set()
        for thread in threads:
            thread.join()
    assert logrotate.done > 10
    last = audit.run(engine, world.settings, server, journal, later())
    totals.update(last.numbers())
    states = check_promise(world, recipients)
    ends = Counter(states.values())
    # Of the killed session.
    assert ends[State.UNKNOWN] <= connections * 4
    assert set(ends) <= {State.DELIVERED, State.BOUNCED, State.UNKNOWN}
    assert totals["gaps"] == totals["bad_lines"] == totals["alarms"] == 0
    assert last.disagreeing == Counter()
    # A few pieces at a time.
    while shipper.ship(later().timestamp()):
        pass
    archive, incarnation = Archive(str(tmp_path / "archive")), world.folders("s1").incarnation()
    pieces = archive.pieces("s1", incarnation)
    assert [piece.number for piece in pieces] == list(range(1, len(pieces) + 1))
    archived = b"".join(archive.read("s1", incarnation, piece) for piece in pieces)
    assert archived == b"".join(path.read_bytes() for _, path in journal.files())
    told = Counter(read.entry.outcome.kind for read in journal.read(archived) if read.entry is not None and read.entry.outcome is not None)
    assert told[Kind.DELIVERED] >= ends[State.DELIVERED]
    assert told[Kind.DELIVERED] <= len(world.copies())


def test_an_idle_server_keeps_its_log_and_a_rotated_one_is_shipped_once(engine: sa.Engine, tmp_path: Path, kind: str, running: Servers) -> None:
    world = make_world(engine, tmp_path / "home", recipients=20, kind=kind)
    world.settings = config.load()
    server = world.server("s1")
    exim = running.start(world, server, write_play(tmp_path / "play.toml"))
    logrotate = Logrotate(world, tmp_path)
    logrotate.rotate()
    journal = journal_of(world.folders("s1"), server.kind)
    assert journal.end().offset == 0
    # What is empty is left alone.
    logrotate.rotate()
    assert len(journal.files()) == 2
    finish(world, exim)
    assert world.states() == {State.DELIVERED: 20}
