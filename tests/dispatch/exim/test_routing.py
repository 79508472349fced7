"""Without given destinations Exim finds each recipient's mail exchangers by DNS: the way that mail takes in production."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.dispatch.exim.internet import ADDRESSES, FIRST, RESOLVER, SECOND

pytestmark = pytest.mark.server

Seen = dict[str, Any]


@pytest.fixture(params=["cutthrough", "burst"])
def seen(request: pytest.FixtureRequest, both: Seen) -> Seen:
    """What became of a message to each domain: kind, enhanced code, text, and at which exchangers it arrived."""
    return both[request.param]


@pytest.fixture(scope="module")
def both() -> Iterator[Seen]:
    """The same for each mode."""
    name = f"mail-pipelines-{os.getpid()}"
    resolver = Path("/etc/netns") / name / "resolv.conf"
    folder = Path(tempfile.mkdtemp(prefix="mail-pipelines-"))
    folder.chmod(0o711)
    run = ["ip", "netns", "exec", name]
    subprocess.run(["ip", "netns", "add", name], check=True)
    try:
        # `ip netns exec` shows this file as /etc/resolv.conf.
        resolver.parent.mkdir(parents=True)
        resolver.write_text(f"nameserver {RESOLVER}\n")
        subprocess.run([*run, "ip", "link", "set", "lo", "up"], check=True)
        for address in ADDRESSES:
            subprocess.run([*run, "ip", "address", "add", f"{address}/{64 if ':' in address else 24}", "dev", "lo"], check=True)
        answer = subprocess.run([*run, sys.executable, "-m", "tests.dispatch.exim.internet", str(folder)], capture_output=True, text=True, check=False)
        assert answer.returncode == 0, answer.stderr + (folder / "log" / "main.log").read_text()
        yield json.loads(answer.stdout)
    finally:
        subprocess.run(["ip", "netns", "delete", name], check=True)
        shutil.rmtree(resolver.parent, ignore_errors=True)
        shutil.rmtree(folder)


@pytest.mark.parametrize(("domain", "exchanger"), [("plain", FIRST), ("backup", SECOND), ("address-only", FIRST)])
def test_mail_goes_to_the_best_exchanger_that_answers(seen: Seen, domain: str, exchanger: str) -> None:
    kind, _, _, at = seen[domain]
    assert (kind, at) == ("delivered", [exchanger])


def test_an_exchanger_is_reached_only_from_the_servers_own_address(seen: Seen) -> None:
    """Exim would take its address of version 6, which the server's own cannot reach, first."""
    kind, _, _, at = seen["dual"]
    assert (kind, at) == ("delivered", [FIRST])


@pytest.mark.parametrize(("domain", "code"), [("not-registered", "5.1.2"), ("takes-none", "5.1.10"), ("ours", "5.4.4"), ("broken-mx", "5.4.4")])
def test_a_domain_that_takes_no_mail_bounces(seen: Seen, domain: str, code: str) -> None:
    """`ours`: an exchanger that says it is this host is none."""
    kind, enhanced, _, at = seen[domain]
    assert (kind, enhanced, at) == ("bounced", code, [])


@pytest.mark.parametrize("domain", ["dead", "failing"])
def test_a_domain_that_cannot_be_reached_or_looked_up_now_is_tried_later(seen: Seen, domain: str) -> None:
    kind, _, _, at = seen[domain]
    assert (kind, at) == ("unreachable", [])
