"""What Dagster's storages ask their schema again and again, asked once.

Dagster goes on with older schemas, and so looks before most queries whether a table, a column or an index is there yet: half of the queries of a sensor's tick.
What is there stays there; what is not is looked for again.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable

from dagster._core.storage.event_log.sql_event_log import SqlEventLogStorage
from dagster._core.storage.runs.sql_run_storage import SqlRunStorage
from dagster._core.storage.schedules.sql_schedule_storage import SqlScheduleStorage
from sqlalchemy.engine import Connection


class _Remembering:
    def _once(self, what: Hashable, ask: Callable[[], bool]) -> bool:
        # The storages ask already while they are being made.
        seen: set[Hashable] = self.__dict__.setdefault("_seen", set())
        if what not in seen and ask():
            seen.add(what)
        return what in seen


class KeptRuns(_Remembering, SqlRunStorage):
    def has_built_index(self, migration_name: str) -> bool:
        return self._once(migration_name, lambda: super(KeptRuns, self).has_built_index(migration_name))

    def has_run_stats_index_cols(self) -> bool:
        return self._once("start and end of runs", super().has_run_stats_index_cols)


class KeptEvents(_Remembering, SqlEventLogStorage):
    def has_table(self, table_name: str) -> bool:
        return self._once(("table", table_name), lambda: super(KeptEvents, self).has_table(table_name))  # type: ignore[safe-super]

    def has_secondary_index(self, name: str) -> bool:
        return self._once(("index", name), lambda: super(KeptEvents, self).has_secondary_index(name))


class KeptSchedules(_Remembering, SqlScheduleStorage):
    def has_instigators_table(self) -> bool:
        return self._once("instigators", super().has_instigators_table)

    def _has_instigators_table(self, conn: Connection) -> bool:
        return self._once("instigators", lambda: super(KeptSchedules, self)._has_instigators_table(conn))

    def has_built_index(self, migration_name: str) -> bool:
        return self._once(migration_name, lambda: super(KeptSchedules, self).has_built_index(migration_name))
