"""Dagster's storage in MySQL or MariaDB, with connections that are kept: dagster-mysql connects for every query."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from dagster._core.storage.config import mysql_config
from dagster._core.storage.legacy_storage import CompositeStorage
from dagster._serdes import ConfigurableClassData
from dagster_mysql.event_log import MySQLEventLogStorage
from dagster_mysql.run_storage import MySQLRunStorage
from dagster_mysql.schedule_storage import MySQLScheduleStorage
from dagster_mysql.utils import mysql_url_from_config

from mail_pipelines.resources.kept_schema import KeptEvents, KeptRuns, KeptSchedules


class _Runs(KeptRuns, MySQLRunStorage):  # type: ignore[misc]
    pass


class _Events(KeptEvents, MySQLEventLogStorage):
    pass


class _Schedules(KeptSchedules, MySQLScheduleStorage):
    pass


class KeptMySQLStorage(CompositeStorage):
    """Tables and configuration are those of dagster-mysql's own `DagsterMySQLStorage`."""

    def __init__(self, mysql_url: str, inst_data: ConfigurableClassData | None = None) -> None:
        storages = _Runs(mysql_url), _Events(mysql_url), _Schedules(mysql_url)
        # The database may have been started again, or have closed what was idle (`wait_timeout`): a connection is tried before it is used. Two are kept
        # open; nobody waits for one.
        engine = sa.create_engine(mysql_url, isolation_level="REPEATABLE READ", pool_size=2, max_overflow=-1, pool_pre_ping=True)
        for storage in storages:
            storage._engine = engine
        super().__init__(*storages, inst_data)

    @classmethod
    def config_type(cls) -> Any:
        return mysql_config()

    @classmethod
    def from_config_value(cls, inst_data: ConfigurableClassData | None, config_value: Any) -> KeptMySQLStorage:
        return cls(mysql_url_from_config(config_value), inst_data)
