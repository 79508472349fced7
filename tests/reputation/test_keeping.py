"""What was told is kept once, corrections win, a run that is killed changes nothing but what it says, and Dagster and the command show it."""

from __future__ import annotations

import datetime as dt
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import dagster as dg
import pytest
import sqlalchemy as sa

from mail_pipelines.capacity import domain_breakers
from mail_pipelines.commands import context
from mail_pipelines.config import ReputationSettings
from mail_pipelines.database.engine import reading, transact
from mail_pipelines.definitions import build_defs
from mail_pipelines.domains import store as domains
from mail_pipelines.domains.domain import Names
from mail_pipelines.reputation import readings, standing, syncing
from mail_pipelines.reputation.readings import GOOGLE, MICROSOFT, Reading, second_of
from mail_pipelines.sources.errors import SourceError
from mail_pipelines.sources.kinds.http import PatientSession
from tests.dispatch.test_hold_commands import says
from tests.dispatch.world import settings_for
from tests.reputation.providers import Google, Microsoft, serving

ON_SQLITE = pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
TODAY = dt.datetime.now(dt.UTC).date()


def ago(days: int) -> dt.date:
    return TODAY - dt.timedelta(days=days)


@pytest.fixture
def postmaster(engine: sa.Engine, tmp_path: Path) -> Iterator[Google]:
    """Google, and an installation with two sending domains."""
    settings = settings_for(engine, tmp_path / "home")
    for name in ("shop.test", "news.test"):
        domains.add(engine, Names.of(name), settings.token_key(), dt.datetime.now(dt.UTC))
    with serving(Google()) as there:
        for day in range(2, 12):
            there.tell("news.test", ago(day), 0.0002, DELIVERY_ERROR_RATE=0.01)
            there.tell("shop.test", ago(day), 0.0005)
        yield there


def sync(engine: sa.Engine, settings: ReputationSettings, source: str = GOOGLE) -> dict[str, int]:
    return syncing.run(engine, settings, source, dt.datetime.now(dt.UTC), PatientSession(first_wait_seconds=0)).counts


def kept(engine: sa.Engine) -> dict[tuple[str, int], Reading]:
    with reading(engine) as connection:
        return {(one.subject, (TODAY - readings.date_of(one.day)).days): one for one in readings.read(connection, 0)}


def test_what_was_told_is_kept_once_and_a_correction_wins(engine: sa.Engine, postmaster: Google) -> None:
    settings = postmaster.settings()
    assert sync(engine, settings) == {"new": 20}
    before = kept(engine)
    assert (before["news.test", 2].spam_rate, before["news.test", 2].delivery_errors) == (0.0002, 0.01)
    assert sync(engine, settings) == {"unchanged": 20}
    assert kept(engine) == before
    postmaster.tell("shop.test", ago(5), 0.0042)
    postmaster.tell("shop.test", ago(1), 0.0001)
    del postmaster.days["news.test"][ago(3)]
    assert sync(engine, settings) == {"unchanged": 18, "corrected": 1, "new": 1}
    after = kept(engine)
    assert (after["shop.test", 5].spam_rate, after["shop.test", 1].spam_rate) == (0.0042, 0.0001)
    # A day of which nothing is told any more stays as it was.
    assert {place: one for place, one in after.items() if place not in {("shop.test", 5), ("shop.test", 1)}} == {
        place: one for place, one in before.items() if place != ("shop.test", 5)
    }


@ON_SQLITE
def test_a_run_that_is_killed_at_its_writing_is_completed_by_the_next(engine: sa.Engine, postmaster: Google, monkeypatch: pytest.MonkeyPatch) -> None:
    """It writes in portions, of which the third is never begun."""
    monkeypatch.setattr(syncing, "_ROWS", 6)
    portions = []

    def keep(connection: sa.Connection, some: list[Reading], now: dt.datetime) -> object:
        if len(portions) == 2:
            raise KeyboardInterrupt
        portions.append(some)
        return keep_as_ever(connection, some, now)

    keep_as_ever = readings.keep
    with monkeypatch.context() as patch:
        patch.setattr(readings, "keep", keep)
        with pytest.raises(KeyboardInterrupt):
            sync(engine, postmaster.settings())
    assert len(kept(engine)) == 12
    with reading(engine) as connection:
        assert standing.read(connection, GOOGLE).good_at is None
    assert sync(engine, postmaster.settings()) == {"new": 8, "unchanged": 12}
    assert len(kept(engine)) == 20


