"""Engines and transactions, with the rules every connection keeps.

* MySQL/MariaDB: READ COMMITTED (checked at connect), UTC, strict mode; lock time-outs (1205), deadlocks (1213) and
  changed-record errors (1020) are retried.
* SQLite: WAL, `synchronous=FULL`, a busy time-out of 30 s, and `BEGIN IMMEDIATE` for every write. The standard driver
  would begin deferred, and turning a read into a write then fails at once instead of waiting. Writers take turns (`turns`).

Use `transact` for every write and `reading` for reads.
"""

from __future__ import annotations

import datetime as dt
import random
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, TypeVar

import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.engine import Connection, Engine

from mail_pipelines.config import DatabaseSettings, mask_url
from mail_pipelines.database import turns
from mail_pipelines.database.types import utc_now
from mail_pipelines.errors import MailPipelinesError

T = TypeVar("T")
BUSY_TIMEOUT_SECONDS = 30
_NOW = sa.select(utc_now())
# No transaction of ours is idle for so long between two statements. What is has been stopped, and its locks keep everybody else from its rows.
IDLE_TRANSACTION_SECONDS = 60
RETRIED_MYSQL_ERRORS = {1205, 1213, 1020}
RETRIES = 8


class DatabaseError(MailPipelinesError):
    """The central database cannot be used as asked."""


class DatabaseUnreachable(DatabaseError):
    """No connection, a wrong password, or a lock held for too long."""


def is_mysql(bind: Engine | Connection) -> bool:
    return bind.dialect.name in ("mysql", "mariadb")


def create_engine(url: str, password: str | None = None, *, answer_seconds: float | None = None) -> Engine:
    """An engine for a `sqlite:///`, `mysql+pymysql://` or `mariadb+pymysql://` URL that keeps the rules above.

    `answer_seconds`: MySQL/MariaDB is waited for no longer, also at a single statement; without it for ever, as long as the connection stands.
    Raises `DatabaseError` if the URL is none of these. Connects only when used.
    """
    try:
        parsed = sa.make_url(url)
    except sa.exc.ArgumentError as error:
        raise DatabaseError("database.url is not a database URL; expected sqlite:///FILE or mysql+pymysql://USER@HOST/NAME") from error
    if password:
        parsed = parsed.set(password=password)
    backend = parsed.get_backend_name()
    if backend == "sqlite":
        if parsed.database and parsed.database != ":memory:":
            Path(parsed.database).parent.mkdir(parents=True, exist_ok=True)
        engine = sa.create_engine(
            parsed, hide_parameters=True, connect_args={"timeout": BUSY_TIMEOUT_SECONDS, "isolation_level": None, "check_same_thread": False}
        )
        event.listen(engine, "connect", _prepare_sqlite)
        event.listen(engine, "begin", _begin_sqlite)
        return engine
    if backend in ("mysql", "mariadb"):
        parsed = parsed.set(drivername=f"{backend}+pymysql")
        engine = sa.create_engine(
            parsed,
            isolation_level="READ COMMITTED",
            pool_pre_ping=True,
            pool_recycle=1800,
            # Parameters are addresses and names: they must not get into errors, and so into logs.
            hide_parameters=True,
            # found_rows: an UPDATE counts the rows it matched, as SQLite does, not only those it changed.
            connect_args={
                "charset": "utf8mb4",
                "local_infile": True,
                "connect_timeout": 10,
                "read_timeout": answer_seconds,
                "write_timeout": answer_seconds,
                "client_flag": 2,
                "autocommit": False,
            }
            | _without_tls(parsed),
        )
        event.listen(engine, "connect", _prepare_mysql)
        return engine
    raise DatabaseError(f"database.url names {backend}, expected sqlite, mysql or mariadb")


def open_engine(settings: DatabaseSettings, *, answer_seconds: float | None = None) -> Engine:
    return create_engine(settings.url, settings.password, answer_seconds=answer_seconds)


def _without_tls(url: sa.URL) -> dict[str, bool]:
    """PyMySQL would try TLS where the URL says nothing of it, without verifying, and read all authorities of the host for each connection: 24 ms of the
    processor. A database on the same host is spoken to without.
    """
    local = url.host in ("127.0.0.1", "::1", "localhost", None)
    return {"ssl_disabled": True} if local and not any(name.startswith("ssl") for name in url.query) else {}


def _prepare_sqlite(connection: Any, _record: object) -> None:
    cursor = connection.cursor()
    for pragma in ("journal_mode=WAL", "synchronous=FULL", f"busy_timeout={BUSY_TIMEOUT_SECONDS * 1000}", "foreign_keys=ON", "temp_store=MEMORY"):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def _begin_sqlite(connection: Connection) -> None:
    connection.exec_driver_sql("BEGIN IMMEDIATE" if connection.get_execution_options().get("writing") else "BEGIN")


