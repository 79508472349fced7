"""Fixtures shared by all tests. `engine` runs a test once on SQLite and once on MariaDB, each with a fresh, current schema."""

from __future__ import annotations

import gc
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest
import sqlalchemy as sa

from mail_pipelines.benchmarks.mariadb import MariaDB
from mail_pipelines.database import migrate
from mail_pipelines.database.engine import DatabaseError, create_engine
from mail_pipelines.database.models import Base

# No deadline: a busy machine is no bug.
hypothesis.settings.register_profile("project", deadline=None)
hypothesis.settings.load_profile("project")

# No test, and no fixture of a module, reads the developer's configuration.
for _name in [name for name in os.environ if name.startswith(("MAIL_PIPELINES_", "DAGSTER_"))]:
    del os.environ[_name]


def pytest_collection_finish() -> None:
    """What is there now stays to the end: else each full garbage collection looks through all of it again, over 400 000 objects."""
    gc.freeze()


BACKENDS = ["sqlite", pytest.param("mariadb", marks=pytest.mark.server)]


@pytest.fixture(autouse=True)
def _own_home(tmp_path: Path) -> Iterator[None]:
    """No test writes into the checkout, asks the real DNS, or leaves settings to the next."""
    before = dict(os.environ)
    os.environ["MAIL_PIPELINES_HOME"] = str(tmp_path / "home")
    os.environ["MAIL_PIPELINES_SENDING__ALLOW_UNVERIFIED"] = "true"
    os.environ["MAIL_PIPELINES_DNS__BLOCK_LIST_HOURS"] = "0"
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="session")
def mariadb(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MariaDB]:
    # What a power failure does to it is no matter, and every commit waits for the disk otherwise. Tests of that start their own.
    server = MariaDB(tmp_path_factory.mktemp("mariadb"), options=("--innodb-flush-method=nosync",)).start()
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


class EmptyDatabases:
    """One MariaDB schema after the other: emptied after a test and used again, since making all tables takes half a second."""

    def __init__(self, server: MariaDB) -> None:
        self.server = server
        self._free: list[str] = []

    def take(self) -> str:
        if self._free:
            return self._free.pop()
        url = self.server.database()
        engine = create_engine(url)
        migrate.upgrade(engine)
        engine.dispose()
        return url

    def give_back(self, url: str) -> None:
        """Empty what has rows. A table that somebody still holds, or that is no longer as made, ends the schema."""
        engine = create_engine(url)
        try:
            with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
                connection.exec_driver_sql("SET SESSION foreign_key_checks = 0, SESSION lock_wait_timeout = 2, SESSION innodb_lock_wait_timeout = 2")
                found = connection.exec_driver_sql("SHOW FULL TABLES WHERE Table_type = 'BASE TABLE'")
                tables = [row[0] for row in found if row[0] != "alembic_version"]
                assert set(tables) == set(Base.metadata.tables)
                query = " UNION ALL ".join(f"SELECT '{table}', EXISTS (SELECT 1 FROM `{table}`)" for table in tables)
                for table in [row[0] for row in connection.exec_driver_sql(query) if row[1]]:
                    connection.exec_driver_sql(f"TRUNCATE TABLE `{table}`")
            assert migrate.revision(engine) == migrate.newest_revision()
            migrate.upgrade(engine)
            self._free.append(url)
        except (AssertionError, sa.exc.DBAPIError, DatabaseError):
            self.server.drop(url)
        finally:
            engine.dispose()


@pytest.fixture(scope="session")
def _empty_databases(mariadb: MariaDB) -> EmptyDatabases:
    return EmptyDatabases(mariadb)


@pytest.fixture(params=BACKENDS)
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """The URL of an empty database at the current schema."""
    if request.param == "sqlite":
        path = tmp_path / "central.sqlite3"
        shutil.copy(request.getfixturevalue("_sqlite_template"), path)
        yield f"sqlite:///{path}"
        return
    databases: EmptyDatabases = request.getfixturevalue("_empty_databases")
    url = databases.take()
    yield url
    databases.give_back(url)


@pytest.fixture
def engine(database_url: str) -> Iterator[sa.Engine]:
    engine = create_engine(database_url)
    yield engine
    engine.dispose()


@pytest.fixture
def both_engines(tmp_path: Path, _sqlite_template: Path, _empty_databases: EmptyDatabases) -> Iterator[tuple[sa.Engine, sa.Engine]]:
    """SQLite and MariaDB at once, each with an empty database: for tests that compare them."""
    path = tmp_path / "central.sqlite3"
    shutil.copy(_sqlite_template, path)
    url = _empty_databases.take()
    engines = create_engine(f"sqlite:///{path}"), create_engine(url)
    yield engines
    for engine in engines:
        engine.dispose()
    _empty_databases.give_back(url)
