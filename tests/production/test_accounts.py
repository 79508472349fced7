"""What the accounts of a stolen server can do at the broker and in the databases: nothing beyond its own queues and rows.

`tests/dispatch/test_accounts.py` has the rights in the central database one by one, and `test_broker_accounts.py` how accounts at the broker are made and end.
"""

from __future__ import annotations

import datetime as dt
import pickle
import shlex
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar

import amqp
import dagster as dg
import pytest
import sqlalchemy as sa
from kombu import Connection, Exchange, Queue
from kombu.exceptions import DecodeError

from mail_pipelines import config
from mail_pipelines.database.engine import create_engine
from mail_pipelines.database.models import Server
from mail_pipelines.dispatch import accounts, servers
from mail_pipelines.doctor import examination
from mail_pipelines.provisioning.credentials import Accounts
from mail_pipelines.resources import orders, server_storage, tasks
from mail_pipelines.resources.queues import QUEUE_TAG
from tests.production.backing import SPARE
from tests.production.fleet import SERVERS, Fleet

pytestmark = [
    pytest.mark.server,
    pytest.mark.timeout(900),
    pytest.mark.xdist_group("centre"),
    # A broker of files knows no accounts.
    pytest.mark.parametrize("fleet", ["rabbitmq"], indirect=True),
]
STOLEN, OTHER = SERVERS
Status = dg.DagsterRunStatus


@pytest.mark.parametrize("queue", ["centre", OTHER])
def test_it_orders_nothing_from_others(fleet: Fleet, queue: str) -> None:
    order = orders.sign(orders.Order("run", queue, 2e9), orders.new_signing_key())
    assert fleet.backing.broker is not None
    with Connection(fleet.backing.broker.url(STOLEN), transport_options={"confirm_publish": True}) as connection, pytest.raises(amqp.AccessRefused):
        connection.Producer().publish([order, {}, {}], exchange=queue, routing_key=queue, headers={"task": tasks.EXECUTE_RUN, "id": "1"})


@pytest.mark.parametrize("queue", ["centre", OTHER, f"{OTHER}-ctl"])
def test_it_reads_no_queue_of_others(fleet: Fleet, queue: str) -> None:
    assert fleet.backing.broker is not None
    with Connection(fleet.backing.broker.url(STOLEN)) as connection, pytest.raises(amqp.AccessRefused):
        connection.default_channel.basic_get(queue)


@pytest.mark.parametrize("exchange", ["centre.pidbox", f"{OTHER}.pidbox"])
def test_it_commands_no_worker_of_others(fleet: Fleet, exchange: str) -> None:
    """Neither by writing to the exchange of their commands, nor by listening to it."""
    assert fleet.backing.broker is not None
    with Connection(fleet.backing.broker.url(STOLEN), transport_options={"confirm_publish": True}) as connection, pytest.raises(amqp.AccessRefused):
        connection.Producer().publish({"method": "shutdown", "arguments": {}}, exchange=exchange)
    with Connection(fleet.backing.broker.url(STOLEN)) as connection, pytest.raises(amqp.AccessRefused):
        Queue(STOLEN, Exchange(exchange, "fanout", no_declare=True), no_declare=True)(connection.default_channel).bind_to(exchange)


def test_its_environment_opens_no_address(fleet: Fleet) -> None:
    """With everything in its environment file: no account that reads the central database but its own, which sees its own rows."""
    environ, central = fleet.environ(STOLEN), str(fleet.platform.engine.url.database)
    urls = [sa.make_url(environ["MAIL_PIPELINES_DATABASE__URL"]).set(password=environ["MAIL_PIPELINES_DATABASE__PASSWORD"])]
    urls.append(sa.make_url(environ["MAIL_PIPELINES_BROKER__RESULTS"].removeprefix("db+")))
    urls.append(sa.make_url(environ["DAGSTER_MYSQL_URL"]).set(drivername="mysql+pymysql"))
    for url in urls:
        engine = create_engine(url.render_as_string(hide_password=False))
        for table in ("contacts", "suppressions", "deliveries", "dkim_keys"):
            with pytest.raises(sa.exc.DBAPIError, match="denied"), engine.connect() as connection:
                connection.exec_driver_sql(f"SELECT 1 FROM {central}.{table}")
        engine.dispose()


# --- Dagster's storage, and the results of runs -----------------------------------------------------------------------


