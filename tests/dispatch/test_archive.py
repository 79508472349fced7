"""The archive of logs: what a server has logged is there, whole and once, whatever is killed, away or full."""

from __future__ import annotations

import datetime as dt
import itertools
import multiprocessing
import os
import random
import stat
import subprocess
import time
from pathlib import Path

import pytest

from mail_pipelines.config import ServerSettings
from mail_pipelines.dispatch import archive, last_error, tail
from mail_pipelines.dispatch.archive import Archive, ArchiveError, Piece, Shipper
from mail_pipelines.dispatch.exim import log
from mail_pipelines.dispatch.files import ServerFolders
from mail_pipelines.dispatch.journal import Journal
from tests.parts.processes import wait_for

# Nothing was added to a file for a while.
LATER = 3600.0


class Log:
    """The log of a server `mx1`, and its shipper."""

    def __init__(self, home: Path, url: str) -> None:
        self.url = url
        self.folders = ServerFolders.of(ServerSettings(run_folder=str(home / "run"), log_folder=str(home / "log"), mail_folder=str(home / "mail")), "mx1")
        self.folders.log.mkdir(parents=True, exist_ok=True)
        self.incarnation = self.folders.incarnation()
        self.journal = Journal(self.folders.journal, log.parse, log.continues, log.scan)
        self.written = bytearray()
        self.shipper = self.restart()

    def restart(self) -> Shipper:
        self.shipper = Shipper(self.url, "mx1", self.folders, self.journal)
        return self.shipper

    def write(self, count: int = 1) -> None:
        """Records of two lines."""
        begin = len(self.written)
        for number in range(count):
            self.written += b"2026-11-24 12:15:42.927 [77] record %d of an answer: 250-first\n250 second\n" % (begin + number)
        with self.folders.journal.open("ab") as file:
            file.write(self.written[begin:])

    def rotate(self) -> None:
        files = self.journal.files()
        for number, (_, path) in sorted(enumerate(reversed(files), 1), reverse=True):
            path.rename(f"{self.folders.journal}.{number}")
        self.folders.journal.touch()

    def ship(self) -> int:
        return self.shipper.ship(time.time() + LATER)

    @property
    def archive(self) -> Archive:
        return Archive(self.url)

    def pieces(self) -> list[Piece]:
        return self.archive.pieces("mx1", self.incarnation)

    def archived(self) -> bytes:
        return b"".join(self.archive.read("mx1", self.incarnation, piece) for piece in self.pieces())

    def has_gap(self) -> bool:
        pieces = self.pieces()
        return not all(piece.follows(before) for before, piece in itertools.pairwise(pieces))


@pytest.fixture(params=["folder", "url"])
def served(request: pytest.FixtureRequest, tmp_path: Path) -> Log:
    folder = tmp_path / "archive"
    folder.mkdir()
    # Also a file system that knows neither modes nor fsync.
    return Log(tmp_path, str(folder) if request.param == "folder" else f"memory://{tmp_path}/archive")


@pytest.fixture
def mx1(tmp_path: Path) -> Log:
    (tmp_path / "archive").mkdir()
    return Log(tmp_path, str(tmp_path / "archive"))


def test_the_archive_has_the_log_once_across_rotation_and_restarts(served: Log) -> None:
    for step in range(6):
        served.write(1 + step)
        if step in (2, 3):
            served.rotate()
        served.ship()
        assert served.ship() == 0
        if step % 2:
            served.restart()
    served.rotate()
    served.ship()
    assert served.archived() == served.written
    assert not served.has_gap()
    assert [piece.number for piece in served.pieces()] == list(range(1, len(served.pieces()) + 1))
    assert served.shipper.standing()["shipped"]["end"] == [served.journal.end().inode, 0]


def test_a_record_that_may_go_on_waits(mx1: Log) -> None:
    mx1.write(3)
    mx1.shipper.ship(time.time())
    assert mx1.written.startswith(mx1.archived())
    assert mx1.archived().endswith(b"250 second\n")
    assert mx1.archived() != mx1.written
    mx1.ship()
    assert mx1.archived() == mx1.written


