"""Waiting for conditions and stopping processes by id."""

from __future__ import annotations

import socket
import subprocess
import time
from collections.abc import Callable
from typing import TypeVar

from mail_pipelines.free_ports import free_port as free_port

T = TypeVar("T")


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