@dataclass
class Loot:
    """Dagster's storage as the stolen account sees it, with three runs: its own that has ended, its own that has not been ordered, and another server's."""

    engine: sa.Engine
    own: str
    waiting: str
    other: str

    def changes(self, statement: str) -> int:
        with self.engine.begin() as connection:
            runs = {"own": self.own, "waiting": self.waiting, "other": self.other}
            return connection.execute(sa.text(statement), {name: run for name, run in runs.items() if f":{name}" in statement}).rowcount

    def sees(self, query: str) -> set[object]:
        with self.engine.connect() as connection:
            return set(connection.execute(sa.text(query)).scalars())


@pytest.fixture(scope="module")
def loot(fleet: Fleet) -> Iterator[Loot]:
    url = sa.make_url(fleet.environ(STOLEN)["DAGSTER_MYSQL_URL"]).set(drivername="mysql+pymysql")
    given = ((STOLEN, Status.SUCCESS), (STOLEN, Status.NOT_STARTED), (OTHER, Status.STARTED))
    runs = [fleet.instance.add_run(dg.DagsterRun(job_name="send_campaign", status=status, tags={QUEUE_TAG: queue})) for queue, status in given]
    engine = create_engine(url.render_as_string(hide_password=False))
    yield Loot(engine, *(run.run_id for run in runs))
    engine.dispose()
    for run in runs:
        fleet.instance.delete_run(run.run_id)


_COLUMNS = ("pipeline_name", "run_id", "snapshot_id", "`partition`", "backfill_id")
_OF_THE_DAEMON = ("instigators", "jobs", "bulk_actions", "kvs", "daemon_heartbeats")
_NEW_RUN = "INSERT INTO {} (run_id, pipeline_name, status, run_body) VALUES ('r', 'maintenance', 'QUEUED', '{{}}')"
_NEW_TAG = "INSERT INTO run_tags (run_id, `key`, value) VALUES ({}, '{}', '{}')"
_NEW_EVENT = "INSERT INTO event_logs (run_id, event, timestamp, asset_key) VALUES ({}, '{{}}', NOW(), {})"
_NEW_RESULT = "INSERT INTO run_results (run_id, document, changed_at) VALUES ({}, '{{}}', NOW())"


@pytest.mark.parametrize(
    "statement",
    [
        # A run that the daemon would launch, or that it could not read.
        _NEW_RUN.format("runs"),
        _NEW_RUN.format("dagster.runs"),
        *(f"UPDATE runs SET status = '{status}' WHERE run_id = :own" for status in ("QUEUED", "NOT_STARTED", "MANAGED", "queued", "STARTED ", "started")),
        # One of its runs made another job, or moved to another queue, or repeated by Dagster itself.
        *(f"UPDATE runs SET {column} = 'maintenance' WHERE run_id = :own" for column in _COLUMNS),
        "UPDATE dagster.runs SET run_body = '{}' WHERE run_id = :own",
        _NEW_TAG.format(":own", QUEUE_TAG, "centre"),
        _NEW_TAG.format(":other", QUEUE_TAG, STOLEN),
        _NEW_TAG.format(":own", "dagster/max_retries", "3"),
        _NEW_TAG.format(":own", "dagster/will_retry", "true"),
        f"UPDATE run_tags SET `key` = '{QUEUE_TAG}'",
        # Sensors and schedules, backfills, and what the daemon remembers.
        *(f"DELETE FROM {schema}{table}" for table in _OF_THE_DAEMON for schema in ("", "dagster.")),
        "UPDATE instigators SET status = 'STOPPED'",
        "INSERT INTO kvs (`key`, value) VALUES ('EVENT_LOG_CONSUMER_CURSOR-PIPELINE_FAILURE', '0')",
        "INSERT INTO dynamic_partitions (partitions_def_name, `partition`) VALUES ('campaigns', 'x')",
        "INSERT INTO secondary_indexes (name) VALUES ('x')",
        "INSERT INTO snapshots (snapshot_id, snapshot_body, snapshot_type) VALUES ('x', 'x', 'x')",
        "DELETE FROM concurrency_limits",
        # What happened to others' runs and assets, or what is to be forgotten.
        _NEW_EVENT.format(":other", "NULL"),
        _NEW_EVENT.format(":waiting_at_the_centre", "NULL"),
        _NEW_EVENT.format(":own", """'["campaign_audiences"]'"""),
        _NEW_RESULT.format(":other"),
        "INSERT INTO asset_keys (asset_key) VALUES ('[\"campaign_audiences\"]')",
        *(f"DELETE FROM {table}" for table in ("runs", "run_tags", "event_logs", "asset_keys", "run_results")),
        "UPDATE event_logs SET event = '{}'",
        # Tables of its own making.
        "CREATE TABLE x (id int)",
        "CREATE OR REPLACE VIEW runs AS SELECT 1",
        "ALTER TABLE runs ADD COLUMN x int",
    ],
)
def test_nothing_it_writes_starts_a_job_or_speaks_for_others(loot: Loot, statement: str) -> None:
    statement = statement.replace(":waiting_at_the_centre", "'another run'")
    with pytest.raises(sa.exc.DBAPIError, match=r"(?i)denied|CHECK OPTION failed"):
        loot.changes(statement)


