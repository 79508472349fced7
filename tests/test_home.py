"""The home folder: made once and for all, judged by `doctor` with real faults, used by Dagster's own commands."""

from __future__ import annotations

import datetime as dt
import os
import shutil
import socket
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
import sqlalchemy as sa

from mail_pipelines import config, home
from mail_pipelines.benchmarks.mariadb import MariaDB
from mail_pipelines.campaigns import archiving
from mail_pipelines.database import migrate
from mail_pipelines.database.engine import create_engine
from mail_pipelines.database.models import Server
from mail_pipelines.dispatch import servers
from mail_pipelines.doctor import daemon, examination, waiting
from mail_pipelines.runbook import Chapter
from tests.campaigns.parts import make_campaign

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def _template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("template") / "home"
    home.make({"MAIL_PIPELINES_HOME": str(folder)})
    return folder


@pytest.fixture
def made(_template: Path, monkeypatch: pytest.MonkeyPatch) -> config.Settings:
    """A home as `init` leaves it, with the environment that `env` prints."""
    shutil.copytree(_template, os.environ["MAIL_PIPELINES_HOME"])
    settings = config.load()
    monkeypatch.setenv("DAGSTER_HOME", str(settings.dagster_home))
    return settings


def _findings(check: str) -> list[str]:
    return [finding.problem for finding in examination.examine() if finding.check == check]


def _mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


# --- init -------------------------------------------------------------------------------------------------------


def test_init_makes_everything_and_a_second_one_changes_nothing() -> None:
    first = home.make()
    settings = config.load()
    assert any("config.toml" in line for line in first)
    assert any("made the tables" in line for line in first)
    before = {path: path.read_bytes() for path in settings.home.rglob("*") if path.suffix in (".toml", ".yaml") or path.name == "token_key"}
    assert len(before) == 3
    assert home.make() == []
    assert {path: path.read_bytes() for path in before} == before


def test_only_the_owner_reads_keys_and_personal_data(made: config.Settings) -> None:
    assert _mode(made.home) == 0o700
    assert _mode(made.home / "config.toml") == 0o600
    assert _mode(made.home / "secrets/token_key") == 0o600
    assert len(made.token_key()) == 64


def test_init_upgrades_an_older_schema(made: config.Settings) -> None:
    from alembic import command

    engine = create_engine(made.database.url)
    command.downgrade(migrate.alembic_config(engine), "base")
    done = home.make()
    assert len(done) == 1
    assert "made the tables" in done[0]
    migrate.require_schema(engine)


def test_init_never_makes_a_second_token_key(made: config.Settings) -> None:
    (made.home / "secrets/token_key").unlink()
    with pytest.raises(config.ConfigError, match="secrets/token_key, which cannot be read"):
        home.make()


def test_init_keeps_what_the_operator_changed(made: config.Settings) -> None:
    for path in (made.home / "config.toml", made.dagster_home / "dagster.yaml"):
        path.write_text(path.read_text() + "\n# mine\n")
    home.make()
    assert (made.home / "config.toml").read_text().endswith("# mine\n")
    assert (made.dagster_home / "dagster.yaml").read_text().endswith("# mine\n")


def test_a_home_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(home.HomeError, match="file/home cannot be made: Not a directory; MAIL_PIPELINES_HOME names the folder"):
        home.make({"MAIL_PIPELINES_HOME": str(tmp_path / "file/home")})


def test_dagster_takes_the_shipped_settings(made: config.Settings) -> None:
    import dagster as dg
    from dagster._core.launcher import DefaultRunLauncher
    from dagster._core.run_coordinator import QueuedRunCoordinator

    with dg.DagsterInstance.from_config(str(made.dagster_home)) as instance:
        assert not instance.telemetry_enabled
        assert isinstance(instance.run_launcher, DefaultRunLauncher)
        assert isinstance(instance.run_coordinator, QueuedRunCoordinator)
        assert instance.run_coordinator.dequeue_interval_seconds == 2
        queue = instance.get_concurrency_config().run_queue_config
        assert queue is not None
        assert queue.max_concurrent_runs == 10
        assert queue.tag_concurrency_limits == [{"key": "dagster-celery/queue", "value": {"applyLimitPerUniqueValue": True}, "limit": 2}]
        assert instance.run_monitoring_enabled
        assert instance.run_retries_max_retries == 0


# --- env --------------------------------------------------------------------------------------------------------


