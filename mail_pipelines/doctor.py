"""What is wrong with an installation, and what to do about it. Every check only reads, and is a plain function that returns findings."""

from __future__ import annotations

import datetime as dt
import itertools
import os
import shutil
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import sqlalchemy as sa

from mail_pipelines import __version__, config, doors
from mail_pipelines.campaigns import archiving
from mail_pipelines.database import migrate
from mail_pipelines.database.engine import DatabaseError, database_id, database_now, is_mysql, open_engine, reading
from mail_pipelines.database.models import Campaign, LedgerGeneration
from mail_pipelines.delivery.ledger_archive import LedgerArchive, LedgerArchiveError
from mail_pipelines.dispatch import clock, holds, servers, token_keys
from mail_pipelines.dispatch.files import DispatchError, ServerFolders
from mail_pipelines.dispatch.recovery import standing
from mail_pipelines.dispatch.token_keys import InUse
from mail_pipelines.domains import store
from mail_pipelines.errors import MailPipelinesError
from mail_pipelines.provisioning import store as provisions
from mail_pipelines.provisioning.dns import publishers
from mail_pipelines.provisioning.sources import reading as hosts_file

if TYPE_CHECKING:
    from dagster import DagsterInstance
    from sqlalchemy.engine import Engine

SHOWN = 5
# A database that takes connections may never answer. No question of ours takes it long.
ANSWER_SECONDS = 10.0
# Dagster and Celery connect to theirs themselves, several times, and wait without an end.
STORAGE_SECONDS = 30.0
_HANGS = "look at its database and the host of that (full disk? no memory?)"
# So many nights in vain are no accident.
ARCHIVING_LATE = dt.timedelta(days=5)


@dataclass(frozen=True)
class Finding:
    """One problem: what was looked at, what is wrong, what to do."""

    check: str
    problem: str
    remedy: str


def examine(environ: Mapping[str, str] = os.environ) -> list[Finding]:
    """All findings, in the order in which they are best dealt with. A configuration that cannot be read hides everything else."""
    try:
        settings, members = config.load(environ), config.members(environ)
    except config.ConfigError as error:
        return [Finding("configuration", str(error), "correct it; `mail-pipelines config reference` lists the keys")]
    return [
        *check_home(settings),
        *check_token_key(settings),
        *check_dagster_home(settings, environ),
        *check_disk(settings),
        *check_doors(settings, members),
        *check_addresses(members),
        *check_central_database(settings, is_centre=not members),
        *check_broker(settings),
        *check_storage_account(members, environ),
        *check_dagster(settings, is_centre=not members),
    ]


def check_home(settings: config.Settings) -> Iterator[Finding]:
    for path in (settings.home / config.CONFIG_FILE, settings.dagster_home / "dagster.yaml"):
        if not path.is_file():
            yield Finding("home", f"{path} is missing", "run `mail-pipelines init`, or set MAIL_PIPELINES_HOME to the folder that was meant")


def check_token_key(settings: config.Settings) -> Iterator[Finding]:
    try:
        settings.token_key()
    except config.ConfigError as error:
        yield Finding("token key", str(error), "bring back the key that earlier mail was sent with: with another one its links and bounces are not recognised")


def check_dagster_home(settings: config.Settings, environ: Mapping[str, str]) -> Iterator[Finding]:
    given = environ.get("DAGSTER_HOME")
    remedy = 'eval "$(mail-pipelines env)"'
    if not given:
        yield Finding("DAGSTER_HOME", "DAGSTER_HOME is not set: `dagster` commands would use a temporary folder", remedy)
    elif Path(given).expanduser().resolve() != settings.dagster_home.resolve():
        yield Finding("DAGSTER_HOME", f"DAGSTER_HOME is {given}, but this home's is {settings.dagster_home}", remedy)


def check_disk(settings: config.Settings) -> Iterator[Finding]:
    folders = {settings.home, settings.snapshot_folder, Path(settings.server.log_folder)}
    # Folders of one file system share one finding.
    devices = {folder.stat().st_dev: folder for folder in sorted(folders) if folder.is_dir()}
    for folder in devices.values():
        free_mb = shutil.disk_usage(folder).free // 1_000_000
        if free_mb < settings.operation.min_free_mb:
            yield Finding(
                "disk", f"{free_mb} MB are free on the disk of {folder}, fewer than {settings.operation.min_free_mb}", "make room (operation.min_free_mb)"
            )


