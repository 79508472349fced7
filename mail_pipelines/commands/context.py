"""What commands share: the settings, an engine at the current schema, and how errors are shown."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

from rich.console import Console

from mail_pipelines import config

if TYPE_CHECKING:
    import sqlalchemy as sa

console = Console(soft_wrap=True)
errors = Console(stderr=True, soft_wrap=True)


@functools.cache
def settings() -> config.Settings:
    return config.load()


def open_engine() -> sa.Engine:
    """The central database, which must be reachable and at the newest schema."""
    from mail_pipelines.database import engine, migrate

    opened = engine.open_engine(settings().database)
    migrate.require_schema(opened)
    return opened
