"""The home folder's settings and the central database, for assets, ops and sensors."""

from __future__ import annotations

import functools

import dagster as dg
import sqlalchemy as sa

from mail_pipelines import config
from mail_pipelines.config import Settings
from mail_pipelines.database import migrate
from mail_pipelines.database.engine import open_engine


@functools.cache
def _engine(url: str, password: str | None) -> sa.Engine:
    """One engine a process: a sensor's evaluation must not open new connections each time."""
    return open_engine(config.DatabaseSettings(url=url, password=password))


class CentralDatabase(dg.ConfigurableResource):
    """Settings (from `config.toml` and the environment) and the central database they name."""

    @property
    def settings(self) -> Settings:
        return config.load()

    @property
    def engine(self) -> sa.Engine:
        """An engine; raises `SchemaOutdated` or `DatabaseUnreachable` with what to do."""
        settings = self.settings.database
        engine = _engine(settings.url, settings.password)
        migrate.require_schema(engine)
        return engine
