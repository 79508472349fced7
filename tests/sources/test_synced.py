"""The assets: made of declarations, thin, with the numbers; one source that fails keeps none of the others. Loading them imports no dlt."""

from __future__ import annotations

import asyncio
import datetime as dt
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
import sqlalchemy as sa
from dagster._core.definitions.freshness_evaluator import FRESHNESS_EVALUATORS_BY_POLICY_TYPE
from dagster._core.loader import LoadingContextForTest
from dagster._core.test_utils import freeze_time

from mail_pipelines.database.engine import transact
from mail_pipelines.definitions import build_defs
from mail_pipelines.resources.queues import SOURCES_POOL
from mail_pipelines.sources import status, turns
from mail_pipelines.sources.declaration import Part, Source
from mail_pipelines.sources.errors import SourceError
from tests.sources.conftest import Declare, engaged, subscribed
from tests.sources.crm import Crm, serving

pytestmark = pytest.mark.slow


@pytest.fixture
def instance(instance: dg.DagsterInstance, engine: sa.Engine, home: Path, monkeypatch: pytest.MonkeyPatch) -> dg.DagsterInstance:
    monkeypatch.setenv("MAIL_PIPELINES_DATABASE__URL", engine.url.render_as_string(hide_password=False))
    monkeypatch.setenv("MAIL_PIPELINES_HOME", str(home))
    return instance


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


def fresh(instance: dg.DagsterInstance, node: Any, later: dt.timedelta) -> str:
    """What Dagster's daemon says of an asset's freshness, so much later."""
    evaluator = FRESHNESS_EVALUATORS_BY_POLICY_TYPE[type(node.freshness_policy)]()
    with freeze_time(dt.datetime.now(dt.UTC) + later):
        state: str = asyncio.run(evaluator.evaluate_freshness(LoadingContextForTest(instance), node)).value
    return state


def test_each_source_is_an_asset_with_its_schedule_and_freshness(sources: list[Source], home: Path) -> None:
    repository = build_defs(sources=sources).get_repository_def()
    graph = repository.asset_graph
    keys = {key.to_user_string() for key in graph.get_all_asset_keys() if graph.get(key).group_name == "synced"}
    assert keys == {"away/contacts", "crm/contacts", "crm/suppressions"}
    node = graph.get(dg.AssetKey(["crm", "contacts"]))
    assert {key.to_user_string() for key in node.parent_keys} == {"crm/suppressions"}
    assert node.freshness_policy == dg.FreshnessPolicy.time_window(fail_window=dt.timedelta(hours=2))
    assert {repository.assets_defs_by_key[dg.AssetKey(key.split("/"))].op.pool for key in keys} == {SOURCES_POOL}
    columns = node.metadata["dagster/column_schema"].columns
    assert [(column.name, column.description) for column in columns] == [("external_id", "id at the source"), ("email", "mail at the source")]
    schedules = {schedule.name: schedule for schedule in repository.schedule_defs if schedule.name.startswith("sync_")}
    assert {name: (schedule.cron_schedule, schedule.execution_timezone) for name, schedule in schedules.items()} == {
        "sync_away": ("0 3 * * *", "UTC"),
        "sync_crm": ("*/15 * * * *", "Europe/Berlin"),
    }
    assert {schedule.default_status for schedule in schedules.values()} == {dg.DefaultScheduleStatus.RUNNING}
    assert repository.get_job("sync_external").description


def asked_for(repository: dg.RepositoryDefinition, instance: dg.DagsterInstance, schedule: str = "sync_crm") -> list[dg.RunRequest]:
    """What a tick of a schedule asks for. Its context is closed: else it takes back what it has set when it is collected, in the midst of another test."""
    time = dt.datetime(2026, 1, 1, tzinfo=dt.UTC)
    with dg.build_schedule_context(instance=instance, scheduled_execution_time=time, repository_def=repository) as context:
        return list(repository.get_schedule_def(schedule).evaluate_tick(context).run_requests or [])


