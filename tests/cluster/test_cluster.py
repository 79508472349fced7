"""`script/cluster` in small: three servers send two campaigns at once, and all who count agree."""

from __future__ import annotations

import email
import json
import os
import re
import signal
import subprocess
from collections import Counter
from pathlib import Path

import pytest

from mail_pipelines.dispatch.catcher.store import kept
from mail_pipelines.home import checkout
from tests.parts.processes import stop, wait_for

pytestmark = [pytest.mark.server, pytest.mark.timeout(900), pytest.mark.xdist_group("centre")]

RECIPIENTS = 4_000
SERVERS = {"mx1", "mx2", "mx3"}
CAMPAIGNS = {"winter-letter", "today-only"}


def test_three_servers_send_two_campaigns_at_once_and_all_counts_agree(tmp_path: Path) -> None:
    # The reader's own installation, which must be left alone.
    environ = os.environ | {"MAIL_PIPELINES_HOME": str(tmp_path / "own"), "MAIL_PIPELINES_DATABASE__URL": "sqlite:///nowhere/at/all"}
    command = [checkout() / "script" / "cluster", "--recipients", str(RECIPIENTS), "--json"]
    with (tmp_path / "said").open("w") as said:
        process = subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, stderr=said, text=True)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line, (tmp_path / "said").read_text()[-3000:]
        found = json.loads(line)
        arrived = {server: [email.message_from_bytes(message.data()) for message in kept(Path(place))] for server, place in found["destinations"].items()}
        working = processes_of(found["folder"])
        process.send_signal(signal.SIGINT)
        assert process.wait(240) == 0, (tmp_path / "said").read_text()[-3000:]
    finally:
        stop(process, 240)
    assert found["disagreements"] == []
    assert (found["recipients"], found["duplicates"], found["lost"], found["unknown"]) == (RECIPIENTS, 0, 0, 0)
    assert found["together"] > 0
    assert found["both"] > 0
    assert {(row["server"], row["campaign"]) for row in found["rows"]} == {(server, campaign) for server in SERVERS for campaign in CAMPAIGNS}
    # Counted anew, by what is in the messages: nobody is in both campaigns.
    copies = Counter(str(message["To"]) for messages in arrived.values() for message in messages)
    assert set(copies.values()) == {1}
    delivered = {server: sum(row["ledger"]["delivered"] for row in found["rows"] if row["server"] == server) for server in SERVERS}
    assert {server: len(messages) for server, messages in arrived.items()} == delivered
    # Each server has a token key of its own, and so opens no other's key.
    selectors = {server: {re.search(r"\bs=([^;\s]+)", message["DKIM-Signature"])[1] for message in messages} for server, messages in arrived.items()}  # type: ignore[index]
    assert len({selector for found_there in selectors.values() for selector in found_there}) == len(selectors) == len(SERVERS)
    bounced = sum(row["ledger"]["bounced"] for row in found["rows"])
    assert sum(delivered.values()) + bounced == RECIPIENTS
    # Nothing is left of it.
    assert len(working) > 15
    wait_for(lambda: not processes_of(found["folder"]), what="the end of all processes")
    assert not Path(found["folder"]).exists()
    assert not (tmp_path / "own").exists()


def processes_of(folder: str) -> list[int]:
    """All that have the cluster's folder in their command or environment."""
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        try:
            told = (place / "cmdline").read_bytes() + (place / "environ").read_bytes()
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue
        if folder.encode() in told:
            found.append(int(place.name))
    return found
