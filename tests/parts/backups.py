"""A backup of a whole small database, and its restore."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import sqlalchemy as sa

from mail_pipelines.database.engine import transact
from mail_pipelines.database.models import Base


class Backup:
    """All rows of all tables, as they were when it was made."""

    def __init__(self, engine: sa.Engine) -> None:
        # As `mariadb-dump --single-transaction` makes one: all tables at one moment.
        level = {} if engine.dialect.name == "sqlite" else {"isolation_level": "REPEATABLE READ"}
        with engine.connect().execution_options(**level) as connection:
            self._rows: dict[sa.Table, list[dict[str, Any]]] = {
                table: [dict(row._mapping) for row in connection.execute(sa.select(table))] for table in Base.metadata.sorted_tables
            }

    def rows(self, table: sa.FromClause) -> list[dict[str, Any]]:
        return next(rows for known, rows in self._rows.items() if known is table)

    def restore(self, engine: sa.Engine) -> None:
        # Whoever still sends has locks, and the database ends one of two that wait for each other.
        transact(engine, self.put_back)

    def put_back(self, connection: sa.Connection) -> None:
        """Within the caller's transaction."""
        if connection.dialect.name != "sqlite":
            connection.exec_driver_sql("SET SESSION foreign_key_checks = 0")
        for table in reversed(self._rows):
            connection.execute(sa.delete(table))
        for table, rows in self._rows.items():
            if rows:
                connection.execute(sa.insert(table), rows)
        if connection.dialect.name != "sqlite":
            connection.exec_driver_sql("SET SESSION foreign_key_checks = 1")

    def restore_table(self, engine: sa.Engine, table: sa.FromClause) -> None:
        with engine.begin() as connection:
            connection.execute(sa.insert(Base.metadata.tables[str(table)]), self.rows(table))


def dump(engine: sa.Engine, path: Path) -> None:
    """All rows of a MariaDB at one moment, as a file that its client reads: all tables change at once."""
    lines = ["SET NAMES utf8mb4, foreign_key_checks = 0;", "BEGIN;"]
    with engine.connect().execution_options(isolation_level="REPEATABLE READ") as connection:
        driver: Any = connection.connection.driver_connection
        for table in Base.metadata.sorted_tables:
            columns = ", ".join(f"`{column.name}`" for column in table.c)
            lines.append(f"DELETE FROM `{table.name}`;")
            for row in connection.exec_driver_sql(f"SELECT {columns} FROM `{table.name}`"):
                lines.append(f"INSERT INTO `{table.name}` ({columns}) VALUES ({', '.join(driver.literal(value) for value in row)});")
    path.write_text("\n".join([*lines, "COMMIT;", ""]), encoding="utf-8")
