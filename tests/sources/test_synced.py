"""The assets: made of declarations, thin, with the numbers; one source that fails keeps none of the others. Loading them imports no dlt."""

from __future__ import annotations

import datetime as dt
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import dagster as dg
import pytest
import sqlalchemy as sa

from mail_pipelines.definitions import build_defs
from mail_pipelines.sources.declaration import Source
from tests.sources.conftest import Declare, engaged, subscribed

pytestmark = pytest.mark.slow


@pytest.fixture
def instance(engine: sa.Engine, home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dg.DagsterInstance]:
    monkeypatch.setenv("MAIL_PIPELINES_DATABASE__URL", engine.url.render_as_string(hide_password=False))
    monkeypatch.setenv("MAIL_PIPELINES_HOME", str(home))
    # On disk: a schedule's context takes no other.
    with dg.instance_for_test() as instance:
        yield instance


@pytest.fixture
def sources(declare: Declare, tmp_path: Path) -> list[Source]:
    """`away` cannot be read, `crm` can."""
    folder = tmp_path / "drop"
    folder.mkdir()
    (folder / "people.jsonl").write_text("".join(json.dumps({"id": number, "mail": f"p{number}@example.test"}) + "\n" for number in range(10)) + '{"id": 11}\n')
    (folder / "left.csv").write_text("who\np3@example.test\n")
    mapping = {"id": "external_id", "mail": "email"}
    return [
        declare("away", kind="files", connection={"url": str(tmp_path / "nowhere")}, contacts={"read": {"glob": "*"}, "map": mapping}, schedule="0 3 * * *"),
        declare(
            "crm",
            kind="files",
            connection={"url": str(folder)},
            contacts={"read": {"glob": "people*"}, "map": mapping},
            suppressions={"read": {"glob": "left*"}, "map": {"who": "email"}},
            schedule="*/15 * * * *",
            time_zone="Europe/Berlin",
            fresh_hours=2,
        ),
    ]


def test_each_source_is_an_asset_with_its_schedule_and_freshness(sources: list[Source], home: Path) -> None:
    repository = build_defs(sources=sources).get_repository_def()
    graph = repository.asset_graph
    keys = {key.to_user_string() for key in graph.get_all_asset_keys() if graph.get(key).group_name == "synced"}
    assert keys == {"away/contacts", "crm/contacts", "crm/suppressions"}
    node = graph.get(dg.AssetKey(["crm", "contacts"]))
    assert {key.to_user_string() for key in node.parent_keys} == {"crm/suppressions"}
    assert node.freshness_policy == dg.FreshnessPolicy.time_window(fail_window=dt.timedelta(hours=2))
    schedules = {schedule.name: schedule for schedule in repository.schedule_defs if schedule.name.startswith("sync_")}
    assert {name: (schedule.cron_schedule, schedule.execution_timezone) for name, schedule in schedules.items()} == {
        "sync_away": ("0 3 * * *", "UTC"),
        "sync_crm": ("*/15 * * * *", "Europe/Berlin"),
    }
    assert {schedule.default_status for schedule in schedules.values()} == {dg.DefaultScheduleStatus.RUNNING}
    assert repository.get_job("sync_external").description


def test_a_schedule_asks_for_its_source_alone_and_not_while_it_runs(sources: list[Source], home: Path, instance: dg.DagsterInstance) -> None:
    from mail_pipelines.dispatch.files import only_one
    from mail_pipelines.sources import running

    repository = build_defs(sources=sources).get_repository_def()
    schedule = repository.get_schedule_def("sync_crm")
    context = dg.build_schedule_context(instance=instance, scheduled_execution_time=dt.datetime(2026, 1, 1, tzinfo=dt.UTC), repository_def=repository)
    (request,) = schedule.evaluate_tick(context).run_requests or []
    assert {key.to_user_string() for key in request.asset_selection or []} == {"crm/contacts", "crm/suppressions"}
    with only_one(running.work_folder(home) / "crm.lock", "source crm"):
        assert not schedule.evaluate_tick(context).run_requests
    # Runs that are starting hold no lock: of another source, then of everything.
    job = repository.get_job("sync_external")
    instance.create_run_for_job(job, status=dg.DagsterRunStatus.STARTING, asset_selection=frozenset([dg.AssetKey(["away", "contacts"])]))
    assert schedule.evaluate_tick(context).run_requests
    instance.create_run_for_job(job, status=dg.DagsterRunStatus.STARTING)
    assert not schedule.evaluate_tick(context).run_requests