def test_it_sees_and_ends_only_runs_that_were_ordered_from_it(loot: Loot, fleet: Fleet) -> None:
    assert loot.own in loot.sees("SELECT run_id FROM runs")
    assert not {loot.waiting, loot.other} & loot.sees("SELECT run_id FROM runs")
    assert loot.changes("UPDATE runs SET status = 'FAILURE' WHERE run_id IN (:waiting, :other)") == 0
    assert loot.changes("UPDATE runs SET status = 'FAILURE' WHERE run_id = :own") == 1
    assert [fleet.status(run) for run in (loot.own, loot.waiting, loot.other)] == [Status.FAILURE, Status.NOT_STARTED, Status.STARTED]


def test_what_it_writes_of_a_run_is_not_what_the_centre_knows_of_it(loot: Loot, fleet: Fleet) -> None:
    """Job, configuration and tags of a run are what the centre wrote, whatever the server's copy says: the daemon repeats runs by them."""
    before = fleet.instance.get_run_by_id(loot.own)
    body = dg.serialize_value(dg.DagsterRun(job_name="maintenance", run_id=loot.own, tags={QUEUE_TAG: "centre", "dagster/max_retries": "3"}))
    with loot.engine.begin() as connection:
        assert connection.execute(sa.text("UPDATE runs SET run_body = :body WHERE run_id = :own"), {"body": body, "own": loot.own}).rowcount == 1
    assert loot.sees("SELECT COUNT(*) FROM runs WHERE run_body LIKE '%maintenance%'") == {1}
    assert fleet.instance.get_run_by_id(loot.own) == before


def test_checks_of_its_audits_it_answers_and_those_of_others_it_does_not_see(loot: Loot, fleet: Fleet) -> None:
    planned = "INSERT INTO asset_check_executions (asset_key, check_name, run_id, execution_status) VALUES (:asset, 'no_alarms', :run, 'PLANNED')"
    places = [("delivery_logs", loot.own), ("delivery_logs", loot.other), ("delivery_results", loot.own)]
    storage = sa.create_engine(sa.make_url(fleet.platform.environ["DAGSTER_MYSQL_URL"]).set(drivername="mysql+pymysql"))
    with storage.begin() as connection:
        for asset, run in places:
            connection.execute(sa.text(planned), {"asset": f'["{asset}"]', "run": run})
    assert loot.changes("UPDATE asset_check_executions SET execution_status = 'SUCCEEDED', `partition` = 'x'") == 1
    with pytest.raises(sa.exc.DBAPIError, match="denied"):
        loot.changes("UPDATE asset_check_executions SET check_name = 'sums_hold'")
    with storage.begin() as connection:
        found = connection.execute(sa.text("SELECT run_id, asset_key, execution_status FROM asset_check_executions WHERE execution_status = 'SUCCEEDED'"))
        assert (loot.own, '["delivery_logs"]', "SUCCEEDED") in found.tuples().all()
        connection.execute(sa.text("DELETE FROM asset_check_executions WHERE run_id IN (:own, :other)"), {"own": loot.own, "other": loot.other})
    storage.dispose()


def test_a_result_is_never_read_as_a_pickle(loot: Loot, fleet: Fleet) -> None:
    """Celery's own backend does that with what it cannot read, and a pickle is code that the centre would execute."""
    document = pickle.dumps(Witness())
    with loot.engine.begin() as connection:
        connection.execute(
            sa.text("INSERT INTO run_results (run_id, document, changed_at) VALUES (:own, :document, NOW())"), {"own": loot.own, "document": document}
        )
    with pytest.raises(DecodeError):
        _ = fleet.app.AsyncResult(loot.own).state
    assert not Witness.seen
    pickle.loads(document)
    assert Witness.seen


class Witness:
    """Says whether it was unpickled."""

    seen: ClassVar[list[str]] = []

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return _bear_witness, ()


