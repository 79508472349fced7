"""Where a run goes that names no queue, who may execute it, and how a production home is made."""

from __future__ import annotations

import datetime as dt
import ipaddress
import os
import shutil
import socket
import stat
from pathlib import Path

import dagster as dg
import pytest
import sqlalchemy as sa
import yaml
from dagster._core.code_pointer import ModuleCodePointer
from dagster._core.origin import JobPythonOrigin, RepositoryPythonOrigin
from sqlalchemy.engine import Engine

from mail_pipelines import config, doors, home, partitions
from mail_pipelines.campaigns import store, yaml_form
from mail_pipelines.commands import context, exim, worker
from mail_pipelines.database.engine import create_engine, reading
from mail_pipelines.database.models import Allotment, Server
from mail_pipelines.definitions import build_defs
from mail_pipelines.delivery.recording import SLOT_SECONDS, slot_at
from mail_pipelines.dispatch import servers
from mail_pipelines.dispatch.exim import process
from mail_pipelines.dispatch.files import ServerFolders, only_one
from mail_pipelines.doctor import broker, host, waiting
from mail_pipelines.resources import execution, orders, queues, run_tags, tasks
from mail_pipelines.resources.queues import QUEUE_TAG
from tests.e2e.platform import CAMPAIGN
from tests.parts.processes import free_port

SEND = {"dagster/partition": "spring|03", "dagster/partition/campaign": "spring"}


def run_of(job: str, asset: str | None = None, **tags: str) -> dg.DagsterRun:
    return dg.DagsterRun(job_name=job, asset_selection=frozenset({dg.AssetKey(asset)}) if asset else None, tags=tags)


def queue_of(engine: Engine, run: dg.DagsterRun) -> str:
    with reading(engine) as connection:
        return queues.choose(connection, run, 10)


@pytest.mark.parametrize(
    ("run", "queue"),
    [
        (run_of("build_audience", **{"dagster/partition": "spring"}), "centre"),
        (run_of("maintenance"), "centre"),
        (run_of("__ASSET_JOB", "contact_snapshot"), "centre"),
        (run_of("maintenance", **{QUEUE_TAG: "s1"}), "s1"),
        (run_of("audit_delivery_logs", **{"dagster/partition": "s2"}), "s2-ctl"),
        (run_of("__ASSET_JOB", "delivery_logs", **{"dagster/partition": "s2"}), "s2-ctl"),
        (run_of("send_campaign", **SEND, **{QUEUE_TAG: "s7"}), "s7"),
        (run_of("send_campaign", **SEND), "dispatch"),
        (run_of("__ASSET_JOB", "send_batches", **SEND), "dispatch"),
    ],
)
def test_a_run_goes_where_it_belongs(engine: Engine, run: dg.DagsterRun, queue: str) -> None:
    """(No server speaks, so that a send run goes to whichever will.)"""
    assert queue_of(engine, run) == queue


def test_a_send_run_goes_to_the_speaking_server_with_most_unspent_grant(engine: Engine) -> None:
    now = dt.datetime.now(dt.UTC)
    known = [servers.register(engine, key, kind="catcher", host="127.0.0.1", port=25, now=now).id for key in ("s1", "s2", "s3")]
    with engine.begin() as connection:
        campaign_id = store.create(connection, yaml_form.parse(CAMPAIGN.format(name="Spring", key="spring")).definition, now).id
        connection.execute(sa.update(Server).where(Server.key != "s3").values(heartbeat_at=now))
        for server_id, granted, used in zip(known, (100, 80, 900), (60, 10, 0), strict=True):
            row = {"server_id": server_id, "campaign_id": campaign_id, "provider": "google", "granted": granted, "used": used}
            # It may be the next one when it is asked about.
            for start in (slot_at(now), slot_at(now) + SLOT_SECONDS):
                connection.execute(sa.insert(Allotment).values(**row, slot_start=start))
    assert queue_of(engine, run_of("send_campaign", **SEND)) == "s2"


LABELS = {"mail_pipelines/campaign": "spring", "mail_pipelines/server": "s2", "mail_pipelines/attempt": "1"}