@ON_SQLITE
@pytest.mark.slow
def test_a_process_that_is_killed_in_mid_question_has_written_nothing(engine: sa.Engine, postmaster: Google, tmp_path: Path) -> None:
    postmaster.waits["shop.test"] = threading.Event()
    path = tmp_path / "google.json"
    path.write_text(postmaster.settings().google_credentials or "")
    environ = os.environ | {"MAIL_PIPELINES_REPUTATION__GOOGLE_CREDENTIALS_FILE": str(path), "MAIL_PIPELINES_REPUTATION__GOOGLE_URL": f"{postmaster.url}/v2"}
    command = [sys.executable, "-m", "mail_pipelines", "reputation", "sync"]
    with subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert postmaster.waits["shop.test"].wait(120)
        process.send_signal(signal.SIGKILL)
    assert kept(engine) == {}
    postmaster.waits.clear()
    found = subprocess.run(command, env=environ, capture_output=True, text=True)
    assert (found.stdout, found.returncode) == ("google_postmaster: 20 new\n", 0)
    assert len(kept(engine)) == 20


@ON_SQLITE
def test_a_failure_is_noted_and_what_is_known_stays(engine: sa.Engine, postmaster: Google) -> None:
    settings = postmaster.settings()
    sync(engine, settings)
    postmaster.refresh = "withdrawn"
    with pytest.raises(SourceError, match="invalid_grant"):
        sync(engine, settings)
    assert len(kept(engine)) == 20
    with reading(engine) as connection:
        known = standing.read(connection, GOOGLE)
    assert known.counts == {"new": 20}
    assert "invalid_grant" in (known.error or "")
    postmaster.refresh = "refresh-that-no-log-shows"
    sync(engine, settings)
    with reading(engine) as connection:
        assert standing.read(connection, GOOGLE).error is None


# --- Dagster, and the command -------------------------------------------------------------------------------------


def configure(monkeypatch: pytest.MonkeyPatch, settings: ReputationSettings) -> ReputationSettings:
    for name, value in settings.model_dump(exclude_none=True).items():
        monkeypatch.setenv(f"MAIL_PIPELINES_REPUTATION__{name.upper()}", str(value))
    context.settings.cache_clear()
    return settings


def names(definitions: dg.Definitions) -> tuple[set[str], dict[str, str]]:
    repository = definitions.get_repository_def()
    assets = {key.to_user_string() for key in repository.asset_graph.get_all_asset_keys() if key.path[-1] == "reputation"}
    return assets, {one.name: str(one.cron_schedule) for one in repository.schedule_defs if one.name.startswith("sync_")}


def test_a_provider_without_credentials_is_no_asset(tmp_path: Path) -> None:
    assert names(build_defs(sources=[], told=ReputationSettings())) == (set(), {})
    (tmp_path / "snds").touch()
    assert names(build_defs(sources=[], told=ReputationSettings(microsoft_token_file=str(tmp_path / "snds"), cron="5 5 * * *"))) == (
        {"microsoft_snds/reputation"},
        {"sync_reputation": "5 5 * * *"},
    )


