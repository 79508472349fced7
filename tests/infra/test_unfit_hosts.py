"""Hosts on which no server can be made: each ends as failed with its reason, bare again, and costs nothing any more.

What belongs here: what only the real playbook on a real host can show. What does not: who is not let in, who does not answer, a play that takes too long, and
making that is killed and begun again (`tests/provisioning/test_playing.py`, `test_making.py`, with a real SSH server).
"""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.infra.fleet import HOME, Fleet, bare, hosts_file, left_on, put, with_packages
from tests.infra.installing import AS_UNIT
from tests.parts.processes import wait_for

pytestmark = [pytest.mark.server, pytest.mark.timeout(600), pytest.mark.xdist_group("platform")]

# What is wrong with a host, and why its server fails.
REASONS = {
    "full": r"^play: the task '.*' failed: .*(\d MB are free on the disk|[Nn]o space left)",
    "lacking": r"^play: the task 'Packages' failed: .*nftables",
    "killed": r"^play: the playbook was not played: it was ended by signal 9$",
    "taken": r"^play: the task .* failed: .*mail-pipelines-exim",
    "listed": r"^verify: (.*; )?block lists: .*zen.spamhaus.org",
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
# The player that plays on a host, by the lock of its folder.
PLAYER = """
for place in /proc/[0-9]*/fd/*; do
  folder=$(readlink "$place") || continue
  case $folder in */mail-pipelines-play-*/lock) ;; *) continue ;; esac
  grep -qF "\\"$1\\"" "${folder%/lock}/inventory/hosts.json" || continue
  pid=${place#/proc/}
  echo "${pid%%/*}"
done
"""


def test_each_failure_ends_with_its_reason_and_nothing_is_left(fleet: Fleet, tree: Path, tmp_path: Path) -> None:
    """All at once, each on a host of its own."""
    installed, centre = fleet.installed, fleet.installed.centre
    # It would take them on, too.
    centre.run("systemctl", "stop", "mail-pipelines-daemon")
    with ExitStack() as stack:
        on = dict(zip(("killed", "taken", "listed"), fleet.rack.values(), strict=True))
        for one in on.values():
            with_packages(one)
        on |= {name: bare(stack, installed, name, number, tree, tmp_path, size) for name, number, size in (("full", 31, "64M"), ("lacking", 32, "4G"))}
        on["lacking"].run("sh", "-c", "rm /var/cache/apt/archives/nftables_*")
        # Of another program of this host, where Exim is to listen.
        on["taken"].run("systemd-run", "--unit", "other", "python3", "-m", "http.server", "--bind", "127.0.0.1", "2525")
        zone = "zen.spamhaus.org. 60 IN A"
        reverse = ".".join(reversed(on["listed"].host.address.split(".")))
        installed.world.publish(f"2.0.0.127.{zone} 127.0.0.2", f"{reverse}.{zone} 127.0.0.2")
        addresses = {name: one.host.address for name, one in on.items()}
        put(installed, f"{HOME}/hosts.toml", hosts_file(installed, addresses.values()))
        last = fleet.value("SELECT COALESCE(MAX(id), 0) FROM provisions")
        with ThreadPoolExecutor(1) as thread:
            making = thread.submit(centre.run, "sh", "-c", AS_UNIT, "sh", MAKE)
            wait_for(lambda: making.done() or on["killed"].run("pgrep", "-x", "dpkg|apt-get", check=False).stdout, seconds=180, what=fleet.log)
            killed = centre.run("sh", "-c", PLAYER, "sh", addresses["killed"]).stdout.split()
            assert killed, making.result()
            centre.run("kill", "-KILL", *killed)
            making.result()
        rows = fleet.sql("SELECT host_id, state, step, ended_at IS NOT NULL, reason FROM provisions WHERE id > %s ORDER BY id", last)
        ended = {identity.removesuffix(":22"): row for identity, *row in rows}
        assert set(ended) == set(addresses.values())
        assert len(rows) == len(addresses)
        # No step is left, and with its end it costs nothing any more.
        assert [row[:3] for row in ended.values()] == [["failed", "", 1]] * len(ended)
        reasons = {name: ended[address][3] for name, address in addresses.items()}
        for name, words in REASONS.items():
            assert re.search(words, reasons[name]), reasons
        wait_for(lambda: not centre.run("pgrep", "--list-full", "-f", "ansible|player.py|ssh ", check=False).stdout, seconds=60, what="the end of all plays")
        for name, one in on.items():
            assert (name, left_on(one)) == (name, "")
        # Nobody has an account of a server that is not there.
        assert fleet.sql("SELECT DISTINCT servers.state FROM servers JOIN provisions USING (`key`) WHERE provisions.id > %s", last) == [("retired",)]