def test_env_survives_the_shell(tmp_path: Path) -> None:
    folder = tmp_path / "a home with 'quotes' and $dollars"
    script = f'eval "$({sys.executable} -m mail_pipelines env)"; printf "%s\\n" "$DAGSTER_HOME" "$MAIL_PIPELINES_HOME"'
    result = subprocess.run(["bash", "-c", script], env={**os.environ, "MAIL_PIPELINES_HOME": str(folder)}, check=True, capture_output=True, text=True)
    assert result.stdout.splitlines() == [f"{folder}/dagster", str(folder)]


# --- doctor -----------------------------------------------------------------------------------------------------


def test_doctor_ends_with_status_1_and_says_what_to_do() -> None:
    result = subprocess.run([sys.executable, "-m", "mail_pipelines", "doctor"], capture_output=True, text=True)
    assert result.returncode == 1
    assert "config.toml is missing" in result.stdout
    assert "run `mail-pipelines init`" in result.stdout


def test_doctor_names_a_missing_and_a_foreign_dagster_home(made: config.Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    assert _findings("DAGSTER_HOME") == []
    monkeypatch.setenv("DAGSTER_HOME", "/elsewhere")
    assert _findings("DAGSTER_HOME") == [f"DAGSTER_HOME is /elsewhere, but this home's is {made.dagster_home}"]
    monkeypatch.delenv("DAGSTER_HOME")
    assert "is not set" in _findings("DAGSTER_HOME")[0]


def test_doctor_names_an_old_schema(made: config.Settings) -> None:
    assert _findings("schema") == []
    with create_engine(made.database.url).begin() as connection:
        connection.exec_driver_sql("UPDATE alembic_version SET version_num = '0000'")
    assert "is at schema 0000" in _findings("schema")[0]


def test_doctor_names_an_unreachable_database(made: config.Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    # Taken, and nobody listens.
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        monkeypatch.setenv("MAIL_PIPELINES_DATABASE__URL", f"mysql+pymysql://mail:hunter2@127.0.0.1:{port}/mail")
        (problem,) = _findings("database")
    assert "no connection to" in problem
    assert str(port) in problem
    assert "hunter2" not in problem


def test_doctor_names_a_database_that_takes_connections_and_never_answers(made: config.Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waiting, "ANSWER_SECONDS", 0.2)
    # Nobody takes the connections from the kernel, which makes them.
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        monkeypatch.setenv("MAIL_PIPELINES_DATABASE__URL", f"mysql+pymysql://mail:hunter2@127.0.0.1:{port}/mail")
        (problem,) = _findings("database")
    assert f"127.0.0.1:{port}/mail takes connections and does not answer: look at the database and its host" in problem
    assert "hunter2" not in problem


def test_doctor_does_not_wait_for_a_storage_of_dagster_that_never_answers(made: config.Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waiting, "STORAGE_SECONDS", 0.5)
    (made.dagster_home / "dagster.yaml").write_text("storage: {mysql: {mysql_url: {env: DAGSTER_MYSQL_URL}}}")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("DAGSTER_MYSQL_URL", f"mysql+pymysql://dagster:hunter2@127.0.0.1:{silent.getsockname()[1]}/dagster")
        assert _findings("Dagster") == ["Dagster's storage does not answer within 0.5 s"]


def test_doctor_names_little_disk(made: config.Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    assert _findings("disk") == []
    monkeypatch.setenv("MAIL_PIPELINES_OPERATION__MIN_FREE_MB", str(10**9))
    assert "fewer than 1000000000" in _findings("disk")[0]


def test_doctor_names_a_missing_token_key(made: config.Settings) -> None:
    (made.home / "config.toml").write_text("")
    assert "sending.token_key is not set" in _findings("token key")[0]


def test_doctor_names_a_lost_token_key_file(made: config.Settings) -> None:
    (made.home / "secrets/token_key").unlink()
    assert "secrets/token_key, which cannot be read" in _findings("configuration")[0]


def test_doctor_names_a_daemon_that_never_ran(made: config.Settings) -> None:
    assert "daemon is silent" in _findings("daemon")[0]


def test_doctor_names_a_daemon_long_before_dagster_does(made: config.Settings) -> None:
    import dagster as dg
    from dagster._daemon.types import DaemonHeartbeat

    def beat(seconds_ago: float) -> list[str]:
        with dg.DagsterInstance.from_config(str(made.dagster_home)) as instance:
            for kind in instance.get_required_daemon_types():
                instance.add_daemon_heartbeat(DaemonHeartbeat(time.time() - seconds_ago, kind, "a test's", []))
            return [f"{finding.problem} {finding.remedy}" for finding in daemon.check_daemon(instance)]

    assert beat(30) == []
    (said,) = beat(daemon.SILENT_SECONDS + 60)
    assert said == f"Dagster's daemon is silent: no sensor, schedule or queued run starts start it: {Chapter.DAEMON_DEAD.place}"


def test_doctor_names_a_code_server_that_is_gone_by_sensors_that_do_not_run(made: config.Settings) -> None:
    import dagster as dg
    from dagster._core.definitions.run_request import InstigatorType
    from dagster._core.remote_origin import RegisteredCodeLocationOrigin, RemoteInstigatorOrigin, RemoteRepositoryOrigin
    from dagster._core.scheduler.instigation import InstigatorState, InstigatorStatus, TickData, TickStatus

    place = RemoteRepositoryOrigin(RegisteredCodeLocationOrigin("mail_pipelines"), "__repository__")
    with dg.DagsterInstance.from_config(str(made.dagster_home)) as instance:

        def tick(sensor: str, status: InstigatorStatus, seconds_ago: float) -> list[str]:
            state = InstigatorState(RemoteInstigatorOrigin(place, sensor), InstigatorType.SENSOR, status)
            if instance.get_instigator_state(state.instigator_origin_id, state.selector_id) is None:
                instance.add_instigator_state(state)
            data = TickData(
                state.instigator_origin_id, sensor, InstigatorType.SENSOR, TickStatus.SKIPPED, time.time() - seconds_ago, selector_id=state.selector_id
            )
            instance.create_tick(data)
            return [f"{finding.problem}; {finding.remedy}" for finding in daemon.check_ticks(instance)]

        # One that somebody has stopped says nothing.
        assert tick("alerts", InstigatorStatus.STOPPED, 5) == []
        (said,) = tick("open_shards", InstigatorStatus.DECLARED_IN_CODE, daemon.SILENT_SECONDS + 120)
        assert said.startswith("no sensor has run for 7 minutes, though the daemon beats: Dagster's code server does not answer; start it: docs/runbook.md")
        assert tick("server_health", InstigatorStatus.RUNNING, 5) == []


def test_doctor_names_dagster_settings_it_cannot_use(made: config.Settings) -> None:
    (made.dagster_home / "dagster.yaml").write_text("run_launcher: nonsense\n")
    (problem,) = _findings("Dagster")
    assert problem.startswith("Dagster's storage cannot be used")


def test_doctor_names_slots_that_dagster_does_not_fill(made: config.Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    import dagster as dg

    from mail_pipelines.sensors.servers import SEND_POOL

    assert _findings("slots") == []
    monkeypatch.setenv("MAIL_PIPELINES_SERVER__SLOTS", "3")
    assert _findings("slots") == ["server.slots is 3, but Dagster has at most 2 runs at once on one server"]
    with dg.DagsterInstance.from_config(str(made.dagster_home)) as instance:
        instance.event_log_storage.set_concurrency_slots(SEND_POOL, 12)
    assert _findings("slots")[1:] == ["the servers have 12 send slots, but Dagster has at most 10 runs at once"]
    file = made.dagster_home / "dagster.yaml"
    file.write_text(file.read_text().replace("limit: 2", "limit: 3").replace("max_concurrent_runs: 10", "max_concurrent_runs: 12"))
    assert _findings("slots") == []
    fair = "      - {key: dagster/partition/campaign, value: {applyLimitPerUniqueValue: true}, limit: 11}\n"
    file.write_text(file.read_text().replace("    tag_concurrency_limits:\n", f"    tag_concurrency_limits:\n{fair}"))
    assert _findings("slots") == ["the servers have 12 send slots, but Dagster gives one campaign at most 11"]
    monkeypatch.setenv("DAGSTER_MAX_GLOBAL_OP_CONCURRENCY_LIMIT", "12")
    assert _findings("slots")[0] == "Dagster takes no more than the 12 send slots that the servers have now"


def _register(url: str, key: str, state: str, heartbeat_at: dt.datetime | None) -> None:
    engine = create_engine(url)
    servers.register(engine, key, kind="catcher", host="127.0.0.1", port=25, now=dt.datetime.now(dt.UTC))
    with engine.begin() as connection:
        connection.execute(sa.update(Server).where(Server.key == key).values(state=state, heartbeat_at=heartbeat_at))


def test_doctor_names_silent_servers_and_their_absence(made: config.Settings, database_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAIL_PIPELINES_DATABASE__URL", database_url)
    now = dt.datetime.now(dt.UTC)
    # It beats for as long as this test may take.
    later = now + dt.timedelta(hours=1)
    _register(database_url, "gone", "retired", None)
    assert _findings("servers") == ["no dispatch server is active: nothing can be sent"]
    _register(database_url, "alive", "active", later)
    assert _findings("servers") == []
    _register(database_url, "late", "active", now - dt.timedelta(minutes=2))
    _register(database_url, "never", "active", None)
    assert _findings("servers") == ["2 of 3 active servers are silent: late, never"]


def test_doctor_names_servers_without_room_for_their_log(made: config.Settings, database_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By their heartbeats: the disk may be another host's."""
    monkeypatch.setenv("MAIL_PIPELINES_DATABASE__URL", database_url)
    for key, free_mb in (("mx1", 99), ("mx2", 100)):
        _register(database_url, key, "active", dt.datetime.now(dt.UTC) + dt.timedelta(hours=1))
        with create_engine(database_url).begin() as connection:
            connection.execute(sa.update(Server).where(Server.key == key).values(health={"free_mb": free_mb}))
    assert _findings("servers") == ["the log disk of mx1 has 99 MB free, fewer than 100: it sends nothing until there is room"]


@pytest.mark.server
def test_doctor_names_a_database_that_may_lose_commits(made: config.Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = MariaDB(tmp_path / "mariadb", options=("--log-bin=binary", "--sync-binlog=0")).start()
    try:
        url = server.database()
        migrate.upgrade(create_engine(url))
        monkeypatch.setenv("MAIL_PIPELINES_DATABASE__URL", url)
        assert _findings("durability") == ["sync_binlog is 0: a power failure loses binary log"]
        with server.connect() as connection, connection.cursor() as cursor:
            cursor.execute("SET GLOBAL sync_binlog = 1, GLOBAL innodb_flush_log_at_trx_commit = 2")
        assert _findings("durability") == ["innodb_flush_log_at_trx_commit is 2: a power failure loses commits"]
        with server.connect() as connection, connection.cursor() as cursor:
            cursor.execute("SET GLOBAL innodb_flush_log_at_trx_commit = 1")
        assert _findings("durability") == []
    finally:
        server.stop()


@pytest.mark.server
def test_doctor_names_an_archive_that_is_missed(made: config.Settings) -> None:
    archive, database = Path(made.campaigns.archive), create_engine(made.database.url)
    archive.rmdir()
    assert _findings("archive") == []
    ended = dt.datetime.now(dt.UTC) - dt.timedelta(days=186)
    make_campaign(database, state="finished", finished_at=ended, audience_counts={"matched": 0, "audience": 0, "excluded": {}})
    late, away = _findings("archive")
    assert late == "spring-sale: not archived"
    assert "make the folder" in away
    archive.mkdir()
    assert archiving.archive_old(database, made, dt.datetime.now(dt.UTC)).failed == {}
    assert _findings("archive") == []
    archive.rmdir()
    assert _findings("archive") == [away]


def test_doctor_names_a_stopped_sensor(made: config.Settings) -> None:
    assert _findings("sensor") == []
    command = [sys.executable, "-m", "dagster", "sensor", "stop", "open_shards", "-w", str(ROOT / "workspace.yaml")]
    subprocess.run(command, check=True, cwd=ROOT, capture_output=True)
    assert _findings("sensor") == ["the sensor open_shards is stopped"]


# --- the web server's own view ----------------------------------------------------------------------------------


@pytest.mark.server
def test_plain_dagster_shows_the_graph_without_a_dagster_home(tmp_path: Path) -> None:
    """A clone, `pip install -e .`, `dagster …`: the definitions load, and nothing lands in Dagster's temporary folder."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("MAIL_PIPELINES_", "DAGSTER_"))}
    environ |= {"TMPDIR": str(tmp_path), "MAIL_PIPELINES_HOME": str(tmp_path / "home")}
    result = subprocess.run([sys.executable, "-m", "dagster", "definitions", "validate"], cwd=ROOT, env=environ, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    listing = subprocess.run([sys.executable, "-m", "dagster", "job", "list"], cwd=ROOT, env=environ, check=True, capture_output=True, text=True).stdout
    assert "send_campaign" in listing
    assert [path for path in tmp_path.rglob("central.sqlite3") if path.parent != tmp_path / "home"] == []
