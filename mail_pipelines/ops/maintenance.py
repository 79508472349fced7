"""Upkeep as op jobs: rows whose time is over, partitions ahead of time, ledgers of old campaigns, old events, old pieces of the log archive, leftovers
of external sources, old runs and partitions of Dagster, the import of dropped files."""

import datetime as dt
from pathlib import Path

import dagster as dg

from mail_pipelines import partitions
from mail_pipelines.campaigns import archiving, lifecycle, overdue, putting_off
from mail_pipelines.contacts import changes, importing
from mail_pipelines.database import partitions as table_partitions
from mail_pipelines.database.engine import reading
from mail_pipelines.delivery import retention, suppression, upkeep
from mail_pipelines.dispatch.archive import Archive, ArchiveError
from mail_pipelines.resources.database import CentralDatabase
from mail_pipelines.segments import snapshots
from mail_pipelines.sources import forgetting, leftovers

KEEP_RUNS_DAYS = 30
# Twice as many as a day has at most, so that an installation that was off for a while catches up.
_RUNS_A_NIGHT = 2 * 24 * 400
_RUNS_AT_ONCE = 500


@dg.op(out=dg.Out(dg.Nothing))
def close_rows(context: dg.OpExecutionContext, database: CentralDatabase) -> None:
    """Expire waiting rows of campaigns past their end, put off those whose send window has closed, cancel those of cancelled campaigns, give up rows
    unknown for too long, finish what is done."""
    engine, now = database.engine, dt.datetime.now(dt.UTC)
    unknown_hours, lease_seconds = database.settings.sending.unknown_hours, database.settings.sending.lease_seconds
    with reading(engine) as connection:
        running = lifecycle.running(connection)
        cancelled = overdue.cancelled_with_open_rows(connection)
    for campaign in running:
        expired = lifecycle.expire_open_rows(engine, campaign, now)
        put_off = putting_off.put_off(engine, campaign, now, lease_seconds)
        given_up = lifecycle.give_up_unknown(engine, campaign.id, now, unknown_hours)
        resent = overdue.resend_unknown(engine, campaign, now)
        if expired or put_off or given_up or resent:
            words = "%s: %d expired, %d put off until their send window opens, %d unresolved, %d unknown to be sent again"
            context.log.info(words, campaign.key, expired, put_off, given_up, resent)
        lifecycle.finish_if_done(engine, campaign.id, now)
    for campaign in cancelled:
        ended = lifecycle.cancel_waiting_rows(engine, campaign.id, now)
        given_up = lifecycle.give_up_unknown(engine, campaign.id, now, unknown_hours)
        if ended or given_up:
            context.log.info("%s: %d cancelled, %d unresolved", campaign.key, ended, given_up)


@dg.op(out=dg.Out(dg.Nothing))
def extend_partitions(context: dg.OpExecutionContext, database: CentralDatabase) -> None:
    """Make the database partitions that the next months need."""
    added = table_partitions.extend(database.engine, dt.datetime.now(dt.UTC).date())
    context.log.info("%d database partitions added", len(added))


@dg.op(out=dg.Out(dg.Nothing))
def prune_bookkeeping(context: dg.OpExecutionContext, database: CentralDatabase) -> None:
    """Drop closed claims, past allotments and past usage windows that nothing refers to any more, changes of contacts that were read, and what external
    sources were told."""
    engine, now = database.engine, dt.datetime.now(dt.UTC)
    pruned = {**upkeep.prune(engine, now), "contact_changes": changes.prune(engine, now), **forgetting.prune(engine, now)}
    context.add_output_metadata(pruned)
    context.log.info("pruned: %s", pruned)


@dg.op(out=dg.Out(dg.Nothing))
def archive_campaigns(context: dg.OpExecutionContext, database: CentralDatabase) -> None:
    """Move the ledgers of campaigns that have been over for long to the archive. One that cannot be moved stays, and is tried again the next night."""
    report = archiving.archive_old(database.engine, database.settings, dt.datetime.now(dt.UTC))
    for key, reason in report.failed.items():
        context.log.warning("%s is not archived: %s", key, reason)
    context.log.info("%d campaigns archived, %d rows deleted from the database", len(report.archived), sum(report.archived.values()))


@dg.op(out=dg.Out(dg.Nothing))
def retire_events(context: dg.OpExecutionContext, database: CentralDatabase) -> None:
    """Roll up or drop events past their retention, and drop the partitions that this empties."""
    engine, settings = database.engine, database.settings
    read_until = snapshots.engagement_read_until(engine, settings.snapshot_folder)
    report = retention.keep(engine, settings.retention, dt.datetime.now(dt.UTC), read_until)
    context.add_output_metadata(
        {
            "events_rolled_up": report.rolled_up,
            "deferrals_dropped": report.deferrals_dropped,
            "partitions_dropped": len(report.partitions_dropped),
        }
    )
    context.log.info("%d engagement events rolled up, %d deferrals dropped", report.rolled_up, report.deferrals_dropped)