def _prepare_mysql(connection: Any, _record: object) -> None:
    with connection.cursor() as cursor:
        cursor.execute("SET SESSION time_zone = '+00:00', SESSION sql_mode = 'STRICT_ALL_TABLES,NO_ZERO_DATE,NO_ENGINE_SUBSTITUTION'")
        cursor.execute("SET SESSION innodb_lock_wait_timeout = 30")
        if "MariaDB" in connection.get_server_info():
            cursor.execute("SET SESSION idle_write_transaction_timeout = %s", (IDLE_TRANSACTION_SECONDS,))
        cursor.execute("SET SESSION TRANSACTION ISOLATION LEVEL READ COMMITTED")
        cursor.execute("SHOW VARIABLES WHERE Variable_name IN ('tx_isolation', 'transaction_isolation')")
        levels = {row[1] for row in cursor.fetchall()}
    if levels != {"READ-COMMITTED"}:
        raise DatabaseError(f"the database keeps isolation level {', '.join(sorted(levels))}; the ledger needs READ-COMMITTED")


def _mysql_code(error: sa.exc.DBAPIError) -> int | None:
    arguments: tuple[Any, ...] = getattr(error.orig, "args", ())
    return arguments[0] if arguments and isinstance(arguments[0], int) else None


def is_transient(error: sa.exc.DBAPIError) -> bool:
    """Whether trying the whole transaction again can help. (SQLite has waited for its lock long enough by itself.)"""
    return _mysql_code(error) in RETRIED_MYSQL_ERRORS


@contextmanager
def reading(engine: Engine, *, of_one_moment: bool = False) -> Iterator[Connection]:
    """A read transaction, rolled back at its end. With `of_one_moment` all its statements see what the first one saw, as they always do on SQLite."""
    with explained(engine), engine.connect() as connection:
        if of_one_moment and is_mysql(engine):
            connection.execution_options(isolation_level="REPEATABLE READ")
        yield connection


def transact(engine: Engine, work: Callable[[Connection], T]) -> T:
    """Run `work` in one write transaction and commit; run it again if the database asks for that.

    `work` may therefore run several times and must have no effect outside the connection.
    Raises `DatabaseUnreachable` when the database is away or stays locked.
    """
    with explained(engine):
        for attempt in range(RETRIES):
            try:
                with _in_turn(engine), engine.connect().execution_options(writing=True) as connection, connection.begin():
                    return work(connection)
            except sa.exc.OperationalError as error:
                if not is_transient(error) or attempt == RETRIES - 1:
                    raise
                time.sleep(random.uniform(0, 0.02 * 2**attempt))
    raise AssertionError("unreachable")


def _in_turn(engine: Engine) -> AbstractContextManager[None]:
    file = engine.url.database
    return nullcontext() if is_mysql(engine) or file in (None, "", ":memory:") else turns.turn(file, BUSY_TIMEOUT_SECONDS)


@contextmanager
def explained(engine: Engine) -> Iterator[None]:
    """Turn the driver's connection errors into `DatabaseUnreachable`, which says what to check."""
    try:
        yield
    except sa.exc.DBAPIError as error:
        where = mask_url(engine.url.render_as_string(hide_password=False))
        if "database is locked" in str(error.orig):
            raise DatabaseUnreachable(f"{where} stayed locked for {BUSY_TIMEOUT_SECONDS} s: another program holds a write transaction open") from error
        if "unable to open database file" in str(error.orig):
            raise DatabaseUnreachable(f"{where} cannot be opened: check that its folder exists and may be written") from error
        if _mysql_code(error) == 2013 and "(timed out)" in _words(error):
            raise DatabaseUnreachable(f"{where} takes connections and does not answer: look at the database and its host (full disk? no memory?)") from error
        if error.connection_invalidated or _mysql_code(error) in {1044, 1045, 1049, 2002, 2003, 2005, 2006, 2013}:
            raise DatabaseUnreachable(f"no connection to {where}: {_words(error)}; check database.url, the password and that the server runs") from error
        if "no such table" in str(error.orig) or _mysql_code(error) in {1146, 1305}:
            raise DatabaseError(f"{where} has no or an older schema, or lacks a stored procedure; run `mail-pipelines init`") from error
        raise


def _words(error: sa.exc.DBAPIError) -> str:
    arguments: tuple[Any, ...] = getattr(error.orig, "args", ())
    return str(arguments[1] if len(arguments) > 1 else error.orig)


def database_id(connection: Connection) -> int | None:
    """The `server_id` of the MySQL/MariaDB server that answers, which no two servers of a replication share; None on SQLite."""
    return int(connection.exec_driver_sql("SELECT @@server_id").scalar_one()) if is_mysql(connection) else None


def database_now(connection: Connection) -> dt.datetime:
    """The database's clock, the only one that leases are judged by (on SQLite that is this host's)."""
    return connection.execute(_NOW).scalar_one()
