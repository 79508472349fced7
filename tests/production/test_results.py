"""Results of runs in MySQL/MariaDB: what a worker has said last, for as long as a run may last."""

from __future__ import annotations

import datetime as dt

import pytest
import sqlalchemy as sa
from celery import Celery
from sqlalchemy.engine import Engine

from mail_pipelines.resources import results, tasks
from mail_pipelines.resources.results import Results

pytestmark = [pytest.mark.server, pytest.mark.parametrize("database_url", ["mariadb"], indirect=True)]


@pytest.fixture
def backend(engine: Engine) -> Results:
    app = Celery(backend=tasks._results(f"db+{engine.url.render_as_string(hide_password=False)}"))
    app.conf.update(accept_content=["json"], result_expires=tasks.RESULT_SECONDS)
    assert isinstance(app.backend, Results)
    return app.backend


def test_the_last_word_counts_and_success_is_final(backend: Results) -> None:
    assert backend.get_task_meta("run", cache=False)["status"] == "PENDING"
    for state, result in (("STARTED", {"pid": 1}), ("FAILURE", RuntimeError("no")), ("SUCCESS", 1), ("FAILURE", RuntimeError("late"))):
        backend.store_result("run", result, state)
    found = backend.get_task_meta("run", cache=False)
    assert (found["status"], found["result"]) == ("SUCCESS", 1)
    backend.forget("run")
    assert backend.get_task_meta("run", cache=False)["status"] == "PENDING"


def test_old_results_are_deleted(backend: Results, engine: Engine) -> None:
    for run in ("old", "new"):
        backend.store_result(run, 0, "SUCCESS")
    with engine.begin() as connection:
        old = dt.datetime.now(dt.UTC) - dt.timedelta(seconds=tasks.RESULT_SECONDS + 60)
        connection.execute(sa.update(results._table).where(results._table.c.run_id == "old").values(changed_at=old))
    backend.cleanup()
    assert [backend.get_task_meta(run, cache=False)["status"] for run in ("old", "new")] == ["PENDING", "SUCCESS"]


def test_what_is_refused_is_not_tried_again(backend: Results, engine: Engine) -> None:
    """A worker would wait for a minute and a half before it says so."""
    backend.make_table()
    with pytest.raises(sa.exc.DBAPIError) as away:
        Results(app=backend.app, url="mysql+pymysql://nobody@127.0.0.1:1/x").get(b"run")
    assert backend.exception_safe_to_retry(away.value)
    with engine.begin() as connection:
        connection.exec_driver_sql("CREATE VIEW checked AS SELECT * FROM run_results WHERE run_id = 'own' WITH CHECK OPTION")
    with pytest.raises(sa.exc.DBAPIError) as refused, engine.begin() as connection:
        connection.exec_driver_sql("INSERT INTO checked VALUES ('other', '{}', NOW())")
    assert not backend.exception_safe_to_retry(refused.value)
