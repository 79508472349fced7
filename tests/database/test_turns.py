"""Writers of an SQLite file take turns: in the order in which they came, and nobody is kept by one that is gone or stands still."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from mail_pipelines.database import turns
from mail_pipelines.database.engine import create_engine, transact
from tests.parts.processes import wait_for

# Longer than any test: nobody goes on without a turn unless a test says so.
LONG = 600.0


@pytest.fixture
def database(tmp_path: Path) -> str:
    return str(tmp_path / "central.sqlite3")


def taken(database: str) -> int:
    """How many numbers were taken."""
    file = Path(database + turns.SUFFIX)
    return int.from_bytes(file.read_bytes(), "little") if file.exists() else 0


def come(database: str, threads: list[threading.Thread], work: threading.Thread) -> None:
    """Start one more that waits for its turn, and see that it has its number."""
    before = taken(database)
    work.start()
    threads.append(work)
    wait_for(lambda: taken(database) == before + 1, seconds=60, what="a number taken")


def test_turns_are_had_in_the_order_of_coming_however_often_somebody_comes_again(database: str) -> None:
    engine = create_engine(f"sqlite:///{database}")
    order: list[str] = []

    def write(name: str) -> None:
        transact(engine, lambda _connection: order.append(name))

    threads: list[threading.Thread] = []
    with turns.turn(database, LONG):
        for name in ("often", "first", "second", "often", "third", "often"):
            come(database, threads, threading.Thread(target=write, args=(name,)))
        assert order == []
    for thread in threads:
        thread.join()
    assert order == ["often", "first", "second", "often", "third", "often"]


def test_the_turn_of_a_killed_process_is_over(database: str) -> None:
    program = f"from mail_pipelines.database import turns\nwith turns.turn({database!r}, 600): print(flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == b"\n"
            had = threading.Event()

            def wait() -> None:
                with turns.turn(database, LONG):
                    had.set()

            come(database, threads := [], threading.Thread(target=wait))
            assert not had.is_set()
        finally:
            process.kill()
    threads[0].join()
    assert had.is_set()


def test_a_process_that_was_forked_in_a_turn_does_not_go_on_with_it(database: str) -> None:
    reading, writing = os.pipe()
    with turns.turn(database, LONG):
        if not (child := os.fork()):
            os.close(writing)
            os.read(reading, 1)
            os._exit(0)
    try:
        with turns.turn(database, LONG):
            assert os.waitpid(child, os.WNOHANG) == (0, 0)
    finally:
        os.close(writing)
        os.close(reading)
        os.waitpid(child, 0)


def test_who_has_waited_too_long_goes_on_without_a_turn(database: str) -> None:
    """The lock on the database is SQLite's, which says what is wrong."""
    with turns.turn(database, LONG):
        for number in range(2, 4):
            with turns.turn(database, 0.05):
                assert taken(database) == number