def check_doors(settings: config.Settings, members: Mapping[str, config.Settings]) -> Iterator[Finding]:
    """Ports that ask for no login and are open to other hosts. Without the database, those of registered servers are not known."""
    found: dict[doors.Listener, doors.Door] = {}
    # An account of the database shows no server but its own, and each tells its metrics at a port of its own.
    for one in members.values() or [settings]:
        try:
            with _connected(one) as connection:
                fleet = servers.all_servers(connection)
        except (DatabaseError, sa.exc.SQLAlchemyError):
            fleet = []
        here = [server for server in fleet if server.key in members or ServerFolders.of(one.server, server.key).journal.exists()]
        found |= {door.listener: door for door in doors.open_doors(one, here)}
    for door in found.values():
        yield Finding("doors", f"{door.what} is open to other hosts at {door.listener}", door.remedy)


@contextmanager
def _connected(settings: config.Settings) -> Iterator[sa.Connection]:
    """The central database, by the account of these settings."""
    engine = open_engine(settings.database, answer_seconds=ANSWER_SECONDS)
    try:
        with reading(engine) as connection:
            yield connection
    finally:
        engine.dispose()


def check_addresses(members: Mapping[str, config.Settings]) -> Iterator[Finding]:
    """One server is one sending address, of this host; and one account, token key and port."""
    from mail_pipelines.dispatch.exim import instance, process

    try:
        if len(members) > 1:
            process.check(members)
    except instance.EximError as error:
        yield Finding("addresses", str(error), "docs/production.md has how a host is several servers")
        return
    for name, settings in members.items():
        if (address := settings.server.address) and not _is_of_this_host(address):
            yield Finding("addresses", f"server {name} is to send from {address}, which no interface of this host has", "give it to one, or set server.address")
    if len(members) < 2:
        return
    ports: dict[int, str] = {}
    for name, settings in members.items():
        try:
            with _connected(settings) as connection:
                port = servers.find(connection, name).port
        except (DatabaseError, DispatchError) as error:
            yield Finding("addresses", f"server {name}: {error}", "each server of a host has an account of its own at the central database")
            continue
        if port in ports:
            yield Finding("addresses", f"servers {ports[port]} and {name} have the same port {port}", f"`mail-pipelines server add {name} --port` another one")
        ports[port] = name
    if (told := [settings.metrics.port for settings in members.values() if settings.metrics.port]) and len(told) != len(set(told)):
        yield Finding("addresses", "servers of this host tell their metrics at the same port", "set metrics.port in the file of each server")
    for (one, left), (other, right) in itertools.combinations(members.items(), 2):
        # Those that were never given accounts of their own all have the installation's.
        if left.database.url != right.database.url and left.sending.token_key == right.sending.token_key:
            yield Finding(
                "addresses",
                f"servers {one} and {other} have the same token key, though each has an account of its own",
                "set sending.token_key_file in the file of each to a copy of what `mail-pipelines server account NAME` made for it",
            )


def _is_of_this_host(address: str) -> bool:
    with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as probe:
        try:
            probe.bind((address, 0))
        except OSError:
            return False
    return True


def check_central_database(settings: config.Settings, *, is_centre: bool) -> Iterator[Finding]:
    engine = open_engine(settings.database, answer_seconds=ANSWER_SECONDS)
    try:
        migrate.require_schema(engine)
        with reading(engine) as connection:
            yield from check_durability(connection)
            yield from check_failover(connection)
            yield from check_clock(connection)
            yield from check_holds(connection)
            if is_centre:
                yield from check_archive(connection, settings)
                yield from check_server_keys(connection, settings)
                yield from check_making(connection, settings)
        yield from check_servers(engine, settings.server.heartbeat_seconds)
    except migrate.SchemaOutdated as error:
        yield Finding("schema", str(error), "upgrade the centre first, then its servers")
    except DatabaseError as error:
        yield Finding("database", str(error), "nothing is sent while the central database is away")
    finally:
        engine.dispose()


