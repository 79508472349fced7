"""Reading a journal onward: every record once, whatever was rotated, torn or cut in between."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mail_pipelines.dispatch import tail
from mail_pipelines.dispatch.exim import log
from mail_pipelines.dispatch.journal import Journal, Position, Read

TOKEN = "mfrggzdfmztwq2lknnwg23tpobyxe43uov3ho6dzpj2gk3tf"
HEAD = b"2026-11-24 12:15:42.927 [23506] 1xVpQB-0005at-08 "
SENDER = f"b+{TOKEN}@bounces.example.test".encode()
RECORDS = [
    HEAD + b"INTENT " + TOKEN.encode() + b" 23506",
    HEAD + b">> p@x.test F=<" + SENDER + b'> R=r T=t H=mx [192.0.2.1] C="250 2.0.0 Ok" QT=0.1s',
    HEAD + b"<= " + SENDER + b" H=(c1.2) [127.0.0.1] P=esmtp S=319",
    HEAD + b"Completed",
    HEAD + b">> p@x.test F=<" + SENDER + b'> R=r T=t H=mx [192.0.2.1] C="250-2.0.0 Ok\n250 2.0.0 more" QT=0.1s',
    HEAD + b"F=<" + SENDER + b"> rejected RCPT <p@x.test>: SMTP error from remote mail server after RCPT TO:<p@x.test>: 550-5.1.1 no\n550 5.1.1 user",
    HEAD + b"=> p@x.test F=<" + SENDER + b"> R=r",
    HEAD + b"<= " + SENDER + b" H=(x) INTENT " + TOKEN.encode() + b" 1",
    HEAD + b">> p@x.test",
    b"2026-11-24 12:15:42.927 MARK c1.99",
    b"2026-11-24 12:15:42.927 something else",
    b"\xff damaged",
    b"",
]
records = st.lists(st.sampled_from(RECORDS), max_size=40)


def journal(path: Path) -> Journal:
    return Journal(path, log.parse, log.continues, log.scan)


def what(read: Read) -> tuple[object, ...]:
    return read.start, read.end, read.entry, type(read.error)


@given(records)
def test_a_block_is_read_as_its_records_one_by_one(lines: list[bytes]) -> None:
    block = b"".join(line + b"\n" for line in lines)
    quick = [what(read) for read in journal(Path("unused")).read(block)]
    slowly = [what(read) for read in Journal(Path("unused"), log.parse, log.continues).read(block)]
    assert quick == slowly


@given(records=records, steps=st.lists(st.tuples(st.integers(0, 400), st.booleans()), max_size=8), block_bytes=st.integers(1, 600), data=st.data())
def test_everything_is_read_once_across_writes_and_rotations(
    tmp_path_factory: pytest.TempPathFactory, records: list[bytes], steps: list[tuple[int, bool]], block_bytes: int, data: st.DataObject
) -> None:
    """The log grows by any number of bytes, is rotated between two records, and is read now and then, in blocks of any size."""
    path = tmp_path_factory.mktemp("log") / "main.log"
    path.touch()
    written = b"".join(record + b"\n" for record in records)
    ends = [0]
    for record in records:
        ends.append(ends[-1] + len(record) + 1)
    reader = journal(path)
    position: Position | None = None
    found = b""
    done = 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tail, "BLOCK_BYTES", block_bytes)
        for size, rotates in [*steps, (len(written), False)]:
            # A mail server opens a new file before it writes a record, never inside of one.
            target = min(len(written), done + size)
            if rotates:
                target = max(end for end in ends if end <= max(done, target)) if done in ends else next(end for end in ends if end >= done)
            with path.open("ab") as file:
                file.write(written[done:target])
            done = max(done, target)
            if rotates and done in ends:
                for number in range(len(list(path.parent.iterdir())) - 1, 0, -1):
                    path.with_name(f"main.log.{number}").rename(path.with_name(f"main.log.{number + 1}"))
                path.rename(path.with_name("main.log.1"))
                path.touch()
            if data.draw(st.booleans()):
                for block in tail.blocks(reader, position, time.time()):
                    assert not block.gap
                    found, position = found + block.data, block.end
        for block in tail.blocks(reader, position, time.time() + 10):
            found, position = found + block.data, block.end
    assert found == written
    assert list(tail.blocks(reader, position, time.time() + 10)) in ([], [tail.Block(Position(path.stat().st_ino, 0), b"")])


def test_a_torn_or_growing_last_record_is_left_for_later(tmp_path: Path) -> None:
    path = tmp_path / "main.log"
    path.write_bytes(RECORDS[0] + b"\n" + RECORDS[5].split(b"\n")[0] + b"\n")
    now = path.stat().st_mtime
    (block,) = tail.blocks(journal(path), None, now)
    assert block.data == RECORDS[0] + b"\n"
    with path.open("ab") as file:
        file.write(RECORDS[5].split(b"\n")[1] + b"\n" + RECORDS[3][:20])
    os.utime(path, (now, now))
    (rest,) = tail.blocks(journal(path), block.end, now + 2)
    assert rest.data == RECORDS[5] + b"\n"


@pytest.mark.parametrize("rotated", [False, True])
def test_a_log_that_was_written_before_the_clock_was_set_back_is_read_to_its_end(tmp_path: Path, rotated: bool) -> None:
    path = tmp_path / "main.log"
    path.write_bytes(RECORDS[0] + b"\n")
    now = path.stat().st_mtime - 300
    if rotated:
        path.rename(tmp_path / "main.log.1")
        path.write_bytes(RECORDS[3] + b"\n")
        os.utime(path, (now - 2, now - 2))
    wanted = [RECORDS[0] + b"\n", *([RECORDS[3] + b"\n"] if rotated else [])]
    assert [block.data for block in tail.blocks(journal(path), None, now)] == wanted


@pytest.mark.parametrize("cut", ["truncated", "gone"])
def test_what_is_gone_is_told_and_the_rest_is_read(tmp_path: Path, cut: str) -> None:
    path = tmp_path / "main.log"
    path.write_bytes((RECORDS[0] + b"\n") * 9)
    *_, before = tail.blocks(journal(path), None, time.time() + 10)
    if cut == "gone":
        (tmp_path / "main.log.1").write_bytes(b"")
        path.rename(tmp_path / "old")
    path.write_bytes(RECORDS[3] + b"\n")
    found = list(tail.blocks(journal(path), before.end, time.time() + 10))
    assert [block.data for block in found] == [RECORDS[3] + b"\n"]
    assert found[0].gap
