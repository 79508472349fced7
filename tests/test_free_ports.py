"""Ports that are chosen now and listened at later."""

from __future__ import annotations

import subprocess
import sys

from mail_pipelines.free_ports import free_port


def test_no_two_processes_choose_one_port_and_none_that_the_system_hands_out() -> None:
    program = "from mail_pipelines.free_ports import free_port\nprint(*(free_port() for _ in range(50)), flush=True)\ninput()"
    ours = {free_port() for _ in range(50)}
    chosen = set(ours)
    others = [subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    for other in others:
        assert other.stdout is not None
        chosen.update(map(int, other.stdout.readline().split()))
    assert len(chosen) == 200
    assert max(chosen) < 32_768
    for other in others:
        assert other.communicate("\n", timeout=60) == ("", None)