@dg.op(out=dg.Out(dg.Nothing))
def suppress_addresses(context: dg.OpExecutionContext, database: CentralDatabase) -> None:
    """Suppress addresses that were refused again and again."""
    count = suppression.suppress_repeated(database.engine, dt.datetime.now(dt.UTC))
    context.log.info("%d addresses suppressed after repeated refusals", count)


@dg.op(out=dg.Out(dg.Nothing))
def prune_runs(context: dg.OpExecutionContext, database: CentralDatabase) -> None:
    """Delete Dagster runs older than 30 days; what they achieved is in the central database and in runless materializations."""
    before = dt.datetime.now(dt.UTC) - dt.timedelta(days=KEEP_RUNS_DAYS)
    finished = [dg.DagsterRunStatus.SUCCESS, dg.DagsterRunStatus.FAILURE, dg.DagsterRunStatus.CANCELED]
    old, deleted = dg.RunsFilter(statuses=finished, created_before=before), 0
    while deleted < _RUNS_A_NIGHT and (records := context.instance.get_run_records(old, limit=_RUNS_AT_ONCE, ascending=True)):
        for record in records:
            context.instance.delete_run(record.dagster_run.run_id)
        deleted += len(records)
    context.log.info("%d old runs deleted", deleted)
    if database.settings.broker.results:
        from mail_pipelines.resources import tasks

        # Celery leaves that to a scheduler of its own, which there is none of here.
        tasks.make_app(database.settings).backend.cleanup()


@dg.op(out=dg.Out(dg.Nothing))
def prune_partitions(context: dg.OpExecutionContext, database: CentralDatabase) -> None:
    """Take the partitions of campaigns from Dagster whose ledgers were archived before the oldest run that is kept. (No sensor adds them again: those have
    been over for longer.) What it noted of them stays: its storages on databases cannot delete that by partition."""
    with reading(database.engine) as connection:
        archived = archiving.archived_before(connection, dt.datetime.now(dt.UTC) - dt.timedelta(days=KEEP_RUNS_DAYS))
    name = partitions.campaigns.name or ""
    old = archived.intersection(context.instance.get_dynamic_partitions(name))
    for key in old:
        context.instance.delete_dynamic_partition(name, key)
    context.log.info("partitions of %d archived campaigns deleted", len(old))


@dg.op(out=dg.Out(dg.Nothing))
def prune_log_archive(context: dg.OpExecutionContext, database: CentralDatabase) -> None:
    """Delete pieces of the servers' logs that were kept for long enough. An archive that is away is pruned the next night."""
    settings = database.settings.server
    try:
        archive = Archive.of(settings.log_archive)
        if archive is None:
            return
        count = archive.prune(dt.datetime.now(dt.UTC) - dt.timedelta(days=settings.log_archive_days))
    except ArchiveError as error:
        context.log.warning("%s", error)
    else:
        context.log.info("%d pieces of the log archive deleted", count)


@dg.op(out=dg.Out(dg.Nothing))
def clear_sources(context: dg.OpExecutionContext, database: CentralDatabase) -> None:
    """Delete what failed runs of external sources left of people, and what is left of sources that are declared no more."""
    gone = leftovers.remove(database.engine, database.settings.home, dt.datetime.now(dt.UTC))
    context.log.info("%d leftovers of external sources deleted%s", len(gone), f": {', '.join(gone)}" if gone else "")


@dg.job(
    description="Nightly upkeep: open rows whose time is over, database partitions, bookkeeping, addresses refused again and again, ledgers of old campaigns, "
    "old events, logs, leftovers of external sources, runs and partitions."
)
def maintenance() -> None:
    close_rows()
    extend_partitions()
    prune_bookkeeping()
    suppress_addresses()
    archive_campaigns()
    retire_events()
    prune_log_archive()
    clear_sources()
    prune_runs()
    prune_partitions()


@dg.job(description="Rows whose time is over: expired, put off until their send window opens, given up, cancelled. Requested by a sensor when there are such.")
def close_open_rows() -> None:
    close_rows()


class DroppedFile(dg.Config):
    """A file dropped into the inbox folder."""

    path: str
    list_name: str


@dg.op
def import_file(context: dg.OpExecutionContext, config: DroppedFile, database: CentralDatabase) -> None:
    """Import one dropped file and move it into the folder `done` beside it."""
    path = Path(config.path)
    done = path.parent / "done"
    done.mkdir(exist_ok=True)
    report = importing.import_file(
        database.engine, path, list_name=config.list_name, now=dt.datetime.now(dt.UTC), reject_path=done / f"{path.name}.rejected.csv"
    )
    path.rename(done / path.name)
    context.log.info("%d rows read, %d new, %d changed, %d rejected", report.read, report.inserted, report.updated, report.rejected)


@dg.job(description="Import one contact file from the inbox folder.")
def import_contacts() -> None:
    import_file()
