"""Children live and end together: watched, stopped by id, none left behind, one set at a time."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mail_pipelines.supervision import ChildEnded, ProcessError, Processes, Stopped
from tests.parts.processes import wait_for

SLEEPER = [sys.executable, "-c", "import time; print('up', flush=True); time.sleep(60)"]
STUBBORN = [sys.executable, "-c", "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(60)"]
# Ends at once on SIGTERM, but leaves a process of its own behind.
PARENT = [sys.executable, "-c", f"import subprocess, time; print(subprocess.Popen({SLEEPER!r}).pid, flush=True); time.sleep(60)"]


def _alive(pid: int) -> bool:
    """Whether the process runs (a zombie does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_all_children_are_stopped_also_after_an_error(tmp_path: Path) -> None:
    children = []

    def fail_with_children() -> None:
        with Processes() as processes:
            children.extend(processes.start(name, SLEEPER, log=tmp_path / name) for name in ("one", "two"))
            processes.check()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_with_children()
    assert [child.returncode for child in children] == [-signal.SIGTERM] * 2


@pytest.mark.slow
def test_what_a_child_leaves_behind_is_stopped_too(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with Processes() as processes:
        processes.start("parent", PARENT, log=log)
        # It may say that it is up before its parent says who it is.
        grandchild = int(processes.wait_until_ready(lambda: re.search(r"^(\d+)\n", log.read_text(), re.MULTILINE), seconds=60, what="the grandchild")[1])
        assert _alive(grandchild)
    wait_for(lambda: not _alive(grandchild))


def test_a_child_that_ignores_the_request_is_killed_in_time(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with Processes(stop_seconds=0.3) as processes:
        child = processes.start("stubborn", STUBBORN, log=log)
        processes.wait_until_ready(log.read_text, seconds=60, what="the child")
        begin = time.monotonic()
    assert child.returncode == -signal.SIGKILL
    # It would live for a minute.
    assert time.monotonic() - begin < 30


def test_a_dead_child_is_named_with_its_last_words(tmp_path: Path) -> None:
    with Processes() as processes:
        processes.start("bad", [sys.executable, "-c", "raise SystemExit('no such port')"], log=tmp_path / "bad.log")
        with pytest.raises(ChildEnded, match=r"bad ended with status 1; the end of .*bad\.log:\nno such port"):
            processes.wait()
    with Processes() as processes:
        child = processes.start("killed", SLEEPER, log=tmp_path / "killed.log")
        child.kill()
        with pytest.raises(ChildEnded, match="killed was ended by signal 9"):
            processes.wait()


def test_what_never_gets_ready_is_named(tmp_path: Path) -> None:
    with Processes() as processes:
        processes.start("slow", SLEEPER, log=tmp_path / "slow.log")
        with pytest.raises(ProcessError, match=r"the thing is not ready after 0 s; see .*slow\.log"):
            processes.wait_until_ready(lambda: False, seconds=0.2, what="the thing")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_stops_the_children_and_then_the_old_handler_is_back(tmp_path: Path, number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with Processes() as processes:
        child = processes.start("child", SLEEPER, log=tmp_path / "log")
        os.kill(os.getpid(), number)
        with pytest.raises(Stopped):
            processes.wait()
    assert child.returncode == -signal.SIGTERM
    assert signal.getsignal(number) == before


def test_a_second_start_is_refused_while_the_first_or_its_orphans_live(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    program = f"""
import sys
from pathlib import Path
from mail_pipelines.supervision import Processes
with Processes(lock=Path({str(lock)!r})) as processes:
    print(processes.start("worker", {SLEEPER!r}, log=Path({str(tmp_path / "log")!r})).pid, flush=True)
    processes.wait()
"""
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout is not None
        orphan = int(first.stdout.readline())
        with pytest.raises(ProcessError, match=f"parent {first.pid}, worker {orphan}"), Processes(lock=lock):
            pass
        first.kill()
        first.wait()
        assert _alive(orphan)
        with pytest.raises(ProcessError, match=f"worker {orphan}"), Processes(lock=lock):
            pass
        os.kill(orphan, signal.SIGKILL)
    wait_for(lambda: not _alive(orphan))
    with Processes(lock=lock) as processes:
        processes.check()