def check_durability(connection: sa.Connection) -> Iterator[Finding]:
    """A claim that was committed must survive a power failure, or its messages go out twice."""
    if not is_mysql(connection):
        return
    flush, binary_log, sync = connection.exec_driver_sql("SELECT @@innodb_flush_log_at_trx_commit, @@log_bin, @@sync_binlog").one()
    if flush != 1:
        yield Finding("durability", f"innodb_flush_log_at_trx_commit is {flush}: a power failure loses commits", "set it to 1 in the database's configuration")
    if binary_log and sync != 1:
        yield Finding("durability", f"sync_binlog is {sync}: a power failure loses binary log", "set it to 1 in the database's configuration")


def check_failover(connection: sa.Connection) -> Iterator[Finding]:
    """A copy of the database that has taken over may lack the last seconds."""
    known, here = connection.execute(sa.select(LedgerGeneration.database_id)).scalar_one(), database_id(connection)
    if known is not None and known != here:
        yield Finding(
            "failover", f"the ledger was on the database server with server_id {known}, and {here} answers: nothing is sent", "run `mail-pipelines recover`"
        )


def check_clock(connection: sa.Connection) -> Iterator[Finding]:
    """This host's clock. Those of servers their heartbeats tell."""
    if problem := clock.error("this host", clock.read(connection).ahead_seconds):
        yield Finding("clock", problem, clock.REMEDY)


def check_holds(connection: sa.Connection) -> Iterator[Finding]:
    """Held on purpose, and easily forgotten."""
    for hold in holds.in_force(connection).holds:
        option = "" if hold.scope.kind is holds.Kind.EVERYTHING else f" --{hold.scope.kind} {hold.name}"
        yield Finding("holds", f"{hold.what} is held by {hold.by}: {hold.reason}", f"`mail-pipelines release{option}` when that is over")


def check_archive(connection: sa.Connection, settings: config.Settings) -> Iterator[Finding]:
    """Only an archive that has something, or should have, is missed."""
    now = database_now(connection)
    late = archiving.due(connection, now - dt.timedelta(days=settings.campaigns.archive_after_days) - ARCHIVING_LATE)
    archived = sa.select(Campaign.id).where(Campaign.archive.is_not(None)).limit(1)
    if settings.campaigns.archive and late:
        yield Finding("archive", f"{_names([campaign.key for campaign in late])}: not archived", "look at what the last runs of `maintenance` say")
    if late or connection.execute(archived).first() is not None:
        try:
            LedgerArchive(settings.campaigns.archive).check()
        except LedgerArchiveError as error:
            yield Finding("archive", str(error), "`why` has no answers about archived campaigns, and nothing is archived, until it is there")


def check_server_keys(connection: sa.Connection, settings: config.Settings) -> Iterator[Finding]:
    """Servers on hosts of their own: each has a token key that makes tokens of its own mail alone, and DKIM keys that it can open by that."""
    if not settings.sending.token_key:
        return
    remote = token_keys.remote(connection)
    uses = {server.key: token_keys.in_use(server, settings.token_key()) for server in remote}
    if shared := [key for key, use in uses.items() if use is InUse.INSTALLATION]:
        yield Finding(
            "token key",
            f"who steals {_names(shared)} can unsubscribe everybody: the installation's token key is there",
            "drain each, then `mail-pipelines server account NAME`, which says what to copy there",
        )
    if foreign := [key for key, use in uses.items() if use is InUse.FOREIGN]:
        yield Finding(
            "token key",
            f"{_names(foreign)}: bounces and links of its mail are not recognised, since its token key is none of this installation",
            "pause each, then `mail-pipelines server account NAME`, which says what to copy there",
        )
    lacking = store.without_key(connection, [server.id for server in token_keys.with_own(remote, settings.token_key())])
    for server in [server for server in remote if server.id in lacking][:SHOWN]:
        yield Finding(
            "DKIM keys",
            f"server {server.key} sends nothing from {_names(lacking[server.id])}: it has no DKIM key of its own there",
            f"`mail-pipelines server dkim {server.key}`",
        )


def check_making(connection: sa.Connection, settings: config.Settings) -> Iterator[Finding]:
    """Servers that are being made here and do not come on by themselves, and what would keep others from being made."""
    try:
        hosts_file.read(settings)
        publishers.publisher_of(settings.dns)
    except MailPipelinesError as error:
        yield Finding("provisioning", str(error), "correct it: no server can be made or removed until then (docs/provisioning.md)")
    for one in provisions.making(connection)[:SHOWN]:
        if one.records:
            waits = f"server {one.key} waits for {len(one.records)} DNS records"
            yield Finding("provisioning", waits, "publish what `mail-pipelines server provisions` prints")
        elif one.reason:
            yield Finding("provisioning", f"server {one.key} is {one.standing}", "it is tried again; see `mail-pipelines server provisions`")
    for source, reason in provisions.set_aside(connection).items():
        yield Finding("provisioning", f"host source {source} is set aside: {reason}", f"`mail-pipelines server sources --use-again {source}` when that is over")


