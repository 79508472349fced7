"""Waiting for conditions and stopping processes by id."""

from __future__ import annotations

import itertools
import os
import random
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

T = TypeVar("T")
# Below those that the kernel gives to whoever asks for any: between a look and the start of a server, and while a server is down, nobody gets it.
_PORTS = range(10_000, 32_000)


def wait_for(condition: Callable[[], T], *, seconds: float = 120, what: str | Callable[[], str] = "condition") -> T:
    """Poll until `condition` returns something true, and return that; fail with the last value otherwise, and what was waited for (asked then).

    `seconds` is no promise of anybody: whatever is waited for may stand still for a while on a busy machine, and a wait ends with it.
    """
    begin = time.monotonic()
    end = begin + seconds
    while True:
        asked = time.monotonic()
        value = condition()
        if value:
            return value
        now = time.monotonic()
        if now > end:
            raise AssertionError(f"{what if isinstance(what, str) else what()} not met within {seconds} s (last value: {value!r})")
        # What is waited for needs the processor, too: a condition that takes long to look at is looked at less often, and so is one that is long in coming.
        time.sleep(max(0.02, min(9 * (now - asked), 0.5), min((now - begin) / 50, 0.2)))


def free_port() -> int:
    """A port of the loopback that stays free until this process takes it: the processes of a run of tests have ports of their own."""
    while True:
        port = next(_ports)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        return port


def _own_ports() -> Iterator[int]:
    """Those of this process of a run, one after the other: the one that was given last comes again last."""
    count, number = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")), int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    share = len(_PORTS) // count
    own = _PORTS[number * share : (number + 1) * share]
    # Other runs on this machine begin elsewhere.
    begin = random.SystemRandom().randrange(share)
    return itertools.cycle((*own[begin:], *own[:begin]))


_ports = _own_ports()


def listens(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(0.2)
        return probe.connect_ex(("127.0.0.1", port)) == 0


def stop(process: subprocess.Popen[bytes] | subprocess.Popen[str], seconds: float = 15) -> None:
    """End a process that this test started: SIGTERM, then SIGKILL."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
