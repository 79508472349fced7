"""Hosts on which no server can be made: each ends as failed with its reason, bare again, and costs nothing any more.

What belongs here: what only the real playbook on a real host can show. What does not:

- who is not let in, what becomes of a task that fails, a play that takes too long, a run that is killed in a play: `tests/provisioning/test_playing.py`, with
  Ansible over SSH;
- a host that does not answer, a server that fails its verification: `test_making.py` there, and what is verified: `test_verify.py`;
- an Exim that does not start: what the play says of it is in `test_installation`.
"""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.infra.fleet import HOME, Fleet, bare, hosts_file, left_on, put
from tests.infra.installing import AS_UNIT
from tests.parts.processes import wait_for

pytestmark = [pytest.mark.server, pytest.mark.timeout(1800), pytest.mark.xdist_group("machines")]

# What is wrong with a host, and why its server fails.
REASONS = {
    "full": r"^play: the task 'There is room on the disk' failed: .*\d MB are free",
    "lacking": r"^play: the task 'Packages' failed: .*exim4-daemon-light",
    "killed": r"^play: the playbook was not played: it was ended by signal 9$",
}
# Several servers at a time, each to its end, as runs of the job do it one by one; every line that is said.
MAKE = """
import os, sys
from concurrent.futures import ThreadPoolExecutor
os.environ |= {"MAIL_PIPELINES_PROVISIONING__" + name: value for name, value in {"ATTEMPTS": "1", "AT_ONCE": "20", "MOST": "20"}.items()}
from mail_pipelines import config
from mail_pipelines.database.engine import open_engine, transact
from mail_pipelines.provisioning import making, store
from mail_pipelines.resources.provisioning import parts_of
settings = config.load()
engine = open_engine(settings.database)
parts = parts_of(engine, settings)
count = len(parts.sources[0].hosts)
keys = transact(engine, lambda connection: [store.request(connection, settings.provisioning, "for a test").key for _ in range(count)])
def say(line):
    print(line, flush=True)
with ThreadPoolExecutor(count) as threads:
    list(threads.map(lambda key: making.advance(parts, key, say), keys))
"""
# Packages are not installed before somebody says so; it is told that they are next.
STANDS = 'DPkg::Pre-Invoke {"touch /run/stands; while [ ! -e /run/goes-on ]; do sleep 0.1; done";};'
STANDS_IN = "/etc/apt/apt.conf.d/99stands"
# The player that plays on a host, by the lock of its folder.
PLAYER = r"""
folder=$(grep -lF "\"$1\"" /dev/shm/mail-pipelines-play-*/inventory/hosts.json) && folder=${folder%/inventory/*}
ls -l /proc/[0-9]*/fd 2>/dev/null | awk -v lock="$folder/lock" '/^\/proc\// { split($1, parts, "/") } $NF == lock { print parts[3] }'
"""


def test_each_failure_ends_with_its_reason_and_nothing_is_left(fleet: Fleet, tree: Path, tmp_path: Path) -> None:
    """All at once, each on a host of its own."""
    installed, centre = fleet.installed, fleet.installed.centre
    # It would take them on, too.
    centre.run("systemctl", "stop", "mail-pipelines-daemon")
    with ExitStack() as stack:
        on = {
            "full": bare(stack, installed, "full", 31, tree, tmp_path / "full", size="64M"),
            "lacking": bare(stack, installed, "lacking", 32, tree, tmp_path / "lacking"),
            "killed": fleet.rack["rack1"],
        }
        on["lacking"].run("sh", "-c", "rm /var/cache/apt/archives/exim4-daemon-light_*")
        on["killed"].run("sh", "-c", f"cat >{STANDS_IN}", text=STANDS)
        addresses = {name: one.host.address for name, one in on.items()}
        put(installed, f"{HOME}/hosts.toml", hosts_file(installed, addresses.values()))
        last = fleet.value("SELECT COALESCE(MAX(id), 0) FROM provisions")
        with ThreadPoolExecutor(1) as thread:
            making = thread.submit(centre.run, "sh", "-c", AS_UNIT, "sh", MAKE)
            wait_for(lambda: making.done() or on["killed"].run("ls", "/run/stands", check=False).stdout, seconds=300, what=fleet.log)
            killed = centre.run("sh", "-c", PLAYER, "sh", addresses["killed"]).stdout.split()
            assert killed, making.result()
            centre.run("kill", "-KILL", *killed)
            on["killed"].run("sh", "-c", f"rm {STANDS_IN} && touch /run/goes-on")
            making.result()
        rows = fleet.sql("SELECT host_id, state, step, ended_at IS NOT NULL, reason FROM provisions WHERE id > %s", last)
        ended = {identity.removesuffix(":22"): row for identity, *row in rows}
        assert set(ended) == set(addresses.values())
        assert len(rows) == len(addresses)
        # No step is left, and with its end it costs nothing any more.
        assert [row[:3] for row in ended.values()] == [["failed", "", 1]] * len(ended)
        reasons = {name: ended[address][3] for name, address in addresses.items()}
        for name, words in REASONS.items():
            assert re.search(words, reasons[name]), reasons
        wait_for(lambda: not centre.run("pgrep", "--list-full", "-f", "ansible|player.py|ssh ", check=False).stdout, what="the end of all plays")
        for name, one in on.items():
            assert (name, left_on(one)) == (name, "")
        # Nobody has an account of a server that is not there.
        assert fleet.sql("SELECT DISTINCT servers.state FROM servers JOIN provisions USING (`key`) WHERE provisions.id > %s", last) == [("retired",)]
