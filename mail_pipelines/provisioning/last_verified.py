"""What `server verify` last found of a server: by the centre, and as its heartbeat tells on its host.

What belongs here: keeping and reading that. What does not: the checks, and keeping it on the host (`dispatch.last_checks`).
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from mail_pipelines.database.models import SyncState
from mail_pipelines.database.upsert import put
from mail_pipelines.dispatch import last_checks
from mail_pipelines.dispatch.servers import ServerInfo
from mail_pipelines.provisioning.finding import Finding

SOURCE = "verified"


@dataclass(frozen=True)
class Verified:
    """Which checks failed at `at`, with their words."""

    at: dt.datetime
    failed: Mapping[str, str]


def failed(findings: Iterable[Finding]) -> dict[str, str]:
    """Of findings those that failed, by name."""
    return {finding.name: finding.text for finding in findings if finding.ok is False}


def keep(connection: Connection, server: str, findings: Iterable[Finding], now: dt.datetime) -> None:
    """Keep what the centre has found."""
    value = {"at": now.isoformat(timespec="seconds"), "failed": {name: text[: last_checks.LONGEST] for name, text in failed(findings).items()}}
    put(connection, SyncState, [{"source": SOURCE, "key": server, "value": value, "version": 1, "changed_at": now}])


def at_centre(connection: Connection) -> dict[str, Verified]:
    """What the centre found last, by server."""
    rows = connection.execute(sa.select(SyncState.key, SyncState.value).where(SyncState.source == SOURCE))
    return {key: verified for key, value in rows if (verified := _read(value)) is not None}


def on_host(server: ServerInfo) -> Verified | None:
    """What was found on its host, by its last heartbeat."""
    return _read((server.health or {}).get(last_checks.FACT))


def _read(value: object) -> Verified | None:
    """A server may tell anything; what is of another form is as if it had told nothing."""
    try:
        at, checks = dt.datetime.fromisoformat(value["at"]), value["failed"]  # type: ignore[index]
        return Verified(at, {str(name)[: last_checks.LONGEST]: str(text)[: last_checks.LONGEST] for name, text in checks.items()})
    except (TypeError, KeyError, ValueError, AttributeError):
        return None
