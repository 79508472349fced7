"""The benchmark of external sources syncs every row that it reads."""

from __future__ import annotations

import pytest

from mail_pipelines.benchmarks import sync
from mail_pipelines.benchmarks.mariadb import MariaDB
from mail_pipelines.database import migrate
from mail_pipelines.database.engine import create_engine


@pytest.mark.server
def test_the_customers_of_the_benchmark_are_synced_twice(mariadb: MariaDB) -> None:
    url = mariadb.database()
    engine = create_engine(url)
    migrate.upgrade(engine)
    said: list[str] = []
    # Raises if a row is not where it belongs.
    results = sync.run(2_000, engine, said.append, lambda: [mariadb.process.pid] if mariadb.process else [])
    assert [result.name for result in results] == [f"synced (2,000 customers, {what}, mysql)" for what in ("all new", "one in twenty changed")]
    assert all(result.unit == "rows/s" and result.ratio > 0 for result in results)
    assert "of the database" in said[-1]
    engine.dispose()
    mariadb.drop(url)
