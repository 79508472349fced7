"""Limits of one server hold for all its processes together."""

from __future__ import annotations

import asyncio
import bisect
import itertools
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mail_pipelines.dispatch.pacer import Pacer

# Tells of each attempt at a turn the moment by which the pacer decided, and how long it said to wait.
TAKER = """
import asyncio, sys, time
from pathlib import Path
from mail_pipelines.dispatch.pacer import Pacer
class Telling(Pacer):
    def _wait(self, now):
        wait = super()._wait(now)
        print(repr(now), repr(wait))
        return wait
async def main():
    pacer = Telling(Path(sys.argv[1]), "google", per_second=float(sys.argv[2]), connections=5)
    for _ in range(int(sys.argv[3])):
        assert await pacer.turn(time.monotonic() + 100)
asyncio.run(main())
"""


@pytest.mark.slow
def test_three_processes_share_one_rate(tmp_path: Path) -> None:
    """However slow they are: no turn comes too early, and whoever asks gets the one that is free or is told when it will be."""
    rate, turns = 50, 34
    takers = [subprocess.Popen([sys.executable, "-c", TAKER, str(tmp_path), str(rate), str(turns)], stdout=subprocess.PIPE, text=True) for _ in range(3)]
    told = [tuple(map(float, line.split())) for taker in takers for line in taker.communicate()[0].splitlines()]
    taken = sorted(now for now, wait in told if not wait)
    assert len(taken) == 3 * turns
    assert min(later - earlier for earlier, later in itertools.pairwise(taken)) >= 1 / rate
    for now, wait in told:
        last = taken[bisect.bisect_left(taken, now) - 1]
        assert wait == (pytest.approx(last + 1 / rate - now) if wait else 0)
    assert any(wait for _, wait in told)


def test_slots_are_shared_and_come_back_when_their_process_dies(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom pathlib import Path\nfrom mail_pipelines.dispatch.pacer import Pacer\n"
        "pacer = Pacer(Path(sys.argv[1]), 'google', per_second=1, connections=3)\n"
        "slots = [pacer.slot() for _ in range(5)]\nprint(sum(slot is not None for slot in slots), flush=True)\nsys.stdin.read()"
    )
    other = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert other.stdout is not None
    assert other.stdout.readline().strip() == "3"
    pacer = Pacer(tmp_path, "google", per_second=1, connections=3)
    assert pacer.slot() is None
    other.kill()
    other.wait()
    slots = [pacer.slot() for _ in range(4)]
    assert [slot is not None for slot in slots] == [True, True, True, False]
    slots[0].free()
    assert pacer.slot() is not None


def test_a_turn_after_the_deadline_is_not_given(tmp_path: Path) -> None:
    async def two_turns() -> tuple[bool, bool]:
        pacer = Pacer(tmp_path, "google", per_second=0.001, connections=1)
        return await pacer.turn(time.monotonic() + 100), await pacer.turn(time.monotonic() + 100)

    begin = time.monotonic()
    assert asyncio.run(two_turns()) == (True, False)
    assert time.monotonic() - begin < 100


def test_a_time_left_by_an_earlier_boot_does_not_block(tmp_path: Path) -> None:
    pacer = Pacer(tmp_path, "google", per_second=10, connections=1)
    import os
    import struct

    os.pwrite(pacer._clock, struct.pack("<d", time.clock_gettime(time.CLOCK_BOOTTIME) + 1e6), 0)
    assert pacer.take() == 0