@pytest.mark.parametrize(
    ("run", "queue", "tags"),
    [
        (run_of("send_campaign", **SEND), "s2", LABELS),
        (run_of("__ASSET_JOB", "send_batches", **SEND), "s2", LABELS),
        (run_of("send_campaign", **SEND), "dispatch", {"mail_pipelines/campaign": "spring"}),
        (run_of("send_campaign", **SEND, **LABELS | {"mail_pipelines/attempt": "3"}), "s2", {}),
        (run_of("__ASSET_JOB", "delivery_logs", **{"dagster/partition": "s2"}), "s2-ctl", {"mail_pipelines/server": "s2"}),
        (run_of("__ASSET_JOB", "campaign_audiences", **{"dagster/partition": "spring"}), "centre", {"mail_pipelines/campaign": "spring"}),
        (run_of("__ASSET_JOB", "recipient_segments", **{"dagster/partition": "readers"}), "centre", {}),
        (run_of("maintenance"), "centre", {}),
    ],
)
def test_a_run_that_somebody_starts_by_hand_is_found_as_well(run: dg.DagsterRun, queue: str, tags: dict[str, str]) -> None:
    with dg.DagsterInstance.ephemeral() as instance:
        assert run_tags.missing(instance, run, queue) == tags


def test_a_send_run_that_is_executed_again_is_another_attempt() -> None:
    with dg.DagsterInstance.ephemeral() as instance:
        first = instance.add_run(run_of("send_campaign", **SEND, **LABELS))
        again = first._replace(run_id="again", parent_run_id=first.run_id, root_run_id=first.run_id)
        assert run_tags.missing(instance, again, "s2") == LABELS | {"mail_pipelines/attempt": "2"}


def test_each_job_and_asset_of_a_campaign_or_server_says_so() -> None:
    definitions = build_defs()
    graph = definitions.resolve_asset_graph()
    assert {key for key in graph.get_all_asset_keys() if graph.get(key).partitions_def == partitions.campaigns} == run_tags.CAMPAIGN_ASSETS
    told = {job.name: job.partitions_def for job in definitions.resolve_all_job_defs() if job.partitions_def and not job.name.startswith("__")}
    for name, definition in told.items():
        key = "spring|03" if definition == partitions.campaign_shards else "spring"
        given = definitions.resolve_job_def(name).get_tags_for_partition_key(key, None)
        label = run_tags.SERVER if definition == partitions.servers else run_tags.CAMPAIGN
        assert given[label] == "spring"
    assert set(told) >= {"build_audience", "send_campaign", "report_campaign", "audit_delivery_logs"}


def test_the_jobs_of_servers_are_those_that_the_queues_know() -> None:
    repository = build_defs().get_repository_def()
    for job, asset in (queues.SENDING, queues.AUDIT):
        assert {key.to_user_string() for key in repository.get_job(job).asset_layer.selected_asset_keys} == {asset}


def test_a_worker_executes_only_its_own_queues_and_a_server_nothing_of_the_centre() -> None:
    assert queues.own_queues(None) == ("centre",)
    assert queues.own_queues("s1") == ("dispatch", "s1", "s1-ctl")
    assert "is not of mail_pipelines.definitions" in (execution.refusal(run_of("maintenance"), "centre", None) or "")