def _bear_witness() -> None:
    Witness.seen.append("unpickled")


def test_a_worker_of_two_servers_has_the_runs_of_both_until_its_account_is_revoked(fleet: Fleet) -> None:
    engine, now, second = fleet.platform.engine, dt.datetime.now(dt.UTC), f"{SPARE}-2"
    for port, key in ((25, SPARE), (26, second)):
        servers.register(engine, key, kind="exim", host="127.0.0.1", port=port, now=now)
    with engine.begin() as connection:
        connection.execute(sa.update(Server).where(Server.key == second).values(health={"worker": SPARE}))
    place = fleet.platform.settings.home / "secrets/servers" / f"{SPARE}.environment"
    assert str(place) in fleet.platform.command("mail-pipelines", "server", "account", SPARE).stdout.replace("\n", "")
    environ = dict(line.split("=", 1) for line in shlex.split(place.read_text(encoding="utf-8")))
    assert sorted(environ) == ["DAGSTER_MYSQL_URL", "MAIL_PIPELINES_BROKER__RESULTS"]
    assert place.with_suffix(".broker").stat().st_mode & 0o077 == 0
    assert place.stat().st_mode & 0o077 == 0
    url = sa.make_url(environ["DAGSTER_MYSQL_URL"]).set(drivername="mysql+pymysql")
    queues = (SPARE, f"{SPARE}-ctl", second, f"{second}-ctl", "dispatch", "centre", OTHER)
    runs = [fleet.instance.add_run(dg.DagsterRun(job_name="send_campaign", status=Status.SUCCESS, tags={QUEUE_TAG: queue})).run_id for queue in queues]
    stolen = create_engine(url.render_as_string(hide_password=False))
    with stolen.connect() as connection:
        assert set(runs[:5]) <= (seen := set(connection.exec_driver_sql("SELECT run_id FROM runs").scalars()))
        assert not set(runs[5:]) & seen
        accounts.revoke(engine, SPARE, now)
        with pytest.raises(sa.exc.DBAPIError):
            connection.exec_driver_sql("SELECT run_id FROM runs")
    with pytest.raises(sa.exc.DBAPIError, match="denied"), stolen.connect():
        pass
    stolen.dispose()
    accounts.revoke(engine, second, now)
    for run_id in runs:
        fleet.instance.delete_run(run_id)


def test_doctor_names_a_server_whose_account_may_write_everything(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in fleet.environ(STOLEN).items():
        monkeypatch.setenv(name, value)

    def found() -> list[str]:
        return [finding.problem for finding in examination.examine() if finding.check in ("Dagster", "daemon", "broker")]

    assert found() == []
    monkeypatch.setenv(server_storage.URL_VARIABLE, fleet.environ(None)[server_storage.URL_VARIABLE])
    (problem,) = found()
    assert "may write everything there" in problem


def test_the_password_stays_where_the_centre_may_not_give_the_rest(fleet: Fleet) -> None:
    """What it lacks in Dagster's storage is found before the account is given another password, which its host would not know."""
    engine, database = fleet.platform.engine, fleet.backing.database
    assert database is not None
    central, lacking = str(engine.url.database), "lacking"
    servers.register(engine, lacking, kind="exim", host="127.0.0.1", port=27, now=dt.datetime.now(dt.UTC))
    before = accounts.give(engine, lacking)
    with database.connect() as connection, connection.cursor() as cursor:
        cursor.execute("CREATE USER lacking@'127.0.0.1'")
        for schema in (central, rf"{central}\_servers"):
            cursor.execute(f"GRANT ALL ON `{schema}`.* TO lacking@'127.0.0.1' WITH GRANT OPTION")
        cursor.execute("GRANT CREATE USER, PROCESS, CONNECTION ADMIN ON *.* TO lacking@'127.0.0.1'")
    centre = create_engine(engine.url.set(username="lacking").render_as_string(hide_password=False))
    settings = config.load(fleet.platform.environ)
    with pytest.raises(server_storage.StorageAccountError, match="needs all rights on dagster"):
        Accounts(centre, settings, server_storage.ServerStorage(centre, settings, fleet.platform.environ)).give_accounts(lacking)
    centre.dispose()
    own = create_engine(before.url, before.password)
    with own.connect() as connected:
        assert connected.exec_driver_sql("SELECT `key` FROM servers").scalars().all() == [lacking]
    own.dispose()
    accounts.revoke(engine, lacking, dt.datetime.now(dt.UTC))