def test_a_source_that_fails_says_why_and_keeps_none_of_the_others(sources: list[Source], instance: dg.DagsterInstance, engine: sa.Engine) -> None:
    job = build_defs(sources=sources).get_repository_def().get_job("sync_external")
    result = job.execute_in_process(instance=instance, raise_on_error=False)
    assert not result.success
    done = {event.asset_key.to_user_string(): event for event in result.get_asset_materialization_events() if event.asset_key}
    assert set(done) == {"crm/contacts", "crm/suppressions"}
    values = {name: value.value for name, value in done["crm/contacts"].step_materialization_data.materialization.metadata.items()}
    assert (values["rows_in"], values["merged"], values["rejected"]) == (11, 10, 1)
    assert values["rejected_by_reason"] == {"address: there is none": 1}
    assert values["lag_seconds"] >= 0
    checks = {check.asset_key.to_user_string(): check for check in result.get_asset_check_evaluations()}
    assert {name: check.passed for name, check in checks.items()} == {"away/contacts": False, "crm/contacts": True, "crm/suppressions": True}
    assert "no file fits" in (checks["away/contacts"].description or "")
    assert len(subscribed(engine)) == 10


def test_a_broken_declaration_keeps_none_of_the_others_and_dlt_is_not_loaded(sources: list[Source], home: Path) -> None:
    (home / "sources" / "broken.yaml").write_text("name: broken\n")
    program = (
        "import sys; from mail_pipelines.definitions import defs\n"
        "print(sorted(key.to_user_string() for key in defs.get_repository_def().asset_graph.get_all_asset_keys() if len(key.path) > 1))\n"
        "print([name for name in ('dlt', 'pyarrow', 'requests') if name in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env={**os.environ, "MAIL_PIPELINES_HOME": str(home)}, check=True)
    assert found.stdout.splitlines()[0] == "['away/contacts', 'crm/contacts', 'crm/suppressions']"
    assert "dlt" not in found.stdout.splitlines()[1]
    assert "pyarrow" not in found.stdout.splitlines()[1]


def test_what_a_source_is_told_is_an_asset_after_what_is_read_of_it(
    database_there: tuple[Source, sa.Engine], home: Path, instance: dg.DagsterInstance, engine: sa.Engine
) -> None:
    source, there = database_there
    repository = build_defs(sources=[source]).get_repository_def()
    node = repository.asset_graph.get(dg.AssetKey(["crm", "engagement"]))
    assert {key.to_user_string() for key in node.parent_keys} == {"crm/contacts"}
    context = dg.build_schedule_context(instance=instance, scheduled_execution_time=dt.datetime(2026, 1, 1, tzinfo=dt.UTC), repository_def=repository)
    (request,) = repository.get_schedule_def("sync_crm").evaluate_tick(context).run_requests or []
    assert {key.to_user_string() for key in request.asset_selection or []} == {"crm/contacts", "crm/engagement"}
    job = repository.get_job("sync_external")
    assert job.execute_in_process(instance=instance).success
    engaged(engine, range(1, 7))
    engaged(engine, range(20, 21), "click")
    result = job.execute_in_process(instance=instance)
    (done,) = (event for event in result.get_asset_materialization_events() if event.asset_key == dg.AssetKey(["crm", "engagement"]))
    values = {name: value.value for name, value in done.step_materialization_data.materialization.metadata.items()}
    assert {name: values[name] for name in ("pushed", "waiting", "dead_letters", "lag_seconds")} == {
        "pushed": 6,
        "waiting": 0,
        "dead_letters": 1,
        "lag_seconds": 0.0,
    }
    checks = {check.asset_key.to_user_string(): check for check in result.get_asset_check_evaluations()}
    assert not checks["crm/engagement"].passed
    assert "1 dead letters" in (checks["crm/engagement"].description or "")
    with there.begin() as connection:
        connection.exec_driver_sql("DROP TABLE happened")
    engaged(engine, range(7, 8))
    failed = job.execute_in_process(instance=instance, raise_on_error=False)
    checks = {check.asset_key.to_user_string(): check for check in failed.get_asset_check_evaluations()}
    assert "there is no table 'happened'" in (checks["crm/engagement"].description or "")
    assert checks["crm/contacts"].passed
