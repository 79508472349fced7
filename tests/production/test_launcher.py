"""Cancelling a run: of which the worker has said how it ended, and Dagster's storage has not; and whom that is told."""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
import sqlalchemy as sa
from dagster._serdes import ConfigurableClassData
from sqlalchemy.engine import Engine

from mail_pipelines import home
from mail_pipelines.database.models import Server
from mail_pipelines.dispatch import servers
from mail_pipelines.resources import queues, tasks
from mail_pipelines.resources.launcher import QueueLauncher

Status = dg.DagsterRunStatus


@pytest.fixture
def launcher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[QueueLauncher]:
    """The centre's, of an instance that keeps what it knows in memory."""
    shipped = home._shipped_dagster_yaml
    monkeypatch.setattr(home, "_shipped_dagster_yaml", lambda _production: shipped(False))
    monkeypatch.setenv("MAIL_PIPELINES_BROKER__URL", f"filesystem://{tmp_path}/broker")
    monkeypatch.setenv("MAIL_PIPELINES_BROKER__RESULTS", f"file://{tmp_path}")
    home.make(production=True)
    launcher = QueueLauncher(ConfigurableClassData("mail_pipelines.resources.launcher", "QueueLauncher", "{}"))
    with dg.DagsterInstance.ephemeral() as instance:
        launcher.register_instance(instance)
        yield launcher


def started_run(launcher: QueueLauncher) -> dg.DagsterRun:
    run = dg.DagsterRun(job_name="maintenance", status=Status.STARTED, tags={queues.QUEUE_TAG: queues.CENTRE})
    return launcher._instance.add_run(run)


def status(launcher: QueueLauncher, run: dg.DagsterRun) -> Status:
    found = launcher._instance.get_run_by_id(run.run_id)
    assert found is not None
    return found.status


@pytest.mark.parametrize(("state", "result"), [("SUCCESS", 1), ("SUCCESS", 0), ("FAILURE", RuntimeError("the worker lost its child"))], ids=["1", "0", "lost"])
def test_a_run_whose_process_has_ended_is_canceled_at_once(launcher: QueueLauncher, state: str, result: object) -> None:
    """There is no process left that could say so, and Dagster would wait for `cancel_timeout_seconds`."""
    run = started_run(launcher)
    launcher.celery.backend.store_result(run.run_id, result, state)
    assert launcher.terminate(run.run_id)
    assert status(launcher, run) is Status.CANCELED
    assert not launcher.terminate(run.run_id)


def test_a_run_that_ends_while_it_is_cancelled_is_canceled_at_once(launcher: QueueLauncher, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own last word comes before that of the cancellation, of which no process hears any more."""
    run, instance = started_run(launcher), launcher._instance
    record = instance.report_run_canceling

    def end_first(*arguments: Any) -> None:
        instance.report_dagster_event(dg.DagsterEvent(dg.DagsterEventType.RUN_SUCCESS.value, run.job_name, message="It is done."), run.run_id)
        record(*arguments)

    monkeypatch.setattr(instance, "report_run_canceling", end_first)
    assert launcher.terminate(run.run_id)
    assert status(launcher, run) is Status.CANCELED


@pytest.mark.parametrize(("state", "result"), [("STARTED", None), ("REVOKED", None), ("SUCCESS", tasks.IGNORED)], ids=["works", "told", "ordered twice"])
def test_a_run_whose_process_works_says_itself_that_it_has_ended(launcher: QueueLauncher, state: str, result: object) -> None:
    run = started_run(launcher)
    launcher.celery.backend.store_result(run.run_id, result, state)
    assert launcher.terminate(run.run_id)
    assert status(launcher, run) is Status.CANCELING
    assert launcher.check_run_worker_health(run).status.name == "RUNNING"


def test_a_killed_process_that_had_finished_a_cancelled_run_fails_the_run_it_was_at(launcher: QueueLauncher) -> None:
    """Celery says of it what it says of a run that has been told to end."""
    run = started_run(launcher)
    launcher.celery.backend.store_result(run.run_id, None, "REVOKED")
    assert launcher.check_run_worker_health(run).status.name == "FAILED"


def test_a_cancellation_goes_to_the_worker_that_may_have_the_run(engine: Engine, launcher: QueueLauncher, monkeypatch: pytest.MonkeyPatch) -> None:
    now = dt.datetime.now(dt.UTC)
    for key in ("s1", "s2", "s3"):
        servers.register(engine, key, kind="exim", host="127.0.0.1", port=25, now=now)
    monkeypatch.setenv("MAIL_PIPELINES_DATABASE__URL", engine.url.render_as_string(hide_password=False))
    with engine.begin() as connection:
        connection.execute(sa.update(Server).where(Server.key != "s3").values(health={"worker": "s1"}))
        # It would have the centre's account make an exchange of this name.
        connection.execute(sa.update(Server).where(Server.key == "s3").values(health={"worker": "amq.direct"}))
    assert [launcher._listening(queue) for queue in ("s1", "s2-ctl", "s3", "centre")] == [["s1"], ["s1"], ["s3"], ["centre"]]
    assert launcher._listening("dispatch") == ["s1", "s3"]
