"""The central database: whether it answers, keeps what it is told, is where the ledger was, and what is held in it."""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterator

import sqlalchemy as sa

from mail_pipelines import config
from mail_pipelines.campaigns import archiving
from mail_pipelines.database import migrate
from mail_pipelines.database.engine import DatabaseError, database_id, database_now, is_mysql, open_engine, reading
from mail_pipelines.database.models import Campaign, LedgerGeneration
from mail_pipelines.delivery.ledger_archive import LedgerArchive, LedgerArchiveError
from mail_pipelines.dispatch import clock, holds
from mail_pipelines.doctor import fleet, making, waiting
from mail_pipelines.doctor.finding import Finding, names
from mail_pipelines.runbook import Chapter

# So many nights in vain are no accident.
ARCHIVING_LATE = dt.timedelta(days=5)


def check_central_database(settings: config.Settings, *, is_centre: bool) -> Iterator[Finding]:
    engine = open_engine(settings.database, answer_seconds=waiting.ANSWER_SECONDS)
    try:
        migrate.require_schema(engine)
        with reading(engine) as connection:
            yield from check_durability(connection)
            yield from check_failover(connection)
            yield from check_clock(connection)
            yield from check_holds(connection)
            if is_centre:
                yield from check_archive(connection, settings)
                yield from fleet.check_server_keys(connection, settings)
                yield from making.check_making(connection, settings)
        yield from fleet.check_servers(engine, settings.server.heartbeat_seconds, is_centre=is_centre)
        with reading(engine) as connection:
            yield from fleet.check_sending(connection, is_centre=is_centre)
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
            "failover",
            f"the ledger was on the database server with server_id {known}, and {here} answers: nothing is sent",
            f"run `mail-pipelines recover`; {Chapter.RESTORED.place}",
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
        yield Finding("archive", f"{names([campaign.key for campaign in late])}: not archived", "look at what the last runs of `maintenance` say")
    if late or connection.execute(archived).first() is not None:
        try:
            LedgerArchive(settings.campaigns.archive).check()
        except LedgerArchiveError as error:
            yield Finding("archive", str(error), "`why` has no answers about archived campaigns, and nothing is archived, until it is there")
