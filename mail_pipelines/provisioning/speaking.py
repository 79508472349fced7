"""The first thing to be verified of any server: that its process speaks with the database, from its host, as itself."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy.engine import Engine

from mail_pipelines.config import Settings
from mail_pipelines.database.engine import database_now, reading
from mail_pipelines.dispatch import servers
from mail_pipelines.provisioning.interfaces import Finding, Target

_WAIT_SECONDS = 60
_POLL_SECONDS = 0.2


@dataclass(frozen=True)
class Heard:
    ok: bool
    text: str
    name: str = "heartbeat"


@dataclass(frozen=True)
class Speaks:
    engine: Engine
    settings: Settings

    def __call__(self, target: Target) -> Sequence[Finding]:
        end = time.monotonic() + _WAIT_SECONDS
        while True:
            with reading(self.engine) as connection:
                server, now = servers.find(connection, target.name), database_now(connection)
            if not server.is_silent(now, self.settings.server.heartbeat_seconds):
                return [Heard(True, "its process speaks with the database")]
            if time.monotonic() > end:
                unit = f"see `journalctl -u mail-pipelines-{server.kind}` there" if server.kind == "exim" else "see its log in the home"
                return [Heard(False, f"its process does not speak with the database within {_WAIT_SECONDS} s: {unit}")]
            time.sleep(_POLL_SECONDS)
