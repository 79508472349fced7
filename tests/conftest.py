"""Fixtures shared by all tests. `engine` runs a test once on SQLite and once on MariaDB, each with a fresh, current schema."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa

from mail_pipelines.benchmarks.mariadb import MariaDB
from mail_pipelines.database import migrate
from mail_pipelines.database.engine import create_engine

BACKENDS = ["sqlite", pytest.param("mariadb", marks=pytest.mark.server)]


@pytest.fixture(autouse=True)
def _own_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No test reads the developer's configuration or writes into the checkout."""
    import os

    for name in list(os.environ):
        if name.startswith(("MAIL_PIPELINES_", "DAGSTER_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("MAIL_PIPELINES_HOME", str(tmp_path / "home"))


@pytest.fixture(scope="session")
def mariadb(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MariaDB]:
    server = MariaDB(tmp_path_factory.mktemp("mariadb")).start()
    yield server
    server.stop()


@pytest.fixture(scope="session")
def _sqlite_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("template") / "central.sqlite3"
    engine = create_engine(f"sqlite:///{path}")
    migrate.upgrade(engine)
    with engine.connect() as connection:
        connection.exec_driver_sql("PRAGMA wal_checkpoint(TRUNCATE)")
    engine.dispose()
    return path


@pytest.fixture(scope="session")
def _mariadb_template(mariadb: MariaDB) -> list[str]:
    """The statements that make the current schema, so that a test need not run the migrations."""
    url = mariadb.database()
    engine = create_engine(url)
    migrate.upgrade(engine)
    with engine.connect() as connection:
        tables = [row[0] for row in connection.exec_driver_sql("SHOW TABLES")]
        statements = [connection.exec_driver_sql(f"SHOW CREATE TABLE `{table}`").one()[1] for table in tables]
    engine.dispose()
    mariadb.drop(url)
    return statements


def _fresh_mariadb(mariadb: MariaDB, statements: list[str]) -> str:
    url = mariadb.database()
    engine = create_engine(url)
    with engine.begin() as connection:
        connection.exec_driver_sql("SET foreign_key_checks = 0")
        for statement in statements:
            connection.exec_driver_sql(statement.replace("%", "%%"))
        connection.exec_driver_sql("INSERT INTO alembic_version VALUES (%s)", (migrate.newest_revision(),))
        connection.exec_driver_sql("SET foreign_key_checks = 1")
    engine.dispose()
    migrate.upgrade(create_engine(url))
    return url


@pytest.fixture(params=BACKENDS)
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """The URL of an empty database at the current schema."""
    if request.param == "sqlite":
        path = tmp_path / "central.sqlite3"
        shutil.copy(request.getfixturevalue("_sqlite_template"), path)
        yield f"sqlite:///{path}"
        return
    server = request.getfixturevalue("mariadb")
    url = _fresh_mariadb(server, request.getfixturevalue("_mariadb_template"))
    yield url
    server.drop(url)


@pytest.fixture
def engine(database_url: str) -> Iterator[sa.Engine]:
    engine = create_engine(database_url)
    yield engine
    engine.dispose()
