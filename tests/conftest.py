"""Fixtures shared by all tests. `engine` runs a test once on SQLite and once on MariaDB, each with a fresh, current schema."""

from __future__ import annotations

import functools
import gc
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import sqlalchemy as sa
import typer.main
import typer.testing
from alembic.config import Config
from alembic.script import ScriptDirectory

from mail_pipelines.benchmarks.mariadb import MariaDB
from mail_pipelines.database import migrate
from mail_pipelines.database.engine import DatabaseError, create_engine
from mail_pipelines.database.models import Base

# No deadline, and no health check of speed: a busy machine is no bug.
hypothesis.settings.register_profile("project", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("project")

# No test, and no fixture of a module, reads the developer's configuration.
for _name in [name for name in os.environ if name.startswith(("MAIL_PIPELINES_", "DAGSTER_"))]:
    del os.environ[_name]


# Hardly anything that is made until all tests are known is garbage.
gc.disable()


def pytest_collection_finish() -> None:
    """What is there now stays to the end: else each full garbage collection looks through all of it again, over 400 000 objects."""
    gc.freeze()
    gc.enable()
    # By default it looks through what a test still needs at every 700th new object.
    gc.set_threshold(20_000, 10, 10)


class _Compiled(dict[Any, Any]):
    """What statements become for a kind of database, whichever test asks first: a process of ours has one engine, whose cache is warm; a test has its own."""

    MOST = 4000

    @staticmethod
    def _kind(key: tuple[sa.Dialect, Any]) -> Any:
        dialect, *rest = key
        return type(dialect), dialect.server_version_info, dialect.paramstyle, *rest

    def get(self, key: Any, default: Any = None) -> Any:
        return super().get(self._kind(key), default)

    def __setitem__(self, key: Any, compiled: Any) -> None:
        if len(self) >= self.MOST:
            self.clear()
        super().__setitem__(self._kind(key), compiled)


_COMPILED = _Compiled()


@sa.event.listens_for(sa.Engine, "engine_connect")
def _compile_once(connection: sa.Connection) -> None:
    connection.execution_options(compiled_cache=_COMPILED)


_directory_of = ScriptDirectory.from_config
_DIRECTORIES: dict[str, ScriptDirectory] = {}


def _read_once(config: Config) -> ScriptDirectory:
    """Dagster has its sixty migrations read twice for every run, which has a SQLite file of its own, and three times for every instance."""
    location = str(config.get_main_option("script_location"))
    if not location.startswith("dagster"):
        return _directory_of(config)
    if location not in _DIRECTORIES:
        _DIRECTORIES[location] = _directory_of(config)
    return _DIRECTORIES[location]


ScriptDirectory.from_config = _read_once  # type: ignore[method-assign]

# All commands are read anew at each call otherwise, which takes ten times as long as what most of them do.
typer.testing._get_command = functools.cache(typer.main.get_command)  # type: ignore[attr-defined]

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
    # Without TLS, which newer versions have with a certificate of their own making.
    server = MariaDB(tmp_path_factory.mktemp("mariadb"), options=("--innodb-flush-method=nosync", "--skip-ssl")).start()
    yield server
    # In order it would take half a minute: nobody wants what is in it any more.
    server.kill()


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
