"""Failure scenario 4 (d): a server is gone when a backup is restored, and its log is read from the archive."""

from __future__ import annotations

import datetime as dt
import os
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa

from mail_pipelines import config
from mail_pipelines.commands import context
from mail_pipelines.database.engine import reading
from mail_pipelines.database.models import Server, State
from mail_pipelines.dispatch import audit, registry
from mail_pipelines.dispatch.archive import Archive, ArchiveError, Piece, Shipper
from mail_pipelines.dispatch.files import boot_id
from mail_pipelines.dispatch.recovery import steps
from mail_pipelines.dispatch.recovery.standing import Part
from mail_pipelines.dispatch.registry import ServerStateError
from mail_pipelines.dispatch.session import journal_of
from tests.dispatch.test_audit import Log, later
from tests.dispatch.test_hold_commands import says
from tests.dispatch.test_recovery import part, recover, row
from tests.dispatch.world import World, make_world
from tests.parts.backups import Backup

NOW = dt.datetime.now(dt.UTC)
# When a backup was made, long ago by the time of the pieces.
BACKUP = NOW - dt.timedelta(hours=3)


@pytest.fixture(autouse=True)
def _settings_of_this_test() -> Iterator[None]:
    context.settings.cache_clear()
    yield
    context.settings.cache_clear()


@pytest.fixture
def archive_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "archive"
    folder.mkdir()
    monkeypatch.setenv("MAIL_PIPELINES_SERVER__LOG_ARCHIVE", str(folder))
    return folder


@pytest.fixture
def world(engine: sa.Engine, tmp_path: Path, archive_folder: Path) -> World:
    world = make_world(engine, tmp_path / "home", recipients=20, kind="exim")
    world.settings = config.load()
    return world


