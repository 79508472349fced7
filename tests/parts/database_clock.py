"""A database whose clock a test sets: what an engine's statements and procedures take for now, on SQLite as on MariaDB."""

from __future__ import annotations

import datetime as dt
from typing import Any

import sqlalchemy as sa
from sqlalchemy import event

from mail_pipelines.database.engine import is_mysql


class DatabaseClock:
    """The clock of an engine's connections, which stands until it is set. Other connections to the same database keep the true time."""

    def __init__(self, engine: sa.Engine, now: dt.datetime) -> None:
        self.now = now
        # Those that are open would not know of it.
        engine.dispose()
        if is_mysql(engine):
            event.listen(engine, "begin", self._set_session)
        else:
            event.listen(engine, "connect", self._take_over)

    def set(self, now: dt.datetime) -> None:
        self.now = now

    def _set_session(self, connection: sa.Connection) -> None:
        connection.exec_driver_sql(f"SET SESSION timestamp = {self.now.timestamp():.6f}")

    def _take_over(self, connection: Any, _record: object) -> None:
        def strftime(form: str, when: str) -> str:
            assert (form, when) == ("%Y-%m-%d %H:%M:%f", "now")
            return self.now.strftime("%Y-%m-%d %H:%M:%S.") + f"{self.now.microsecond // 1000:03d}"

        connection.create_function("strftime", 2, strftime)