@ON_SQLITE
@pytest.mark.slow
def test_the_assets_have_the_numbers_and_one_that_fails_keeps_not_the_other(
    engine: sa.Engine, postmaster: Google, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    postmaster.tell("shop.test", ago(2), 0.0044)
    del postmaster.days["news.test"]
    with serving(Microsoft(tmp_path / "snds")) as snds, dg.DagsterInstance.ephemeral() as instance:
        snds.tell(ago(1), "192.0.2.1", result="RED", rate="0.5%", traps=3)
        snds.days[ago(1)].append("odd")
        theirs = {name: value for name, value in snds.settings() if name.startswith("microsoft_")}
        settings = configure(monkeypatch, postmaster.settings().model_copy(update=theirs))
        repository = build_defs(sources=[], told=settings).get_repository_def()
        schedule = repository.get_schedule_def("sync_reputation")
        tick = dg.build_schedule_context(instance=instance, scheduled_execution_time=dt.datetime.now(dt.UTC), repository_def=repository)
        (request,) = schedule.evaluate_tick(tick).run_requests or []
        job = repository.get_job("sync_external")
        result = job.get_subset(asset_selection=set(request.asset_selection or [])).execute_in_process(instance=instance)
        assert result.success
        done = {event.asset_key: event.step_materialization_data.materialization.metadata for event in result.get_asset_materialization_events()}
        checks = {(check.asset_key.path[0], check.check_name): check for check in result.get_asset_check_evaluations()}
        of_google = {name: value.value for name, value in done[dg.AssetKey([GOOGLE, "reputation"])].items()}
        assert {name: of_google[name] for name in ("new", "worst_spam_rate", "newest_day")} == {"new": 10, "worst_spam_rate": 0.0044, "newest_day": str(ago(2))}
        assert "news.test" in of_google["not_told_of"]
        assert f"| shop.test | {ago(2)} | 0.44% |" in of_google["newest"]
        assert of_google["spam_rates"].startswith("![")
        assert "news.test" in (checks[GOOGLE, "in_step"].description or "")
        assert "0.44% reported as spam of shop.test" in (checks[GOOGLE, "in_good_standing"].description or "")
        of_microsoft = {name: value.value for name, value in done[dg.AssetKey([MICROSOFT, "reputation"])].items()}
        assert (of_microsoft["new"], of_microsoft["rejected"]) == (1, 1)
        words = checks[MICROSOFT, "in_good_standing"].description or ""
        assert all(part in words for part in ("0.50% reported as spam", "RED as filter result", "3 trap hits of 192.0.2.1"))
        assert not any(check.passed for check in checks.values())
        with reading(engine) as connection:
            (breaker,) = domain_breakers.all_breakers(connection)
        assert (breaker.domain, breaker.state) == ("shop.test", domain_breakers.OPEN)

        snds.before = [(403, {}, b"Forbidden")]
        postmaster.tell("news.test", ago(2), 0.0001)
        failed = job.execute_in_process(instance=instance, raise_on_error=False)
        checks = {(check.asset_key.path[0], check.check_name): check for check in failed.get_asset_check_evaluations()}
        assert "status 403" in (checks[MICROSOFT, "in_step"].description or "")
        assert checks[GOOGLE, "in_step"].passed


@ON_SQLITE
def test_the_command_shows_what_is_told_and_begins_a_trial(engine: sa.Engine, postmaster: Google, monkeypatch: pytest.MonkeyPatch) -> None:
    configure(monkeypatch, postmaster.settings())
    postmaster.tell("shop.test", ago(2), 0.0044)
    assert "mail of shop.test to google is stopped until" in says("reputation", "sync")
    shown = says("reputation", "show")
    assert f" google_postmaster shop.test {ago(2)} 0.44% " in shown
    assert f" google_postmaster news.test {ago(2)} 0.02% 1.00% " in shown
    assert "mail of shop.test to google is stopped until" in shown
    assert "shop.test is on trial" in says("reputation", "retry", "shop.test")
    assert "mail of shop.test to google is on trial" in says("reputation", "show")
    with pytest.raises(Exception, match=r"news\.test is not stopped"):
        says("reputation", "retry", "news.test")
    with pytest.raises(Exception, match="microsoft_snds has no credentials"):
        says("reputation", "sync", "microsoft_snds")


@pytest.mark.slow
def test_signing_in_by_the_command(tmp_path: Path) -> None:
    """As at a centre without a browser: the address goes out, and the one where a browser elsewhere ended comes in."""
    with serving(Microsoft(tmp_path / "snds")) as there:
        theirs = {f"MAIL_PIPELINES_REPUTATION__{name.upper()}": value for name, value in there.settings(signed_in=False) if name.startswith("microsoft_")}
        command = [sys.executable, "-m", "mail_pipelines", "reputation", "sign-in"]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        with subprocess.Popen(command, env=os.environ | theirs, text=True, **pipes) as process:  # type: ignore[call-overload]
            assert process.stdout is not None
            address = next(line for line in process.stdout if line.startswith("http"))
            said = process.communicate(there.browser(address.strip()) + "\n", timeout=60)
        assert process.returncode == 0, said
        assert there.login.read_text() == there.refresh


@ON_SQLITE
def test_a_reading_of_a_measure_that_is_missing_is_not_the_newest(engine: sa.Engine) -> None:
    found = [Reading(GOOGLE, "a.test", second_of(ago(3)), 0.004), Reading(GOOGLE, "a.test", second_of(ago(2)), None, 0.1)]
    transact(engine, lambda connection: readings.keep(connection, found, dt.datetime.now(dt.UTC)))
    assert readings.newest(kept(engine).values(), "spam_rate")[GOOGLE, "a.test"].spam_rate == 0.004
