"""Dagster's storage as daemon, web server and runs have it: what was opened and asked once is kept, and it is the same that all others see."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
import sqlalchemy as sa
import yaml
from dagster._core.instance.ref import InstanceRef

from mail_pipelines.benchmarks.mariadb import MariaDB
from mail_pipelines.dagster_process import kept
from tests.conftest import BACKENDS


@pytest.fixture(params=BACKENDS)
def dagster_home(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    storage = {"mysql": {"mysql_url": _url(request.getfixturevalue("mariadb"))}} if request.param == "mariadb" else {"sqlite": {"base_dir": str(tmp_path)}}
    return _home(tmp_path, storage)


def _url(server: MariaDB) -> str:
    return f"{server.database()}?ssl_disabled=true"


def _home(folder: Path, storage: dict[str, Any]) -> str:
    (folder / "dagster.yaml").write_text(yaml.safe_dump({"storage": storage}), encoding="utf-8")
    return str(folder)


@contextmanager
def _counted() -> Iterator[Counter[str]]:
    """Connections that are made in this block, and statements."""
    done: Counter[str] = Counter()

    def connected(*_: object) -> None:
        done["connections"] += 1

    def executed(_connection: sa.Connection, _cursor: object, statement: str, *_: object) -> None:
        done[statement.split()[0]] += 1

    listeners = [("connect", connected), ("before_cursor_execute", executed)]
    for name, listener in listeners:
        sa.event.listen(sa.Engine, name, listener)
    try:
        yield done
    finally:
        for name, listener in listeners:
            sa.event.remove(sa.Engine, name, listener)


def _ask(instance: dg.DagsterInstance) -> None:
    instance.all_instigator_state()
    instance.get_run_records(limit=1)
    instance.get_dynamic_partitions("campaigns")


def test_a_query_is_one_statement_on_a_connection_that_is_there(dagster_home: str) -> None:
    with dg.DagsterInstance.from_ref(kept(dagster_home)) as instance:
        _ask(instance)
        with _counted() as done:
            _ask(instance)
    assert done == {"SELECT": 3}


def test_it_is_what_others_see_who_have_dagsters_own(dagster_home: str) -> None:
    @dg.asset
    def numbers() -> None:
        pass

    with dg.DagsterInstance.from_ref(kept(dagster_home)) as instance, dg.DagsterInstance.from_config(dagster_home) as others:
        assert type(instance.run_storage) is not type(others.run_storage)
        run = dg.materialize([numbers], instance=instance).run_id
        assert others.get_run_by_id(run).status is dg.DagsterRunStatus.SUCCESS  # type: ignore[union-attr]
        assert others.get_latest_materialization_event(numbers.key) is not None
        assert [entry.message for entry in others.all_logs(run)] == [entry.message for entry in instance.all_logs(run)]
        others.add_dynamic_partitions("campaigns", ["spring"])
        assert instance.get_dynamic_partitions("campaigns") == ["spring"]
        # A run's file goes with the run: nobody has it open then.
        assert [file for file in map(Path.resolve, Path("/proc/self/fd").iterdir()) if file.name.startswith(run)] == []


def test_what_is_missing_is_looked_for_again(dagster_home: str) -> None:
    """As after an upgrade beside it."""
    with dg.DagsterInstance.from_ref(kept(dagster_home)) as instance:
        events: Any = instance.event_log_storage
        assert not events.has_table("later")
        with events.index_connection() as connection:
            connection.execute(sa.text("CREATE TABLE later (id INTEGER)"))
        assert events.has_table("later")


@pytest.mark.server
def test_a_connection_that_the_database_has_ended_is_replaced(mariadb: MariaDB, tmp_path: Path) -> None:
    url = _url(mariadb)
    with dg.DagsterInstance.from_ref(kept(_home(tmp_path, {"mysql": {"mysql_url": url}}))) as instance:
        _ask(instance)
        with mariadb.connect() as connection, connection.cursor() as cursor:
            cursor.execute("SELECT id FROM information_schema.processlist WHERE db = %s", [sa.make_url(url).database])
            (number,) = cursor.fetchone() or ()
            cursor.execute("KILL %s", [number])
        with _counted() as done:
            _ask(instance)
    assert done["connections"] == 1


def test_another_storage_is_left_as_it_is(tmp_path: Path) -> None:
    folder = _home(tmp_path, {"postgres": {"postgres_url": "postgresql://db/dagster"}})
    assert kept(folder) == InstanceRef.from_dir(folder)