def test_large_logs_come_in_pieces(mx1: Log) -> None:
    mx1.write(3 * archive.PIECE_BYTES // 80)
    while mx1.ship():
        pass
    assert mx1.archived() == mx1.written
    assert all(piece.size >= archive.PIECE_BYTES for piece in mx1.pieces()[:-1])
    assert all(piece.size <= archive.PIECE_BYTES + tail.BLOCK_BYTES for piece in mx1.pieces())


def test_nobody_else_can_read_it(mx1: Log) -> None:
    before = os.umask(0)
    try:
        mx1.write()
        mx1.ship()
        mx1.archive.close("mx1", mx1.incarnation, None)
    finally:
        os.umask(before)
    found = list(Path(mx1.url).rglob("*"))
    assert {stat.S_IMODE(path.stat().st_mode) for path in found if path.is_file()} == {0o600}
    assert {stat.S_IMODE(path.stat().st_mode) for path in found if path.is_dir()} == {0o700}


def test_a_piece_is_due_after_a_minute_or_four_megabytes(mx1: Log) -> None:
    now = time.time() + LATER
    mx1.write()
    mx1.shipper.look(now)
    mx1.write()
    mx1.shipper.look(now + archive.PIECE_SECONDS / 2)
    assert len(mx1.pieces()) == 1
    mx1.shipper.look(now + archive.PIECE_SECONDS)
    assert len(mx1.pieces()) == 2
    mx1.write(archive.PIECE_BYTES // 70)
    mx1.shipper.look(now + archive.PIECE_SECONDS + 1)
    assert mx1.archived() == mx1.written


def test_a_clock_that_is_set_back_holds_no_piece_up(mx1: Log) -> None:
    now = time.time() + LATER
    mx1.write()
    mx1.shipper.look(now)
    mx1.write()
    mx1.shipper.look(now - 600)
    assert mx1.archived() == mx1.written
    mx1.write()
    mx1.shipper.look(now - 600 + archive.PIECE_SECONDS / 2)
    assert len(mx1.pieces()) == 2


def _ship_for_ever(home: str, url: str) -> None:
    mx1 = Log(Path(home), url)
    while True:
        mx1.ship()


def test_a_killed_shipper_leaves_no_half_piece_no_gap_and_nothing_twice(mx1: Log, tmp_path: Path) -> None:
    """Killed at any moment, while the log grows and is rotated."""
    dice = random.Random(7)
    processes = multiprocessing.get_context("fork")
    shipped = 0
    for number in range(25):
        process = processes.Process(target=_ship_for_ever, args=(str(tmp_path), mx1.url), daemon=True)
        process.start()
        mx1.write(400)
        wait_for(lambda shipped=shipped: len(mx1.pieces()) > shipped, what="a piece")
        for _ in range(dice.randrange(60)):
            mx1.write(dice.randrange(1, 900))
        process.kill()
        process.join()
        shipped = len(mx1.pieces())
        assert mx1.written.startswith(mx1.archived())
        if number % 6 == 5:
            mx1.rotate()
    mx1.restart()
    while mx1.ship():
        pass
    assert mx1.archived() == mx1.written
    assert not mx1.has_gap()


def test_an_archive_that_goes_away_is_told_and_gets_everything_when_it_is_back(mx1: Log) -> None:
    now = time.time() + LATER
    mx1.write()
    mx1.shipper.look(now)
    away = Path(mx1.url).rename(f"{mx1.url}.away")
    mx1.write()
    mx1.shipper.look(now + 60)
    error = last_error.read(mx1.folders)
    assert error is not None
    assert error["what"] == "log archive"
    assert "is not there: make the folder, or mount the disk that it is on" in error["text"]
    assert mx1.shipper.standing()["shipped"]["error"] == error["text"]
    assert not Path(mx1.url).exists()
    away.rename(mx1.url)
    mx1.write()
    mx1.rotate()
    mx1.write()
    # Not before a minute is over.
    mx1.shipper.look(now + 90)
    assert len(mx1.pieces()) == 1
    mx1.shipper.look(now + 120)
    assert mx1.archived() == mx1.written
    assert not mx1.has_gap()
    assert mx1.shipper.standing()["shipped"]["error"] is None


def test_a_full_archive_is_told_and_leaves_no_half_piece(mx1: Log, tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", small], check=True)
    try:
        mx1.url = str(small)
        mx1.restart()
        for _ in range(200):
            with mx1.folders.journal.open("ab") as file:
                text = b"2026-11-24 12:15:42.927 [77] %s\n" % os.urandom(400).hex().encode()
                file.write(text)
                mx1.written += text
        (small / "ballast").write_bytes(bytes(20_000))
        mx1.shipper.look(time.time() + LATER)
        assert "No space left on device" in str(mx1.shipper.standing()["shipped"]["error"])
        assert mx1.pieces() == []
        subprocess.run(["mount", "-o", "remount,size=1m", small], check=True)
        mx1.shipper.look(time.time() + 2 * LATER)
        assert mx1.archived() == mx1.written
    finally:
        subprocess.run(["umount", "--lazy", small], check=True)


def test_an_archive_that_comes_back_empty_gets_all_that_is_left(mx1: Log) -> None:
    mx1.write(3)
    mx1.ship()
    Path(mx1.url).rename(f"{mx1.url}.old")
    Path(mx1.url).mkdir()
    mx1.write()
    mx1.ship()
    assert mx1.archived() == mx1.written


def test_what_is_gone_before_it_was_shipped_leaves_a_number_out(mx1: Log) -> None:
    mx1.write()
    mx1.ship()
    mx1.rotate()
    mx1.write()
    mx1.rotate()
    mx1.write()
    for path in mx1.folders.log.glob("main.log.*"):
        path.unlink()
    mx1.ship()
    assert [piece.number for piece in mx1.pieces()] == [1, 3]
    assert mx1.has_gap()


def test_another_file_with_the_same_inode_is_not_gone_on_with(mx1: Log) -> None:
    """As where a server was off for so long that its old files are gone, and their inodes are given again."""
    mx1.write(5)
    mx1.ship()
    mx1.folders.journal.write_bytes(mx1.written.replace(b"77", b"78") * 2)
    mx1.restart()
    mx1.ship()
    assert [(piece.number, piece.offset) for piece in mx1.pieces()] == [(1, 0), (3, 0)]
    assert mx1.has_gap()


def test_pieces_are_kept_for_some_time(served: Log) -> None:
    served.write()
    served.ship()
    served.write()
    served.shipper.ship(time.time() + 3 * LATER)
    moment = dt.datetime.now(dt.UTC)
    assert served.archive.prune(moment + dt.timedelta(hours=2)) == 1
    assert [piece.number for piece in served.pieces()] == [2]
    # The place is kept: nothing old is shipped again by an idle server.
    assert served.archive.prune(moment + dt.timedelta(hours=4)) == 1
    assert [(piece.number, piece.size) for piece in served.pieces()] == [(3, 0)]
    assert served.archive.prune(moment + dt.timedelta(hours=4)) == 0
    served.restart()
    assert served.ship() == 0
    before = len(served.written)
    served.write()
    served.ship()
    assert served.archived() == served.written[before:]
    assert not served.has_gap()
    served.archive.close("mx1", served.incarnation, None)
    assert served.archive.prune(moment + dt.timedelta(days=9)) == 1
    assert served.pieces() == []


def test_a_damaged_piece_is_no_piece(mx1: Log) -> None:
    mx1.write(9)
    mx1.ship()
    [piece] = mx1.pieces()
    path = Path(mx1.url) / "mx1" / mx1.incarnation / piece.name
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ArchiveError, match="cannot be read: EOFError"):
        mx1.archived()


def test_a_url_of_no_known_kind_is_told() -> None:
    with pytest.raises(ArchiveError, match="the log archive nosuch://mx cannot be opened: ValueError"):
        Archive("nosuch://mx")
