"""The limits every installation begins with (`limits.toml`), as defaults of all servers."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine

from mail_pipelines.database.engine import transact
from mail_pipelines.database.models import ProviderLimit

DEFAULTS = Path(__file__).with_name("limits.toml")
ALL_SERVERS = 0


def defaults() -> list[dict[str, Any]]:
    """One row of `provider_limits` for each provider group, `*` for all others."""
    document = tomllib.loads(DEFAULTS.read_text(encoding="utf-8"))
    return [{"server_id": ALL_SERVERS, "mode": "cutthrough", "per_hour": None, "per_day": None} | limit for limit in document["limit"]]


def write_defaults(engine: Engine) -> int:
    """Write the defaults into a database that has none; what an operator has set stays. Returns how many were written."""

    def work(connection: Connection) -> int:
        present = connection.execute(sa.select(sa.func.count()).select_from(ProviderLimit).where(ProviderLimit.server_id == ALL_SERVERS)).scalar_one()
        if present:
            return 0
        rows = defaults()
        connection.execute(sa.insert(ProviderLimit), rows)
        return len(rows)

    return transact(engine, work)