def check_servers(engine: Engine, heartbeat_seconds: float) -> Iterator[Finding]:
    with reading(engine) as connection:
        active = [server for server in servers.all_servers(connection) if server.sends]
        now = database_now(connection)
        recovery = standing.newest(connection)
    if recovery is not None and recovery.is_open:
        yield Finding("recovery", "the database is being recovered: nothing is sent", "run `mail-pipelines recover`; it says which logs it awaits")
    if not active:
        yield Finding("servers", "no dispatch server is active: nothing can be sent", "`mail-pipelines up` starts built-in catchers")
    silent = [server.key for server in active if server.is_silent(now, heartbeat_seconds)]
    if silent:
        yield Finding(
            "servers",
            f"{len(silent)} of {len(active)} active servers are silent: {_names(silent)}",
            "start them (`mail-pipelines up` starts built-in catchers), or look into their logs",
        )
    if other := [f"{server.key} ({release})" for server in active if (release := (server.health or {}).get("release", __version__)) != __version__]:
        yield Finding("servers", f"not of this version ({__version__}): {_names(other)}", "upgrade the centre first, then its servers")
    for server in [server for server in active if server.shortage and server.key not in silent][:SHOWN]:
        yield Finding("servers", server.shortage, "make room on that disk; sending goes on by itself")
    for server in [server for server in active if server.clock_error and server.key not in silent][:SHOWN]:
        yield Finding("clock", server.clock_error, clock.REMEDY)


def check_broker(settings: config.Settings) -> Iterator[Finding]:
    """Where runs are carried to workers: broker and results answer, and the two keys belong together."""
    given = settings.broker
    if not given.url and not given.signing_key:
        return
    from kombu.exceptions import OperationalError

    from mail_pipelines.resources import orders, tasks

    try:
        app = tasks.make_app(settings)
        # A worker waits for a minute; whoever asks what is wrong wants to hear it.
        app.conf.result_backend_always_retry = False
        if given.signing_key and orders.verify_key_of(given.signing_key) != given.verify_key:
            yield Finding("broker", "broker.verify_key is not that of broker.signing_key: every order is refused", "restore both from the backup of the centre")
        with app.connection_for_read() as connection:
            connection.ensure_connection(max_retries=1, timeout=5)
    except config.ConfigError as error:
        yield Finding("broker", str(error), "set them on every host, each server with its own account")
        return
    except OperationalError as error:
        yield Finding("broker", f"the broker does not answer: {error}", "runs wait until it does; sessions that work go on")
    else:
        yield from _check_broker_accounts(settings)

    def look() -> list[Finding]:
        try:
            app.backend.get_task_meta("none")
        except sa.exc.SQLAlchemyError as error:
            first_line = str(error).partition("\n")[0]
            return [Finding("broker", f"the database of results cannot be used: {first_line}", "look at broker.results, and at the rights of its account")]
        return []

    yield from _within(STORAGE_SECONDS, look, Finding("broker", f"the database of results does not answer within {STORAGE_SECONDS:g} s", _HANGS))


def _check_broker_accounts(settings: config.Settings) -> Iterator[Finding]:
    """The centre, and nobody else, can make and end accounts of servers at the broker."""
    from mail_pipelines.resources.broker_accounts import BrokerAccountError, BrokerAccounts

    broker = BrokerAccounts.of(settings.broker)
    if settings.this_server is not None:
        if settings.broker.management_url:
            remedy = "take it off this host, and give the account that it names another password"
            yield Finding("broker", "broker.management_url is set on a server: whoever steals this one makes accounts for all", remedy)
    elif broker is not None:
        try:
            broker.check()
        except BrokerAccountError as error:
            yield Finding("broker", str(error), "until then no server can be made or revoked by the centre")


