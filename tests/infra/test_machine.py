"""The machines of these tests themselves: that they leave nothing behind, and reach each other."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.infra.installing import ROOT
from tests.parts.processes import wait_for

# Two whole installations at a time would be too much for two processors.
pytestmark = [pytest.mark.server, pytest.mark.timeout(900), pytest.mark.xdist_group("machines")]

BOOT = """
import sys
from pathlib import Path
from tests.infra.machine import machine, swept
from tests.parts.hosts import hosts
with swept(), hosts(2) as (_, host), machine("one.example.com", host, Path(sys.argv[1]), Path(sys.argv[2])) as running:
    print(running.pid, flush=True)
    sys.stdin.read()
"""
# A port where nobody listens refuses, unless there is no answer at all within what the kernel needs: the start of a process does not count.
JOIN = """
import subprocess, sys
from tests.infra.machine import swept
from tests.parts.hosts import hosts, joined

def reached(host, other):
    words = [*host.run, sys.executable, "-ISc", f"import socket; socket.create_connection(('{other.address}', 9), 5)"]
    return "ConnectionRefusedError" in subprocess.run(words, capture_output=True, text=True).stderr

with swept(), hosts(3) as (first, second, third):
    # From now on they know the address of the first one's device.
    assert reached(second, first) and reached(third, first)
    with joined(first, 4):
        # As low as one that is drawn may be.
        subprocess.run(["ip", "-n", first.namespace, "link", "set", "port4", "address", "02:00:00:00:00:00"], check=True)
        assert reached(second, first) and reached(third, first)
"""


def left(owner: int) -> list[str]:
    """Networks, mounts and control groups of the machines that this process has started."""
    name = f"mail-pipelines-{owner}-"
    found = [str(place) for place in Path("/run/netns").glob(f"{name}*")]
    found += [line for line in Path("/proc/self/mountinfo").read_text(encoding="utf-8").splitlines() if name in line]
    groups = "mount --make-rprivate / && mount -t cgroup2 cgroup2 /mnt && ls /mnt"
    there = subprocess.run(["unshare", "--mount", "sh", "-c", groups], capture_output=True, text=True, check=True).stdout.split()
    return found + [group for group in there if group.startswith(name)]


@pytest.mark.parametrize("killed", [False, True])
def test_nothing_is_left_of_a_machine_when_its_test_ends(tree: Path, tmp_path: Path, killed: bool) -> None:
    """By itself, or by SIGKILL."""
    (tmp_path / "etc/ssh").mkdir(parents=True)
    (tmp_path / "etc/hostname").write_text("one.example.com\n")
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(tmp_path / "etc/ssh/ssh_host_ed25519_key")], check=True)
    owner = subprocess.Popen([sys.executable, "-c", BOOT, str(tree), str(tmp_path)], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    with owner:
        assert owner.stdout is not None
        first = int(owner.stdout.readline())
        inside = Path(f"/proc/{first}/ns/net").readlink()
        assert left(owner.pid)
        if killed:
            owner.kill()
    wait_for(lambda: not left(owner.pid) and not any(network(place) == inside for place in Path("/proc").glob("[0-9]*/ns/net")), what="nothing that is left")


def network(place: Path) -> Path | None:
    try:
        return place.readlink()
    except OSError:
        return None


def test_nobody_is_cut_off_by_a_host_that_joins_later() -> None:
    # In a process of its own: in this one there may be hosts of these numbers.
    subprocess.run([sys.executable, "-c", JOIN], cwd=ROOT, check=True)
