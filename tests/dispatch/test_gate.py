"""The gate: each message's body goes out once, at the pacer's pace, and never when its burst is over."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from mail_pipelines.dispatch.files import DispatchError
from mail_pipelines.dispatch.gate import Gate
from mail_pipelines.dispatch.pacer import Pacer

Talk = Callable[[Gate, Path], Awaitable[None]]


async def ask(folder: Path, question: str) -> str:
    reader, writer = await asyncio.open_unix_connection(folder / "c1.99")
    writer.write(question.encode() + b"\n")
    answer = await reader.read()
    writer.close()
    return answer.decode()


def at_gate(folder: Path, talk: Talk, *, per_second: float = 1000.0, seconds: float = 100.0) -> None:
    async def run() -> None:
        pacer = Pacer(folder, "small", per_second=per_second, connections=1)
        gate = Gate(folder, "c1.99", ["a", "b", "c"], pacer, time.monotonic() + seconds)
        await gate.open()
        try:
            await talk(gate, folder)
        finally:
            await gate.close()
            pacer.close()

    asyncio.run(run())


def test_a_body_goes_out_once_and_has_no_turn_after_it(tmp_path: Path) -> None:
    async def talk(gate: Gate, folder: Path) -> None:
        # A destination that refuses the recipient for now has a second host, and is asked there: that is another turn.
        assert [await ask(folder, word) for word in ("turn a", "turn a", "body a", "body a", "turn a", "body b")] == ["go", "go", "go", "no", "no", "go"]

    at_gate(tmp_path, talk)


@pytest.mark.parametrize("question", ["turn x", "body x", "", "turn", "body", "a", "go a", "turn a b", "TURN a"])
def test_what_is_no_question_about_its_messages_is_answered_no(tmp_path: Path, question: str) -> None:
    async def talk(gate: Gate, folder: Path) -> None:
        assert await ask(folder, question) == "no"

    at_gate(tmp_path, talk)


def test_turns_keep_the_pace_of_the_server(tmp_path: Path) -> None:
    async def talk(gate: Gate, folder: Path) -> None:
        begin = time.monotonic()
        assert await asyncio.gather(*(ask(folder, f"turn {token}") for token in "abcabc")) == ["go"] * 6
        assert time.monotonic() - begin >= 5 / 50

    at_gate(tmp_path, talk, per_second=50)


def test_after_its_time_nothing_goes_out(tmp_path: Path) -> None:
    async def talk(gate: Gate, folder: Path) -> None:
        assert await ask(folder, "turn a") == "go"
        # The next turn would come after the end.
        assert await ask(folder, "turn b") == "no"
        gate.deadline = time.monotonic()
        assert [await ask(folder, "turn a"), await ask(folder, "body a")] == ["no", "no"]

    at_gate(tmp_path, talk, per_second=0.001)


def test_a_closing_gate_leaves_nobody_waiting(tmp_path: Path) -> None:
    async def talk(gate: Gate, folder: Path) -> None:
        assert await ask(folder, "turn a") == "go"
        waiting = asyncio.create_task(ask(folder, "turn b"))
        while not gate.asked:
            await asyncio.sleep(0)
        begin = time.monotonic()
        await gate.close()
        assert await waiting in ("", "no")
        # Long before the turn that it waits for.
        assert time.monotonic() - begin < 40
        with pytest.raises(FileNotFoundError):
            await ask(folder, "body a")

    at_gate(tmp_path, talk, per_second=0.02)


def test_a_path_too_long_for_a_socket_says_what_to_set(tmp_path: Path) -> None:
    folder = tmp_path / ("x" * 100)
    folder.mkdir()
    with pytest.raises(DispatchError, match=r"server\.run_folder"):
        at_gate(folder, lambda gate, path: asyncio.sleep(0))
