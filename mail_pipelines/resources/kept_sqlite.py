"""Dagster's storage in SQLite, with an engine for each file that is kept, and its connections: Dagster makes a new engine for every query."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from dagster._config import StringSource
from dagster._core.storage.event_log.sqlite.sqlite_event_log import INDEX_SHARD_NAME, SqliteEventLogStorage
from dagster._core.storage.legacy_storage import CompositeStorage
from dagster._core.storage.runs.sqlite.sqlite_run_storage import SqliteRunStorage
from dagster._core.storage.schedules.sqlite.sqlite_schedule_storage import SqliteScheduleStorage
from dagster._core.storage.sqlite import SQLITE_BUSY_TIMEOUT_SECONDS, create_db_conn_string
from dagster._serdes import ConfigurableClassData
from sqlalchemy.engine import Connection

from mail_pipelines.resources.kept_schema import KeptEvents, KeptRuns, KeptSchedules

# Files of runs that a process reads or writes by turns.
_RUN_FILES = 8


def _engine(url: str, **pool: Any) -> sa.Engine:
    return sa.create_engine(url, connect_args={"timeout": SQLITE_BUSY_TIMEOUT_SECONDS}, **pool)


@functools.cache
def _kept(url: str) -> sa.Engine:
    """The engine of a file that lives as long as its home; nobody waits for a connection."""
    return _engine(url, max_overflow=-1)


@functools.lru_cache(_RUN_FILES)
def _of_run(url: str) -> sa.Engine:
    """The engine of a run's file, which is closed between two queries, since the file goes when the run is deleted."""
    return _engine(url, poolclass=sa.NullPool)


def _made(engine: sa.Engine) -> bool:
    """Whether a file has its tables. Dagster's own look at it reads each of its migrations first, 15 ms for each file."""
    if not Path(str(engine.url.database)).exists():
        return False
    with engine.connect() as connection:
        return sa.inspect(connection).has_table("alembic_version") and connection.scalar(sa.text("SELECT count(*) FROM alembic_version")) > 0


class _OneFile:
    """A storage of one file, `_conn_string`."""

    _conn_string: str

    @contextmanager
    def connect(self) -> Iterator[Connection]:
        with _kept(self._conn_string).begin() as connection:
            yield connection


class _Runs(_OneFile, KeptRuns, SqliteRunStorage):
    @classmethod
    def from_local(cls, base_dir: str, inst_data: ConfigurableClassData | None = None) -> _Runs:
        url = create_db_conn_string(base_dir, "runs")
        return cls(url, inst_data) if _made(_kept(url)) else super().from_local(base_dir, inst_data)


class _Schedules(_OneFile, KeptSchedules, SqliteScheduleStorage):
    @classmethod
    def from_local(cls, base_dir: str, inst_data: ConfigurableClassData | None = None) -> SqliteScheduleStorage:
        url = create_db_conn_string(base_dir, "schedules")
        return cls(url, inst_data) if _made(_kept(url)) else super().from_local(base_dir, inst_data)


class _Events(KeptEvents, SqliteEventLogStorage):
    def _initdb(self, engine: sa.Engine, for_index_shard: bool = False) -> None:
        if not _made(engine):
            super()._initdb(engine, for_index_shard)

    @contextmanager
    def _connect(self, shard: str) -> Iterator[Connection]:
        with self._db_lock:
            engine = (_kept if shard == INDEX_SHARD_NAME else _of_run)(self.conn_string_for_shard(shard))
            if shard not in self._initialized_dbs:
                self._initdb(engine)
                self._initialized_dbs.add(shard)
            with engine.begin() as connection:
                yield connection


class KeptSqliteStorage(CompositeStorage):
    """The files are those of Dagster's own `DagsterSqliteStorage`, and so is the configuration: `base_dir`, the folder."""

    def __init__(self, base_dir: str, inst_data: ConfigurableClassData | None = None) -> None:
        runs, events, schedules = (str(Path(base_dir, folder)) for folder in ("history", "history/runs", "schedules"))
        super().__init__(_Runs.from_local(runs), _Events(events), _Schedules.from_local(schedules), inst_data)

    @classmethod
    def config_type(cls) -> Any:
        return {"base_dir": StringSource}

    @classmethod
    def from_config_value(cls, inst_data: ConfigurableClassData | None, config_value: Any) -> KeptSqliteStorage:
        return cls(config_value["base_dir"], inst_data)