def test_a_schedule_asks_for_its_source_alone_and_not_while_it_runs(sources: list[Source], home: Path, instance: dg.DagsterInstance) -> None:
    from mail_pipelines.dispatch.files import only_one
    from mail_pipelines.sources import running

    repository = build_defs(sources=sources).get_repository_def()
    (request,) = asked_for(repository, instance)
    assert {key.to_user_string() for key in request.asset_selection or []} == {"crm/contacts", "crm/suppressions"}
    with only_one(running.work_folder(home) / "crm.lock", "source crm"):
        assert not asked_for(repository, instance)
    # Runs that wait for a slot of the pool, or are starting, hold no lock: of another source, then of everything.
    job = repository.get_job("sync_external")
    instance.create_run_for_job(job, status=dg.DagsterRunStatus.STARTING, asset_selection=frozenset([dg.AssetKey(["away", "contacts"])]))
    assert asked_for(repository, instance)
    assert not asked_for(repository, instance, "sync_away")
    # Nor does one that works, between two of its parts: the second one would fail.
    for state in (dg.DagsterRunStatus.STARTING, dg.DagsterRunStatus.STARTED):
        run = instance.create_run_for_job(job, status=state)
        assert not asked_for(repository, instance)
        instance.report_run_canceled(run)
        assert asked_for(repository, instance)


def test_a_source_that_fails_says_why_and_keeps_none_of_the_others(
    sources: list[Source], instance: dg.DagsterInstance, engine: sa.Engine, tmp_path: Path
) -> None:
    repository = build_defs(sources=sources).get_repository_def()
    job = repository.get_job("sync_external")
    result = job.execute_in_process(instance=instance, raise_on_error=False)
    assert not result.success
    done = {event.asset_key.to_user_string(): event for event in result.get_asset_materialization_events() if event.asset_key}
    assert set(done) == {"crm/contacts", "crm/suppressions"}
    values = {name: value.value for name, value in done["crm/contacts"].step_materialization_data.materialization.metadata.items()}
    assert (values["rows_in"], values["merged"], values["rejected"]) == (11, 10, 1)
    assert [record.data for record in values["rejected_by_reason"].records] == [{"reason": "address: there is none", "rows": 1}]
    assert values["lag_seconds"] >= 0
    checks = {check.asset_key.to_user_string(): check for check in result.get_asset_check_evaluations()}
    assert {name: check.passed for name, check in checks.items()} == {"away/contacts": False, "crm/contacts": True, "crm/suppressions": True}
    assert "no file fits" in (checks["away/contacts"].description or "")
    # All but one, who unsubscribed there.
    assert len(subscribed(engine)) == 9
    node = repository.asset_graph.get(dg.AssetKey(["crm", "contacts"]))
    assert [fresh(instance, node, dt.timedelta(hours=hours)) for hours in (1, 3)] == ["PASS", "FAIL"]
    # The last good state stays, and the check says how old it is.
    (tmp_path / "drop" / "people.jsonl").unlink()
    failed = job.execute_in_process(instance=instance, raise_on_error=False, asset_selection=[dg.AssetKey(["crm", "contacts"])])
    (check,) = failed.get_asset_check_evaluations()
    assert set(check.metadata) == {"last_good", "lag_seconds"}
    assert len(subscribed(engine)) == 9


