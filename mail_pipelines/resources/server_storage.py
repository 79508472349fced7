"""What the account of a dispatch server finds of Dagster's storage and of the results of runs: a schema of views beside Dagster's own, as one table.

A server is assumed stealable, and whoever can write into Dagster's storage can have the centre's daemon start any job. Through these views an account
sees and changes only the runs that were ordered from its own queues, and of those neither which job they are nor how it is configured
(docs/decisions/0046-a-servers-dagster-is-views.md).

What belongs here: those rights, putting them into the database, and the addresses by which a server uses them. What does not: its account and what it may do
in the central database (`dispatch.accounts`, `database.boundary`), and at the broker (`broker_accounts`).
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine

from mail_pipelines.config import Settings
from mail_pipelines.database.boundary.rights import View
from mail_pipelines.database.engine import is_mysql
from mail_pipelines.database.models import Server
from mail_pipelines.dispatch.accounts import Account
from mail_pipelines.errors import MailPipelinesError
from mail_pipelines.resources import queues, results, tasks, views_dialect

URL_VARIABLE = "DAGSTER_MYSQL_URL"
_RESULTS_VARIABLE = "MAIL_PIPELINES_BROKER__RESULTS"
_REFUSED = {1044, 1049, 1142, 1143, 1146, 1227}
# A server's own copy of the record of a run. Dagster writes the whole record with each change of status, and the centre starts runs by it.
_BODY = "server_body"

# The parts that queries share. `{central}`, `{dagster}` and `{results}` are schemas, `x` is the table that is asked about.
_PARTS = {
    "body": _BODY,
    # A run is the account's if it was ordered from the queue of all, or from one of the server whose account it is (by the name under which it has logged in),
    # or from one of another on its host. A server says itself whose worker executes its runs; about those of others it has no say.
    "is_own": "EXISTS (SELECT 1 FROM {dagster}.run_tags AS t JOIN {central}.servers AS me ON me.account = SUBSTRING_INDEX(USER(), '@', 1) "
    "WHERE t.run_id = x.run_id AND t.`key` = '{queue_tag}' AND (t.value IN ('{shared}', me.`key`, CONCAT(me.`key`, '{control}')) OR EXISTS "
    "(SELECT 1 FROM {central}.servers AS s WHERE t.value IN (s.`key`, CONCAT(s.`key`, '{control}')) "
    "AND JSON_UNQUOTE(JSON_EXTRACT(s.health, '$.worker')) = me.`key`)))",
    "queue_tag": queues.QUEUE_TAG,
    "shared": queues.DISPATCH,
    "control": queues.control_queue(""),
    # Of these assets alone servers tell news.
    "is_theirs": "x.asset_key IN ({assets})",
    "assets": ", ".join(f"""'["{asset}"]'""" for _, asset in (queues.SENDING, queues.AUDIT)),
}
_READ = "SELECT, SHOW VIEW"

VIEWS = (
    # --- what is the same for all ---
    # Dagster looks whether they are there.
    View("jobs", _READ, "SELECT * FROM {dagster}.jobs WHERE FALSE"),
    View("instance_info", _READ, "SELECT * FROM {dagster}.instance_info"),
    View("secondary_indexes", _READ, "SELECT * FROM {dagster}.secondary_indexes"),
    View("snapshots", _READ, "SELECT * FROM {dagster}.snapshots"),
    View("dynamic_partitions", _READ, "SELECT * FROM {dagster}.dynamic_partitions"),
    # --- what is the server's own ---
    # A run that waits for the daemon is not here, and cannot be made one again. To the letter: Dagster ends with an error at a status that it does not know.
    View(
        "runs",
        f"{_READ}, UPDATE (status, run_body, update_timestamp, start_time, end_time)",
        "SELECT id, run_id, snapshot_id, pipeline_name, status, {body} AS run_body, `partition`, partition_set, create_timestamp, update_timestamp, "
        "start_time, end_time, backfill_id FROM {dagster}.runs AS x "
        "WHERE CAST(status AS BINARY) IN ('STARTING', 'STARTED', 'SUCCESS', 'FAILURE', 'CANCELING', 'CANCELED') AND {is_own}",
        checked=True,
    ),
    # Why a run failed. (A view that asks for other rows of its own table cannot be written to, so this one has those of all servers.)
    View("run_tags", f"{_READ}, INSERT, UPDATE (value)", "SELECT * FROM {dagster}.run_tags WHERE `key` = 'dagster/failure_reason'", checked=True),
    View("event_logs", f"{_READ}, INSERT", "SELECT * FROM {dagster}.event_logs AS x WHERE (x.asset_key IS NULL OR {is_theirs}) AND {is_own}", checked=True),
    View(
        "asset_keys",
        f"{_READ}, INSERT, UPDATE (asset_key, last_materialization, last_run_id, last_materialization_timestamp)",
        "SELECT * FROM {dagster}.asset_keys AS x WHERE {is_theirs}",
        checked=True,
    ),
    # What checks of its audits were planned, and what they have found.
    View(
        "asset_check_executions",
        f"{_READ}, UPDATE (execution_status, evaluation_event, evaluation_event_timestamp, evaluation_event_storage_id, "
        "materialization_event_storage_id, `partition`)",
        "SELECT * FROM {dagster}.asset_check_executions AS x WHERE {is_theirs} AND {is_own}",
        checked=True,
    ),
    View("asset_event_tags", f"{_READ}, INSERT", "SELECT * FROM {dagster}.asset_event_tags AS x WHERE {is_theirs}", checked=True),
    View(results.TABLE, f"{_READ}, INSERT, UPDATE", "SELECT * FROM {results}.run_results AS x WHERE {is_own}", checked=True),
)


class StorageAccountError(MailPipelinesError):
    """A server cannot be given what it needs of Dagster's storage; the message says what is missing."""


