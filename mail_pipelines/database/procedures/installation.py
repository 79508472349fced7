"""Putting the stored procedures into a MySQL/MariaDB database. SQLite has none, and every function here does nothing there.

The account that installs them is their definer: they run with its rights, whoever calls them.
"""

from __future__ import annotations

from pathlib import Path

from sqlalchemy.engine import Connection

from mail_pipelines.database.engine import is_mysql

_FOLDER = Path(__file__).parent


def names() -> list[str]:
    return sorted(path.stem for path in _FOLDER.glob("*.sql"))


def text(name: str) -> str:
    """The `CREATE PROCEDURE` statement with its comments."""
    return (_FOLDER / f"{name}.sql").read_text(encoding="utf-8")


def install(connection: Connection, name: str) -> None:
    """Create a procedure, or replace it by its present text."""
    put(connection, name, text(name))


def put(connection: Connection, name: str, statement: str) -> None:
    """Create a procedure by this statement, in the place of one that is there."""
    if is_mysql(connection):
        remove(connection, name)
        # Without parameters the driver leaves percent signs alone.
        connection.exec_driver_sql(statement, execution_options={"no_parameters": True})


def remove(connection: Connection, name: str) -> None:
    if is_mysql(connection):
        connection.exec_driver_sql(f"DROP PROCEDURE IF EXISTS {name}")


def install_missing(connection: Connection) -> list[str]:
    """Create those that the database lacks, and return their names: a dump leaves procedures out unless asked for them."""
    if not is_mysql(connection):
        return []
    query = "SELECT routine_name FROM information_schema.routines WHERE routine_schema = DATABASE() AND routine_type = 'PROCEDURE'"
    missing = sorted(set(names()) - set(connection.exec_driver_sql(query).scalars()))
    for name in missing:
        install(connection, name)
    return missing
