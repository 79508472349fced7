"""The fence: a permit stands only while its sender lives, its time runs and nobody has withdrawn it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from mail_pipelines.dispatch import permit
from mail_pipelines.dispatch.journal import process_alive
from tests.parts.processes import wait_for

HOLDER = """
import signal, sys
from pathlib import Path
from mail_pipelines.dispatch import permit
held = permit.grant(Path(sys.argv[1]), int(sys.argv[2]), seconds=60)
print(held.name, flush=True)
signal.pause()
"""


def holder(folder: Path, claim_id: int) -> tuple[subprocess.Popen[str], str]:
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(folder), str(claim_id)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    return process, process.stdout.readline().strip()


def test_a_permit_is_valid_until_it_is_withdrawn(tmp_path: Path) -> None:
    granted = permit.grant(tmp_path, 7, seconds=60)
    assert permit.is_valid(tmp_path, granted.name)
    granted.withdraw()
    assert not permit.is_valid(tmp_path, granted.name)


def test_a_withdrawn_permit_is_held_until_its_sender_has_recorded(tmp_path: Path) -> None:
    """Otherwise another run would settle the claim in the moment between the two."""
    granted = permit.grant(tmp_path, 7, seconds=60)
    granted.withdraw()
    assert permit.is_held(tmp_path, 7)
    granted.release()
    assert not permit.is_held(tmp_path, 7)
    assert list(tmp_path.iterdir()) == []


def test_a_permit_dies_by_the_clock_even_if_nobody_withdraws_it(tmp_path: Path) -> None:
    past = f"c7.{int(time.time()) - 1}"
    (tmp_path / past).touch()
    assert not permit.is_valid(tmp_path, past)


def test_names_that_are_no_permits_are_refused(tmp_path: Path) -> None:
    (tmp_path / "c7").touch()
    for name in ("", "c7", "c7.x", "../c7.9999999999", "c.9999999999", "x7.9999999999", "c7.9999999999"):
        assert not permit.is_valid(tmp_path, name)


def test_revoking_ends_a_living_holder(tmp_path: Path) -> None:
    process, name = holder(tmp_path, 7)
    assert permit.is_held(tmp_path, 7)
    permit.revoke(tmp_path, 7)
    assert not permit.is_valid(tmp_path, name)
    assert process.wait(5) == -signal.SIGKILL


def test_revoking_ends_a_stopped_holder(tmp_path: Path) -> None:
    process, _ = holder(tmp_path, 7)
    os.kill(process.pid, signal.SIGSTOP)
    permit.revoke(tmp_path, 7)
    assert process.wait(5) == -signal.SIGKILL


def test_the_permit_of_a_killed_holder_is_not_held(tmp_path: Path) -> None:
    process, _ = holder(tmp_path, 7)
    process.kill()
    process.wait()
    assert not permit.is_held(tmp_path, 7)
    permit.revoke(tmp_path, 7)
    assert list(tmp_path.iterdir()) == []


def test_revoking_spares_other_claims(tmp_path: Path) -> None:
    other, name = holder(tmp_path, 71)
    permit.revoke(tmp_path, 7)
    assert permit.is_valid(tmp_path, name)
    assert other.poll() is None
    other.kill()
    other.wait()


def test_all_permits_of_a_server_are_withdrawn_at_once(tmp_path: Path) -> None:
    names = [permit.grant(tmp_path, claim, seconds=60).name for claim in (1, 2, 3)]
    assert permit.revoke_all(tmp_path) == 3
    assert not any(permit.is_valid(tmp_path, name) for name in names)


def test_a_zombie_counts_as_gone() -> None:
    process = subprocess.Popen([sys.executable, "-c", ""])
    wait_for(lambda: b") Z" in Path(f"/proc/{process.pid}/stat").read_bytes(), what="zombie")
    assert not process_alive(process.pid)
    process.wait()
    assert process_alive(os.getpid())