def check_storage_account(members: Mapping[str, config.Settings], environ: Mapping[str, str]) -> Iterator[Finding]:
    """A server has an account of Dagster's storage that can start nothing."""
    from mail_pipelines.resources import server_storage, views_dialect

    url = environ.get(server_storage.URL_VARIABLE)
    if members and url and not url.startswith(f"{views_dialect.DRIVER}:"):
        yield Finding(
            "Dagster",
            "the account of Dagster's storage here may write everything there: whoever steals this server can start any job at the centre",
            f"repeat `mail-pipelines server account {next(iter(members))}` at the centre, and put here what it says",
        )


def check_dagster(settings: config.Settings, *, is_centre: bool = True) -> Iterator[Finding]:
    """Dagster's storage, and at the centre its daemon, sensors and schedules, as that has them."""
    # Without the file an instance would make a new, empty storage.
    if not (settings.dagster_home / "dagster.yaml").is_file():
        return
    late = Finding("Dagster", f"Dagster's storage does not answer within {STORAGE_SECONDS:g} s", _HANGS)
    yield from _within(STORAGE_SECONDS, lambda: list(_look_at_dagster(settings, is_centre)), late)


def _look_at_dagster(settings: config.Settings, is_centre: bool) -> Iterator[Finding]:
    import dagster as dg

    try:
        with dg.DagsterInstance.from_config(str(settings.dagster_home)) as instance:
            if is_centre:
                yield from check_daemon(instance)
                yield from check_instigators(instance)
                yield from check_slots(instance, settings)
    except (dg.DagsterError, sa.exc.SQLAlchemyError) as error:
        first_line = str(error).partition("\n")[0]
        yield Finding("Dagster", f"Dagster's storage cannot be used: {first_line}", f"check {settings.dagster_home / 'dagster.yaml'}")


def check_daemon(instance: DagsterInstance) -> Iterator[Finding]:
    required = {name: status.healthy for name, status in instance.get_daemon_statuses().items() if status.required}
    silent = sorted(name for name, healthy in required.items() if not healthy)
    if silent:
        parts = "" if len(silent) == len(required) else f" in part ({_names(silent)})"
        yield Finding("daemon", f"Dagster's daemon is silent{parts}: no sensor, schedule or queued run starts", "run `mail-pipelines up`")


def check_instigators(instance: DagsterInstance) -> Iterator[Finding]:
    """Sensors and schedules all run unless somebody stopped them."""
    for state in instance.all_instigator_state():
        if not state.is_running:
            kind = state.instigator_type.value.lower()
            yield Finding(kind, f"the {kind} {state.name} is stopped", f"turn it on in the UI, or run `dagster {kind} start {state.name}`")


def check_slots(instance: DagsterInstance, settings: config.Settings) -> Iterator[Finding]:
    """`server.slots` is one of three limits on send runs: the other two are Dagster's, on runs of one server and on all runs."""
    from mail_pipelines.resources.queues import QUEUE_TAG
    from mail_pipelines.sensors.servers import SEND_POOL

    queue = instance.get_concurrency_config().run_queue_config
    if queue is None:
        return
    place = settings.dagster_home / "dagster.yaml"
    slots, most = settings.server.slots, queue.max_concurrent_runs
    for limit in queue.tag_concurrency_limits:
        # With a mapping as its value it holds for each server; else for the one that it names.
        if limit["key"] == QUEUE_TAG and isinstance(limit.get("value"), dict) and limit["limit"] < slots:
            yield Finding(
                "slots",
                f"server.slots is {slots}, but Dagster has at most {limit['limit']} runs at once on one server",
                f"raise the limit of {QUEUE_TAG} in {place}",
            )
    # What `server_health` has counted; a negative number of runs means no limit.
    total = next((pool.limit for pool in instance.event_log_storage.get_pool_limits() if pool.name == SEND_POOL), 0)
    if 0 <= most < total:
        yield Finding("slots", f"the servers have {total} send slots, but Dagster has at most {most} runs at once", f"raise max_concurrent_runs in {place}")


def _within(seconds: float, look: Callable[[], list[Finding]], late: Finding) -> list[Finding]:
    """What `look` finds; `late` if that takes longer. Its thread is left behind then, and keeps no process from ending."""
    found: Future[list[Finding]] = Future()

    def work() -> None:
        try:
            found.set_result(look())
        except Exception as error:  # noqa: BLE001 (raised again where it is waited for)
            found.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    try:
        return found.result(seconds)
    except TimeoutError:
        return [late]


def _names(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