@dataclass(frozen=True)
class Schemas:
    """The schemas of one database server: the central one, Dagster's, that of results, and the servers' own."""

    central: str
    dagster: str
    results: str

    @classmethod
    def of(cls, engine: Engine, settings: Settings, environ: Mapping[str, str]) -> Schemas | None:
        """None where runs are not carried to servers of other hosts through databases."""
        dagster, given = environ.get(URL_VARIABLE), settings.broker.results or ""
        if not (dagster and given.startswith("db+") and is_mysql(engine)):
            return None
        return cls(str(engine.url.database), str(sa.make_url(dagster).database), str(sa.make_url(given.removeprefix("db+")).database))

    @property
    def own(self) -> str:
        return f"{self.dagster}_servers"


@dataclass(frozen=True)
class ServerStorage:
    """Dagster's storage and the results for accounts of servers: nothing to do, where they are not in MySQL/MariaDB.

    `engine`: the centre's, of the central database, in whose database server both have to be.
    """

    engine: Engine
    settings: Settings
    environ: Mapping[str, str]

    @property
    def _schemas(self) -> Schemas | None:
        return Schemas.of(self.engine, self.settings, self.environ)

    def prepare(self) -> None:
        """Let the accounts of all servers use it. Raises `StorageAccountError`."""
        if (schemas := self._schemas) is not None:
            _install(self.engine, self.settings, schemas)

    def environment(self, account: Account) -> dict[str, str]:
        """What to set on the host of a server, passwords included."""
        if (schemas := self._schemas) is None:
            return {}
        assert self.settings.broker.results is not None
        name = sa.make_url(account.url).username
        dagster, given = (
            sa.make_url(url).set(username=name, password=account.password, database=schemas.own)
            for url in (self.environ[URL_VARIABLE], self.settings.broker.results.removeprefix("db+"))
        )
        return {
            URL_VARIABLE: dagster.set(drivername=views_dialect.DRIVER).render_as_string(hide_password=False),
            _RESULTS_VARIABLE: f"db+{given.render_as_string(hide_password=False)}",
        }


def give(engine: Engine, settings: Settings, account: Account, environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Let a server's account use Dagster's storage and the results; what to set on its host. Raises `StorageAccountError`."""
    storage = ServerStorage(engine, settings, environ)
    storage.prepare()
    return storage.environment(account)


def renew(engine: Engine, settings: Settings, environ: Mapping[str, str] = os.environ) -> None:
    """Make the table of results, and bring the views up to date with the tables, where there are servers that use them."""
    if (schemas := Schemas.of(engine, settings, environ)) is None:
        return
    tasks.make_app(settings).backend.make_table()
    query = sa.text("SELECT EXISTS (SELECT 1 FROM information_schema.schemata WHERE schema_name = :name)")
    with engine.connect() as connection:
        exists = connection.execute(query, {"name": schemas.own}).scalar_one()
    if exists:
        _install(engine, settings, schemas)


def _install(engine: Engine, settings: Settings, schemas: Schemas) -> None:
    """Make schema and views, and give their rights to the accounts of all servers."""
    tasks.make_app(settings).backend.make_table()
    own = _quoted(engine, schemas.own)
    words = {name: _quoted(engine, schema) for name, schema in (("central", schemas.central), ("dagster", schemas.dagster), ("results", schemas.results))}
    with _explained(engine, schemas), engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        _add_body(connection, schemas)
        _run(connection, f"CREATE DATABASE IF NOT EXISTS {own} CHARACTER SET utf8mb4")
        for view in VIEWS:
            check = " WITH CASCADED CHECK OPTION" if view.checked else ""
            _run(connection, f"CREATE OR REPLACE SQL SECURITY DEFINER VIEW {own}.{view.name} AS {_filled(view.query, words)}{check}")
        for account in connection.execute(sa.select(Server.account).where(Server.account.is_not(None))).scalars().all():
            for view in VIEWS:
                connection.exec_driver_sql(f"GRANT {view.rights} ON {own}.{view.name} TO %s@'%%'", (account,))


def _add_body(connection: Connection, schemas: Schemas) -> None:
    """A column of Dagster's table that it does not know: filled by the database when the centre makes a run."""
    query = sa.text("SELECT EXISTS (SELECT 1 FROM information_schema.columns WHERE table_schema = :schema AND table_name = 'runs' AND column_name = :name)")
    if not connection.execute(query, {"schema": schemas.dagster, "name": _BODY}).scalar_one():
        _run(connection, f"ALTER TABLE {_quoted(connection.engine, schemas.dagster)}.runs ADD COLUMN {_BODY} TEXT DEFAULT (run_body)")


def _filled(query: str, schemas: Mapping[str, str]) -> str:
    """A query with its parts, and the parts with theirs."""
    words = {**_PARTS, **schemas}
    while "{" in query:
        query = query.format(**words)
    return query


def _quoted(engine: Engine, name: str) -> str:
    return engine.dialect.identifier_preparer.quote_identifier(name)


def _run(connection: Connection, statement: str) -> None:
    # Without parameters the driver leaves percent signs alone.
    connection.exec_driver_sql(statement, execution_options={"no_parameters": True})


@contextmanager
def _explained(engine: Engine, schemas: Schemas) -> Iterator[None]:
    try:
        yield
    except sa.exc.DBAPIError as error:
        code, words = (*getattr(error.orig, "args", ()), None, None)[:2]
        if code not in _REFUSED:
            raise
        raise StorageAccountError(
            f"the account of the centre may not do this ({words or code}): {engine.url.username} needs all rights on {schemas.dagster}, {schemas.own} and "
            f"{schemas.results} with grant option, in the database server of the central database (docs/production.md); then repeat this"
        ) from error
