"""The home folder's settings and the central database, for assets, ops and sensors."""

from __future__ import annotations

import atexit
import functools
from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import dagster as dg
import sqlalchemy as sa

from mail_pipelines import config
from mail_pipelines.config import Settings
from mail_pipelines.database import migrate
from mail_pipelines.database.engine import open_engine
from mail_pipelines.dispatch.files import only_one


@functools.cache
def _engine(url: str, password: str | None) -> sa.Engine:
    """One engine a process: a sensor's evaluation must not open new connections each time."""
    return open_engine(config.DatabaseSettings(url=url, password=password))


# The lock of this process's run. Dagster records a run's end after it has torn its resources down, so the lock is held beyond that:
# until the process ends, or begins another run.
_proof = ExitStack()
atexit.register(_proof.close)


def run_lock(settings: Settings, run_id: str) -> Path:
    """The file that the process of a run holds locked, from its first step until after Dagster has recorded its end."""
    return Path(settings.server.run_folder) / "centre" / run_id


class CentralDatabase(dg.ConfigurableResource):
    """Settings (from `config.toml` and the environment) and the central database they name."""

    @contextmanager
    def yield_for_execution(self, context: dg.InitResourceContext) -> Generator[CentralDatabase, None, None]:
        """Prove for as long as a run lasts that its process lives: Dagster's launcher does not see one that is killed. (A sensor is no run.)"""
        if context.run_id is not None:
            lock = run_lock(self.settings, context.run_id)
            _proof.close()
            _proof.enter_context(only_one(lock, f"run {context.run_id}"))
            _proof.callback(lock.unlink, missing_ok=True)
        yield self

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
