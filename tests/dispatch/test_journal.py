"""The journal is proof: it is read across rotation, and a gap, a missing marker or a torn line never passes for "nothing happened"."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mail_pipelines.dispatch.catcher import log
from mail_pipelines.dispatch.files import DispatchError
from mail_pipelines.dispatch.journal import Entry, Journal, JournalWriter, Kind, Outcome, Position

DELIVERED = Outcome(Kind.DELIVERED, 250, "2.0.0", "Ok: kept")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "main.log"


def write(path: Path, *lines: bytes) -> None:
    writer = JournalWriter(path)
    for line in lines:
        writer.write(line)
    writer.close()


def test_outcomes_and_open_intents_are_told_apart(path: Path) -> None:
    write(path, log.mark("c1.99"), log.intent("aa", 5), log.done("aa", DELIVERED), log.intent("bb", 6))
    evidence = Journal(path, log.parse).evidence(Position(path.stat().st_ino, 0), 1)
    assert evidence.covered
    assert evidence.outcomes == {"aa": DELIVERED}
    assert evidence.intents == {"bb": 6}


def test_a_second_attempt_of_a_token_reopens_it(path: Path) -> None:
    write(path, log.mark("c1.99"), log.intent("aa", 5), log.done("aa", Outcome(Kind.VOID, 451)), log.intent("aa", 7))
    evidence = Journal(path, log.parse).evidence(Position(path.stat().st_ino, 0), 1)
    assert evidence.intents == {"aa": 7}
    assert evidence.outcomes == {}


def test_without_the_claims_marker_nothing_is_covered(path: Path) -> None:
    write(path, log.mark("c2.99"), log.mark("c11.99"), log.intent("aa", 5))
    assert not Journal(path, log.parse).evidence(Position(path.stat().st_ino, 0), 1).covered


def test_reading_goes_on_across_rotation(path: Path) -> None:
    journal = Journal(path, log.parse)
    write(path, log.mark("c0.1"))
    start = journal.end()
    write(path, log.mark("c1.99"), log.intent("aa", 5))
    path.rename(path.with_name("main.log.1"))
    write(path, log.done("aa", DELIVERED))
    path.with_name("main.log.1").rename(path.with_name("main.log.2"))
    path.rename(path.with_name("main.log.1"))
    write(path, log.intent("bb", 6))
    evidence = journal.evidence(start, 1)
    assert evidence.covered
    assert evidence.outcomes == {"aa": DELIVERED}
    assert evidence.intents == {"bb": 6}


@pytest.mark.parametrize("damage", ["first file gone", "middle file gone", "truncated", "replaced"])
def test_a_gap_in_the_chain_is_never_covered(path: Path, damage: str) -> None:
    journal = Journal(path, log.parse)
    write(path, log.mark("c0.1"), log.mark("c0.2"))
    start = journal.end()
    write(path, log.mark("c1.99"))
    if damage == "truncated":
        os.truncate(path, 0)
        write(path, log.intent("aa", 5))
    elif damage == "replaced":
        other = path.with_name("copy")
        other.write_bytes(path.read_bytes())
        other.replace(path)
    else:
        path.rename(path.with_name("main.log.2"))
        write(path, log.mark("c1.99"))
        path.rename(path.with_name("main.log.1"))
        write(path, log.mark("c1.99"))
        path.with_name("main.log.2" if damage.startswith("first") else "main.log.1").unlink()
    assert not journal.evidence(start, 1).covered


def test_torn_and_foreign_lines_are_counted_and_left_out(path: Path) -> None:
    write(path, log.mark("c1.99"), b"\xff\xfe garbage", b"half a li")
    with path.open("ab") as file:
        file.write(log.done("aa", DELIVERED)[:-3])
    evidence = Journal(path, log.parse).evidence(Position(path.stat().st_ino, 0), 1)
    assert evidence.bad_lines == 2
    assert evidence.outcomes == {}
    # A line that cannot be read may have been an INTENT: silence proves nothing here.
    assert not evidence.covered
    # A new writer ends the torn line instead of writing on it.
    write(path, log.done("bb", DELIVERED))
    evidence = Journal(path, log.parse).evidence(Position(path.stat().st_ino, 0), 1)
    assert "bb" in evidence.outcomes


def test_no_journal_is_an_error_that_says_so(path: Path) -> None:
    with pytest.raises(DispatchError, match="no journal at"):
        Journal(path, log.parse).end()


@pytest.mark.parametrize(
    "torn",
    [log.mark("c9.99"), log.intent("aa", 5), log.done("aa", Outcome(Kind.DELIVERED, 250, "2.0.0", "ok"))],
    # The lines have the time in them.
    ids=["mark", "intent", "done"],
)
def test_a_line_torn_by_a_full_disk_is_ended_before_the_next_and_hides_nothing(path: Path, monkeypatch: pytest.MonkeyPatch, torn: bytes) -> None:
    """Its writer did not go on with the message."""
    real = os.write
    for cut in range(1, torn.rindex(b" ")):
        path.write_bytes(b"")
        writer = JournalWriter(path)
        writer.write(log.mark("c1.99"))
        with monkeypatch.context() as patch:
            patch.setattr(os, "write", lambda descriptor, data, cut=cut: real(descriptor, data[:cut]))
            with pytest.raises(OSError, match="could not be written whole"):
                writer.write(torn)
        writer.write(log.intent("bb", 6))
        writer.close()
        evidence = Journal(path, log.parse).evidence(Position(path.stat().st_ino, 0), 1)
        assert evidence.intents == {"bb": 6}, cut
        assert evidence.covered, cut


def test_a_full_disk_refuses_the_line() -> None:
    writer = JournalWriter(Path("/dev/full"))
    with pytest.raises(OSError, match="No space left"):
        writer.write(b"x")


TOKENS = st.text("abcdefghijklmnopqrstuvwxyz234567", min_size=1, max_size=50)


@given(TOKENS, st.sampled_from(Kind), st.none() | st.integers(200, 599), st.none() | st.just("5.1.1"), st.text(max_size=200))
def test_every_outcome_is_read_as_it_was_written(token: str, kind: Kind, code: int | None, enhanced: str | None, text: str) -> None:
    line = log.done(token, Outcome(kind, code, enhanced, text))
    assert b"\n" not in line
    entry = log.parse(line)
    assert entry is not None
    assert entry.outcome is not None
    assert (entry.token, entry.outcome.kind, entry.outcome.code, entry.outcome.enhanced) == (token, kind, code, enhanced)


@given(st.binary(max_size=200))
def test_any_bytes_are_an_entry_or_a_value_error(line: bytes) -> None:
    try:
        entry = log.parse(line.replace(b"\n", b""))
    except ValueError:
        return
    assert entry is None or isinstance(entry, Entry)
