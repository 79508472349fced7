"""Verifying a server that was made here, whatever its kind: first that its process speaks with the database, as itself; then all checks of `verify`, those of
its host there.

What belongs here: what is asked where. What does not: the checks.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy.engine import Engine

from mail_pipelines.config import Settings
from mail_pipelines.database.engine import database_now, reading
from mail_pipelines.dispatch import servers
from mail_pipelines.provisioning import over_ssh, verify
from mail_pipelines.provisioning.finding import Finding
from mail_pipelines.provisioning.interfaces import Host, ProvisioningError, Target

_WAIT_SECONDS = 60
_POLL_SECONDS = 0.2
# Several mail exchangers that do not answer, and a test message that waits for one.
_HOST_SECONDS = 300
_SHOWN = 300


@dataclass(frozen=True)
class Speaks:
    """Of a catcher that is all there is to verify."""

    engine: Engine
    settings: Settings

    def __call__(self, target: Target) -> Sequence[Finding]:
        end = time.monotonic() + _WAIT_SECONDS
        while True:
            with reading(self.engine) as connection:
                server, now = servers.find(connection, target.name), database_now(connection)
            if not server.is_silent(now, self.settings.server.heartbeat_seconds):
                return [Finding("heartbeat", True, "its process speaks with the database")]
            if time.monotonic() > end:
                unit = f"see `journalctl -u mail-pipelines-{server.kind}` there" if server.kind == "exim" else "see its log in the home"
                return [Finding("heartbeat", False, f"its process does not speak with the database within {_WAIT_SECONDS} s: {unit}")]
            time.sleep(_POLL_SECONDS)


@dataclass(frozen=True)
class Sends:
    """Of a host with Exim: that it speaks, and `server verify` there and here."""

    engine: Engine
    settings: Settings

    def __call__(self, target: Target) -> Sequence[Finding]:
        spoken = Speaks(self.engine, self.settings)(target)
        if not all(finding.ok for finding in spoken):
            return spoken
        there = on_host(target.host, target.name)
        with reading(self.engine) as connection:
            now = database_now(connection)
        # The test message that its host has sent arrives here.
        sent = any(finding.name == verify.MESSAGE and finding.ok for finding in there)
        return [*spoken, *there, *verify.verify(self.engine, self.settings, target.name, now, expected=sent).findings]


def on_host(host: Host, name: str) -> list[Finding]:
    """What `server verify` finds on the server's host. Raises `ProvisioningError` if it finds nothing."""
    done = over_ssh.run(host, ["mail-pipelines", "server", "verify", name, "--json"], seconds=_HOST_SECONDS)
    try:
        return [Finding(**found) for found in json.loads(done.stdout)]
    except (ValueError, TypeError) as error:
        said = (done.stderr.strip() or done.stdout.strip())[-_SHOWN:]
        raise ProvisioningError(f"`mail-pipelines server verify {name}` on its host says (status {done.returncode}): {said or 'nothing'}") from error