def test_the_centre_has_run_slots_beside_those_for_servers_in_the_making_and_for_sources(monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan, a freeze or an import waits for neither; and no more runs make or remove servers than there are slots beside."""
    began: list[list[str]] = []
    monkeypatch.setattr(os, "execve", lambda _program, words, _environ: began.append(words))
    monkeypatch.setenv("MAIL_PIPELINES_PROVISIONING__AT_ONCE", "3")
    context.settings.cache_clear()
    worker.run()
    ((slots,),) = [[words[words.index("-c") + 1]] for words in began]
    assert slots == str(config.ServerSettings().slots + 3 + queues.SOURCES_AT_ONCE)
    shipped = yaml.safe_load((home.checkout() / "infra/dagster/production/dagster.yaml").read_text(encoding="utf-8"))
    limits = {limit["key"]: limit["limit"] for limit in shipped["concurrency"]["runs"]["tag_concurrency_limits"]}
    assert limits[run_tags.MAKING] == config.ProvisioningSettings().at_once


# --- a host with several servers ----------------------------------------------------------------------------------


@pytest.fixture
def two(monkeypatch: pytest.MonkeyPatch) -> None:
    """A host that speaks for s1 and s2, each with an address."""
    monkeypatch.setenv("MAIL_PIPELINES_SERVER", "s1,s2")
    own = config.home_folder() / "servers"
    own.mkdir(parents=True)
    (own / "s1.toml").write_text('[server]\naddress = "127.0.0.11"\n', encoding="utf-8")
    (own / "s2.toml").write_text('[server]\naddress = "127.0.0.12"\nexim = "s1"\nslots = 3\n', encoding="utf-8")


@pytest.mark.usefixtures("two")
def test_one_worker_takes_the_runs_of_all_servers_of_its_host(monkeypatch: pytest.MonkeyPatch) -> None:
    began: list[list[str]] = []
    context.settings.cache_clear()
    monkeypatch.setattr(os, "execve", lambda _program, words, _environ: began.append(words))
    worker.run()
    worker.run(control=True)
    told = [{option: words[words.index(option) + 1] for option in ("-Q", "-n", "-c")} for words in began]
    assert told == [{"-Q": "dispatch,s1,s2", "-n": "s1@%h", "-c": "5"}, {"-Q": "s1-ctl,s2-ctl", "-n": "s1-ctl@%h", "-c": "1"}]


@pytest.mark.usefixtures("two")
@pytest.mark.parametrize(
    ("queue", "server"), [("s1", "s1"), ("s2", "s2"), ("s2-ctl", "s2"), ("dispatch", "s2"), ("s3", "s2"), ("centre", "s2")], ids=lambda value: value
)
def test_a_run_executes_as_the_server_whose_queue_it_is_of_and_never_as_another(queue: str, server: str) -> None:
    folder = ServerFolders.of(config.load().server, "s1").sessions
    folder.mkdir(parents=True)
    # s1 has a session, so that it does not get the run that any server may take.
    with only_one(folder / "run", "a session"), execution._speaking_for_one(queue) as own:
        assert (own, queues.this_server(), config.load().server.address) == (server, server, f"127.0.0.1{server[1]}")
        refused = execution.refusal(ours("send_campaign"), queue, own)
        assert bool(refused) == (queue in ("s3", "centre"))
    assert config.servers_of_this_host() == ("s1", "s2")


@pytest.mark.usefixtures("two")
def test_exim_runs_for_the_servers_that_the_worker_speaks_for(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[dict[str, tuple[str | None, str]]] = []
    monkeypatch.setattr(process, "run", lambda members, **_: started.append({key: (own.this_server, own.server.address) for key, own in members.items()}))
    exim.run("s1,s2")
    for given in ("s2,s1", "s1", None):
        monkeypatch.delenv("MAIL_PIPELINES_SERVER") if given is None else monkeypatch.setenv("MAIL_PIPELINES_SERVER", given)
        with pytest.raises(config.ConfigError, match=r"set MAIL_PIPELINES_SERVER=s1,s2 for all processes of this host"):
            exim.run("s1,s2")
    # At the centre, whose host then does the centre's work, too.
    exim.run("s1")
    assert started == [{"s1": ("s1", "127.0.0.11"), "s2": ("s2", "127.0.0.12")}, {"s1": (None, "127.0.0.11")}]


def ours(job: str) -> dg.DagsterRun:
    """A run of this project's definitions, as an order must be for."""
    code = ModuleCodePointer("mail_pipelines.definitions", "defs", None)
    origin = JobPythonOrigin(job, RepositoryPythonOrigin("python", code, None, None, None))
    return dg.DagsterRun(job_name=job, job_code_origin=origin)


# --- the home ---------------------------------------------------------------------------------------------------


@pytest.fixture
def centre(monkeypatch: pytest.MonkeyPatch) -> config.Settings:
    """A production home, but for Dagster's storage, which stays embedded here."""
    shipped = home._shipped_dagster_yaml
    monkeypatch.setattr(home, "_shipped_dagster_yaml", lambda _production: shipped(False))
    home.make(production=True)
    return config.load()


def test_the_centre_has_a_key_and_says_how_to_verify_it(centre: config.Settings) -> None:
    key = centre.home / "secrets/signing_key"
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    assert centre.broker.signing_key == key.read_text().strip()
    assert orders.verify_key_of(centre.broker.signing_key) == centre.broker.verify_key
    assert home.make(production=True) == []
    assert config.load() == centre


def test_a_server_makes_no_keys_and_touches_no_database(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAIL_PIPELINES_SERVER", "s1")
    with pytest.raises(config.ConfigError, match="secrets/token_key, which cannot be read"):
        home.make(production=True)
    (config.home_folder() / "secrets/token_key").write_text("the centre's\n")
    home.make(production=True)
    settings = config.load()
    assert settings.broker.signing_key is None
    assert (settings.dagster_home / "dagster.yaml").read_text() == home._shipped_dagster_yaml(True)
    assert not (settings.home / "central.sqlite3").exists()


def test_an_embedded_home_does_not_become_another(monkeypatch: pytest.MonkeyPatch) -> None:
    home.make()
    with pytest.raises(home.HomeError, match="without --production"):
        home.make(production=True)


def test_dagster_takes_the_settings_that_are_shipped(monkeypatch: pytest.MonkeyPatch) -> None:
    from dagster._core.instance.config import dagster_instance_config

    monkeypatch.setenv("DAGSTER_MYSQL_URL", "mysql+pymysql://x:x@x/x")
    folder = home.checkout() / "infra/dagster/production"
    settings, _ = dagster_instance_config(str(folder))
    assert settings["run_launcher"] == {"module": "mail_pipelines.resources.launcher", "class": "QueueLauncher"}
    # Sessions may last as long as Dagster lets them, and results are kept for longer than any run.
    assert config.SendingSettings().session_seconds < settings["run_monitoring"]["max_runtime_seconds"] < tasks.RESULT_SECONDS
    limits = {limit["key"]: limit["limit"] for limit in settings["concurrency"]["runs"]["tag_concurrency_limits"]}
    assert limits[QUEUE_TAG] == config.ServerSettings().slots


def test_an_app_without_a_broker_says_what_to_set() -> None:
    with pytest.raises(config.ConfigError, match=r"broker\.url and broker\.results"):
        tasks.make_app(config.Settings(home=config.home_folder(os.environ)))


# --- doctor -----------------------------------------------------------------------------------------------------


def broker_findings() -> list[str]:
    return [finding.problem for finding in broker.check_broker(config.load())]


def test_doctor_names_a_broker_that_is_away_and_keys_that_do_not_match(centre: config.Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert broker_findings() == ["broker.url and broker.results are not set: runs cannot be carried to workers (docs/production.md)"]
    monkeypatch.setenv("MAIL_PIPELINES_BROKER__URL", f"filesystem://{tmp_path}/broker")
    monkeypatch.setenv("MAIL_PIPELINES_BROKER__RESULTS", f"file://{tmp_path}")
    assert broker_findings() == []
    monkeypatch.setenv("MAIL_PIPELINES_BROKER__VERIFY_KEY", orders.verify_key_of(orders.new_signing_key()))
    assert broker_findings() == ["broker.verify_key is not that of broker.signing_key: every order is refused"]
    monkeypatch.delenv("MAIL_PIPELINES_BROKER__VERIFY_KEY")
    monkeypatch.setenv("MAIL_PIPELINES_BROKER__URL", f"amqp://centre:secret@127.0.0.1:{free_port()}/mail")
    (problem,) = broker_findings()
    assert problem.startswith("the broker does not answer")
    assert "secret" not in problem


def test_doctor_names_a_database_of_results_that_takes_connections_and_never_answers(
    centre: config.Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(waiting, "STORAGE_SECONDS", 0.5)
    monkeypatch.setenv("MAIL_PIPELINES_BROKER__URL", f"filesystem://{tmp_path}/broker")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("MAIL_PIPELINES_BROKER__RESULTS", f"db+mysql+pymysql://centre:secret@127.0.0.1:{silent.getsockname()[1]}/results")
        assert broker_findings() == ["the database of results does not answer within 0.5 s"]


def test_doctor_has_nothing_to_say_of_a_broker_where_there_is_none() -> None:
    home.make()
    assert broker_findings() == []


@pytest.mark.usefixtures("two")
def test_doctor_names_what_is_wrong_with_a_host_of_several_servers(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAIL_PIPELINES_DATABASE__URL", engine.url.render_as_string(hide_password=False))
    servers.register(engine, "s1", kind="exim", host="127.0.0.1", port=2525, now=dt.datetime.now(dt.UTC))
    own = config.home_folder() / "servers/s2.toml"

    def said() -> list[str]:
        return [finding.problem for finding in host.check_addresses(config.members())]

    assert said() == ["server s2: no server is called 's2'; there are s1"]
    servers.register(engine, "s2", kind="exim", host="127.0.0.1", port=2525, now=dt.datetime.now(dt.UTC))
    assert said() == ["servers s1 and s2 have the same port 2525"]
    servers.register(engine, "s2", kind="exim", host="127.0.0.1", port=2526, now=dt.datetime.now(dt.UTC))
    assert said() == []
    own.write_text('[server]\naddress = "192.0.2.77"\nexim = "s1"\n', encoding="utf-8")
    assert said() == ["server s2 is to send from 192.0.2.77, which no interface of this host has"]
    own.write_text('[server]\naddress = "127.0.0.11"\nexim = "s1"\n', encoding="utf-8")
    assert said() == ["servers s1 and s2 both send from 127.0.0.11: one server is one sending address"]
    own.write_text('[server]\nexim = "s1"\n', encoding="utf-8")
    assert "server s2 shares an Exim, so it needs an address of its own" in said()[0]
    own.unlink()
    assert "server s2 does not share the Exim of s1" in said()[0]


@pytest.mark.usefixtures("two")
@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_doctor_asks_for_each_server_of_a_host_by_its_own_account(engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What an account shows is played by databases in which there is no other server."""
    other = tmp_path / "other.sqlite3"
    shutil.copy(str(engine.url.database), other)
    monkeypatch.setenv("MAIL_PIPELINES_DATABASE__URL", engine.url.render_as_string())
    monkeypatch.setenv("MAIL_PIPELINES_SENDING__TOKEN_KEY", "the key of s1")
    own = config.home_folder() / "servers/s2.toml"
    own.write_text(f'{own.read_text(encoding="utf-8")}[database]\nurl = "sqlite:///{other}"\n[metrics]\nport = 9467\n', encoding="utf-8")
    second = create_engine(f"sqlite:///{other}")
    for number, (key, its_engine) in enumerate((("s1", engine), ("s2", second))):
        servers.register(its_engine, key, kind="exim", host="127.0.0.1", port=2601 + number, now=dt.datetime.now(dt.UTC))
    second.dispose()
    everywhere = ipaddress.ip_address("0.0.0.0")
    monkeypatch.setattr(doors, "listening", lambda: [doors.Listener(everywhere, port, 0) for port in (2601, 2602, 9467)])
    assert [finding.problem for finding in host.check_doors(config.load(), config.members())] == [
        "server s1 is open to other hosts at 0.0.0.0:2601",
        "server s2 is open to other hosts at 0.0.0.0:2602",
        "metrics is open to other hosts at 0.0.0.0:9467",
    ]

    def said() -> list[str]:
        return [finding.problem for finding in host.check_addresses(config.members())]

    assert said() == ["servers s1 and s2 have the same token key, though each has an account of its own"]
    own.write_text(f'{own.read_text(encoding="utf-8")}[sending]\ntoken_key = "the key of s2"\n', encoding="utf-8")
    assert said() == []
