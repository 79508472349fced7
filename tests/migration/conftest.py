"""An installation of each system, made once: moving only reads it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import sqlalchemy as sa

from mail_pipelines.benchmarks.mariadb import MariaDB
from tests.migration import installations
from tests.parts.postgresql import PostgreSQL


@pytest.fixture(scope="session")
def interspire_url(mariadb: MariaDB) -> str:
    url = mariadb.database()
    installations.interspire(sa.create_engine(url))
    return url.replace("mysql+pymysql:", "mysql:")


@pytest.fixture(scope="session")
def mailwizz_url(mariadb: MariaDB) -> str:
    url = mariadb.database()
    installations.mailwizz(sa.create_engine(url))
    return url.replace("mysql+pymysql:", "mysql:")


@pytest.fixture(scope="session")
def listmonk_url() -> Iterator[str]:
    server = PostgreSQL()
    try:
        engine = server.engine()
        installations.listmonk(engine)
        engine.dispose()
        yield server.url
    finally:
        server.stop()