class Shipped:
    """A server `s1` whose log is written by hand, shipped piece by piece; `beat` is its heartbeat."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.server = world.server("s1")
        self.folders = world.folders("s1")
        self.folders.journal.touch()
        self.log = Log(world, self.server)
        self.journal = journal_of(self.folders, "exim")
        self.shipper = Shipper(world.settings.server.log_archive, "s1", self.folders, self.journal)
        self.archive = Archive(world.settings.server.log_archive)
        self.beat(BACKUP)

    def beat(self, at: dt.datetime) -> None:
        end = self.journal.end()
        self.world.set_server("s1", heartbeat_at=at, boot_id=boot_id(), health={"journal": [end.inode, end.offset], **self.shipper.standing()})

    def delivered(self, *contact_ids: int) -> None:
        for contact_id in contact_ids:
            self.log.delivered(contact_id)
        self.is_of_today()

    def is_of_today(self) -> None:
        """The log written by hand is of another day."""
        text = self.folders.journal.read_text().replace("2026-11-24 12:15:42.927", NOW.strftime("%Y-%m-%d %H:%M:%S.000"))
        self.folders.journal.write_text(text)

    def ship(self, at: dt.datetime | None = None) -> None:
        now = (at or dt.datetime.now(dt.UTC)).timestamp()
        # Nobody writes any more.
        for _, path in self.journal.files():
            os.utime(path, (now - 10, now - 10))
        self.shipper.ship(now)

    def rotate(self) -> None:
        self.folders.journal.rename(f"{self.folders.journal}.1")
        self.folders.journal.touch()

    def retire(self) -> None:
        audit.run(self.world.engine, self.world.settings, self.server, self.journal, later())
        self.beat(dt.datetime.now(dt.UTC))
        says("server", "drain", "s1")
        assert says("server", "retire", "s1") == "server s1 is retired\n"

    def pieces(self) -> list[tuple[Path, Piece]]:
        folder = Path(self.world.settings.server.log_archive) / "s1" / self.folders.incarnation()
        return [(folder / piece.name, piece) for piece in self.archive.pieces("s1", self.folders.incarnation())]

    def is_destroyed(self) -> None:
        """Host and log are gone."""
        for path in self.folders.log.iterdir():
            path.unlink()

    def lose(self) -> tuple[Part, str]:
        steps.begin(self.world.engine, NOW)
        steps.lose(self.world.engine, self.world.settings, "s1")
        found = part(self.world, self.server)
        return found.part, found.note or ""


@pytest.fixture
def s1(world: World) -> Shipped:
    return Shipped(world)


def test_a_lost_servers_archive_is_taken_over_and_the_rest_is_in_doubt(s1: Shipped) -> None:
    """Its last seconds were not shipped: recipient 4 was mailed, too."""
    backup = Backup(s1.world.engine)
    s1.delivered(1, 2)
    s1.ship()
    s1.delivered(3)
    s1.ship()
    s1.delivered(4)
    s1.is_destroyed()
    backup.restore(s1.world.engine)
    assert s1.lose() == (Part.INCOMPLETE, "from the archive; the end of its log was not shipped")
    report = steps.finish(s1.world.engine, s1.world.settings, NOW)
    assert report.ends == {"spring": Counter({State.DELIVERED: 3})}
    assert (report.uncovered, report.doubtful) == (["s1"], 17)
    assert s1.world.states() == Counter({State.DELIVERED: 3, State.UNKNOWN: 17})
    s1.world.check_counters()


def test_of_a_server_that_was_retired_nothing_is_in_doubt(s1: Shipped) -> None:
    backup = Backup(s1.world.engine)
    s1.delivered(1, 2)
    s1.ship()
    s1.rotate()
    s1.delivered(3)
    s1.ship()
    s1.log.intent(5)
    s1.is_of_today()
    s1.ship()
    s1.retire()
    s1.is_destroyed()
    backup.restore(s1.world.engine)
    assert "s1 has read 4 offers in its log (from the archive)" in recover("--lost", "s1")
    assert row(s1.world, 3)[:3] == (State.DELIVERED, 0, 250)
    assert s1.world.states() == Counter({State.DELIVERED: 3, State.UNKNOWN: 1, State.PENDING: 16})
    with reading(s1.world.engine) as connection:
        assert connection.execute(sa.select(Server.state)).scalar_one() == "retired"
    s1.world.check_counters()


@pytest.mark.parametrize(
    ("what", "note"),
    [
        ("piece", "pieces are missing"),
        ("first", "it begins later than the backup"),
        ("boot", "the host was started again"),
        ("incarnation", "its log folder was replaced"),
        ("end", "the end of its log was not shipped"),
        ("rotated", "pieces are missing"),
    ],
)
def test_an_archive_that_lacks_something_proves_nothing(s1: Shipped, what: str, note: str) -> None:
    audit.run(s1.world.engine, s1.world.settings, s1.server, s1.journal, NOW)
    backup = Backup(s1.world.engine)
    for contact_id in (1, 2, 3):
        s1.delivered(contact_id)
        s1.ship()
        if what == "rotated" and contact_id == 1:
            # Gone before it was shipped.
            s1.rotate()
            s1.delivered(9)
            for path in s1.folders.log.glob("main.log*"):
                path.unlink()
            s1.folders.journal.touch()
    if what == "boot":
        s1.world.set_server("s1", boot_id="another")
    s1.retire()
    if what == "boot":
        s1.archive.close("s1", s1.folders.incarnation(), "another")
    pieces = s1.pieces()
    if what in ("piece", "first", "end"):
        pieces[{"piece": 1, "first": 0, "end": -1}[what]][0].unlink()
    backup.restore(s1.world.engine)
    if what == "incarnation":
        s1.world.set_server("s1", incarnation="00000000-0000-0000-0000-000000000000")
    found, told = s1.lose()
    assert found is Part.INCOMPLETE
    assert note in told
    report = steps.finish(s1.world.engine, s1.world.settings, NOW)
    assert State.PENDING not in s1.world.states()
    assert report.ends["spring"][State.DELIVERED] == (2 if what in ("piece", "first", "end") else 3)


def test_a_gap_from_before_the_backup_does_not_matter(s1: Shipped) -> None:
    long_before = BACKUP - dt.timedelta(hours=5)
    for contact_id in (1, 2, 3):
        s1.delivered(contact_id)
        s1.ship(long_before)
    backup = Backup(s1.world.engine)
    s1.delivered(4)
    s1.ship()
    s1.retire()
    s1.pieces()[1][0].unlink()
    backup.restore(s1.world.engine)
    assert s1.lose() == (Part.READ, "from the archive")


def test_what_two_processes_have_shipped_is_read_once(s1: Shipped) -> None:
    """The first process was stopped for a while and went on, when another had taken its place."""
    backup = Backup(s1.world.engine)
    s1.delivered(1)
    s1.ship()
    other = Shipper(s1.world.settings.server.log_archive, "s1", s1.folders, s1.journal)
    s1.delivered(2)
    data = s1.folders.journal.read_bytes()
    first = s1.pieces()[0][1]
    s1.archive.put("s1", s1.folders.incarnation(), Piece(2, int(time.time()), first.inode, first.end.offset, 0), b"")
    assert other.ship(time.time() + 10) == 1
    whole = Piece(2, int(time.time()), first.inode, 0, len(data))
    s1.archive.put("s1", s1.folders.incarnation(), whole, data)
    s1.shipper = other
    s1.ship()
    s1.retire()
    backup.restore(s1.world.engine)
    assert s1.lose() == (Part.READ, "from the archive")
    assert steps.finish(s1.world.engine, s1.world.settings, NOW).ends == {"spring": Counter({State.DELIVERED: 2})}


def test_without_anything_in_the_archive_the_server_is_lost(s1: Shipped, archive_folder: Path) -> None:
    assert s1.lose() == (Part.LOST, "the archive has nothing of it since the backup")


def test_an_archive_that_is_away_gives_nobody_up(s1: Shipped, archive_folder: Path) -> None:
    s1.delivered(1)
    s1.ship()
    away = archive_folder.rename(f"{archive_folder}.away")
    with pytest.raises(ArchiveError, match="is not there: make the folder, or mount the disk"):
        s1.lose()
    assert part(s1.world, s1.server).part is Part.AWAITED
    away.rename(archive_folder)
    assert s1.lose()[0] is Part.INCOMPLETE


# --- retirement ---------------------------------------------------------------------------------------------------


def test_retirement_waits_for_the_archive(s1: Shipped, archive_folder: Path) -> None:
    s1.delivered(1)
    audit.run(s1.world.engine, s1.world.settings, s1.server, s1.journal, later())
    says("server", "drain", "s1")
    s1.ship()
    s1.delivered(2)
    audit.run(s1.world.engine, s1.world.settings, s1.server, s1.journal, later())
    s1.beat(dt.datetime.now(dt.UTC))
    assert "the end of its log is not in the archive yet" in says("server", "show", "s1")
    with pytest.raises(ServerStateError, match="the end of its log is not in the archive yet"):
        says("server", "retire", "s1")
    away = archive_folder.rename(f"{archive_folder}.away")
    s1.shipper.look(time.time() + 3600)
    s1.beat(dt.datetime.now(dt.UTC))
    with pytest.raises(ServerStateError, match=r"the log archive .* is not there"):
        says("server", "retire", "s1")
    away.rename(archive_folder)
    s1.ship()
    s1.shipper.look(time.time() + 7200)
    s1.beat(dt.datetime.now(dt.UTC))
    assert ", to its end" in says("server", "show", "s1")
    archive_folder.rename(away)
    with pytest.raises(ArchiveError, match=r"server s1 is retired, but that is not in the archive: .* Repeat this while its process still runs"):
        says("server", "retire", "s1")
    away.rename(archive_folder)
    assert s1.archive.closed("s1", s1.folders.incarnation()) is None
    says("server", "retire", "s1")
    closed = s1.archive.closed("s1", s1.folders.incarnation())
    assert closed is not None
    assert closed.last == s1.pieces()[-1][1].name


def test_of_a_lost_server_retirement_closes_nothing(s1: Shipped) -> None:
    s1.delivered(1)
    s1.ship()
    s1.beat(dt.datetime.now(dt.UTC) - dt.timedelta(hours=1))
    says("server", "retire", "s1", "--lost")
    with pytest.raises(ServerStateError, match="it is silent"):
        registry.retire(s1.world.engine, "s1", 10, s1.archive)
    assert s1.archive.closed("s1", s1.folders.incarnation()) is None
