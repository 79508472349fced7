"""What `server verify` last found on a server's host: kept beside its log, and told by its heartbeat. What the centre finds is kept there
(`provisioning.last_verified`).
"""

from __future__ import annotations

import contextlib
import datetime as dt
import json
from collections.abc import Mapping
from typing import Any

from mail_pipelines.dispatch.files import DispatchError, ServerFolders, replace_file

# The name of this in a heartbeat.
FACT = "verified"
LONGEST = 300


def keep(folders: ServerFolders, failed: Mapping[str, str], now: dt.datetime) -> None:
    """Keep which checks failed, with their words; none: all held. On a full disk nothing is kept."""
    value = {"at": now.isoformat(timespec="seconds"), "failed": {name: text[:LONGEST] for name, text in failed.items()}}
    with contextlib.suppress(DispatchError):
        replace_file(folders.last_checks, json.dumps(value), durable=False)


def read(folders: ServerFolders) -> dict[str, Any] | None:
    try:
        found: dict[str, Any] = json.loads(folders.last_checks.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        # Also if another user has kept it: a heartbeat does not end for that.
        return None
    return found