@pytest.mark.parametrize("way", ["a field of another type", "a fault"])
def test_whatever_ends_a_run_is_said_by_its_check(
    sources: list[Source], instance: dg.DagsterInstance, engine: sa.Engine, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    from mail_pipelines.contacts import fields
    from mail_pipelines.sources import merging

    def fault(*_: object) -> None:
        raise TypeError("p1@example.test")

    if way == "a fault":
        monkeypatch.setattr(merging, "declare", fault)
    else:
        now = dt.datetime.now(dt.UTC)
        transact(engine, lambda connection: fields.declare(connection, "age", "text", label="age", now=now))
    crm = sources[1].model_copy(update={"contacts": sources[1].contacts.model_copy(update={"map": {"mail": "email", "id": "age"}, "types": {"age": "number"}})})
    text = crm.model_dump_json(exclude_none=True)
    (Path(os.environ["MAIL_PIPELINES_HOME"]) / "sources" / "crm.yaml").write_text(text)
    job = build_defs(sources=[crm]).get_repository_def().get_job("sync_external")
    result = job.execute_in_process(instance=instance, raise_on_error=False)
    checks = {check.asset_key.to_user_string(): check for check in result.get_asset_check_evaluations()}
    said = checks["crm/contacts"].description or ""
    assert not checks["crm/contacts"].passed
    assert ("TypeError" if way == "a fault" else "age") in said
    assert "example.test" not in said
    standing = status.read(engine, "crm", "contacts")
    assert standing.error == said
    assert standing.ended_at is not None


def test_no_secret_comes_into_dagster_or_onto_the_screen(
    declare: Declare, instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A key in the address of a request, a password in the URL of a database, a link that is itself the secret."""
    secret = "hush-hush-47"
    mapping = {"id": "external_id", "mail": "email"}
    with serving(Crm([])) as crm:
        for name, value in {"API_KEY": secret, "SHOP_URL": f"mysql+pymysql://shop:{secret}@127.0.0.1:1/shop", "LINK": f"{crm.url}/{secret}"}.items():
            monkeypatch.setenv(name, value)
        auth = {"type": "api_key", "token_env": "API_KEY", "name": "key", "place": "query"}
        closed = {"url": "http://127.0.0.1:1/", "auth": auth, "first_wait_seconds": 0.001}
        declared = [
            declare("rest", kind="rest", connection={**closed, "url": crm.url}, contacts={"read": {"path": "contacts"}, "map": mapping}),
            declare("gone", kind="rest", connection=closed, contacts={"read": {"path": "contacts"}, "map": mapping}),
            declare("shop", kind="sql", connection={"url_env": "SHOP_URL"}, contacts={"read": {"table": "t"}, "map": mapping}),
            declare("sheet", kind="sheet", connection={"url_env": "LINK"}, contacts={"map": mapping}),
        ]
        job = build_defs(sources=declared).get_repository_def().get_job("sync_external")
        result = job.execute_in_process(instance=instance, raise_on_error=False)
    assert [check.passed for check in result.get_asset_check_evaluations()] == [False] * 4
    assert crm.requests
    events = "".join(entry.to_json() for entry in instance.all_logs(result.run_id))
    assert secret not in events
    assert secret not in "".join(capfd.readouterr())


def test_a_schedule_that_never_comes_keeps_none_of_the_others(sources: list[Source], home: Path) -> None:
    never = sources[1].model_copy(update={"schedule": "0 0 31 2 *"})
    schedules = {schedule.name for schedule in build_defs(sources=[sources[0], never]).get_repository_def().schedule_defs}
    assert "sync_away" in schedules
    assert "sync_crm" not in schedules


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


@pytest.mark.parametrize(
    ("failing", "ran"),
    [
        ("suppressions", ["suppressions", "engagement"]),
        ("contacts", ["suppressions", "contacts", "engagement"]),
        ("engagement", ["suppressions", "contacts", "engagement"]),
    ],
)
def test_what_is_told_waits_for_no_reading_but_contacts_wait_for_who_left(failing: str, ran: list[str]) -> None:
    begun: list[str] = []

    def run(part: Part) -> None:
        begun.append(part)
        if part == failing:
            raise SourceError(f"{part} is away")

    outcomes = dict(turns.in_turn(("suppressions", "contacts", "engagement"), run))
    assert (begun, list(outcomes)) == (ran, ran)
    assert [part for part, outcome in outcomes.items() if outcome] == [failing]
    errors = [outcome for outcome in outcomes.values() if outcome]
    assert str(turns.together([*errors, *errors])) == f"{failing} is away"
    assert str(turns.together([*errors, SourceError("more")])) == f"{failing} is away; more"
    assert isinstance(turns.together([*errors, TypeError("a fault")]), TypeError)


def test_what_a_source_is_told_is_an_asset_after_what_is_read_of_it(
    database_there: tuple[Source, sa.Engine], home: Path, instance: dg.DagsterInstance, engine: sa.Engine
) -> None:
    source, there = database_there
    repository = build_defs(sources=[source]).get_repository_def()
    node = repository.asset_graph.get(dg.AssetKey(["crm", "engagement"]))
    assert {key.to_user_string() for key in node.parent_keys} == {"crm/contacts"}
    (request,) = asked_for(repository, instance)
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
    # What cannot be read is told all the same, and the run says why it failed.
    with there.begin() as connection:
        connection.exec_driver_sql("ALTER TABLE people RENAME TO persons")
    engaged(engine, range(30, 33))
    failed = job.execute_in_process(instance=instance, raise_on_error=False)
    assert not failed.success
    assert [event.asset_key.to_user_string() for event in failed.get_asset_materialization_events() if event.asset_key] == ["crm/engagement"]
    assert not {check.asset_key.to_user_string(): check for check in failed.get_asset_check_evaluations()}["crm/contacts"].passed
    with there.begin() as connection:
        assert connection.exec_driver_sql("SELECT count(*) FROM happened").scalar_one() == 9
        connection.exec_driver_sql("ALTER TABLE persons RENAME TO people")
        connection.exec_driver_sql("DROP TABLE happened")
    engaged(engine, range(7, 8))
    failed = job.execute_in_process(instance=instance, raise_on_error=False)
    checks = {check.asset_key.to_user_string(): check for check in failed.get_asset_check_evaluations()}
    assert "there is no table 'happened'" in (checks["crm/engagement"].description or "")
    assert checks["crm/contacts"].passed
