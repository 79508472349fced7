"""Segments: save, show, count; refresh their snapshots."""

from __future__ import annotations

import datetime as dt
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from mail_pipelines.commands.context import console, open_engine, settings

app = typer.Typer(no_args_is_help=True, help=__doc__)

Key = Annotated[str, typer.Argument(help="key of a saved segment")]


@app.command()
def save(file: Annotated[Path, typer.Argument(help="YAML with `key`, `name` and `criteria`")]) -> None:
    """Save the segment of a YAML file; one of the same key is replaced."""
    from mail_pipelines.segments import saved

    segment = saved.read_file(file)
    saved.save(open_engine(), segment, now=dt.datetime.now(dt.UTC))
    console.print(f"saved segment {segment.key}", markup=False)


@app.command("list")
def list_() -> None:
    """All saved segments."""
    from mail_pipelines.segments import saved

    table = Table("key", "name")
    for segment in saved.list_segments(open_engine()):
        table.add_row(segment.key, escape(segment.name))
    console.print(table)


@app.command()
def show(key: Key) -> None:
    """One segment as YAML, as `segment save` reads it."""
    from mail_pipelines.segments import saved

    typer.echo(saved.to_yaml(saved.load(open_engine(), key)), nl=False)


@app.command()
def count(key: Key) -> None:
    """How many contacts match by the newest snapshots, and at which mailbox providers."""
    from mail_pipelines.segments import evaluation, saved
    from mail_pipelines.segments.criteria import parse
    from mail_pipelines.segments.snapshots import open_snapshots

    engine = open_engine()
    segment = saved.load(engine, key)
    with open_snapshots(engine, settings().snapshot_folder) as snapshots:
        found = evaluation.count(parse(segment.criteria, snapshots.catalogue), snapshots, now=dt.datetime.now(dt.UTC))
        read_at = snapshots.contacts.made_at
    table = Table("provider", "contacts", "share", title=escape(f"{segment.name}: {found.members:,} contacts"))
    table.columns[1].justify = table.columns[2].justify = "right"
    for provider, members in found.by_provider.items():
        table.add_row(provider, f"{members:,}", f"{members / found.members:.1%}")
    console.print(table)
    console.print(f"by contacts version {found.contact_version} of {read_at:%Y-%m-%d %H:%M:%S} UTC, engagement version {found.engagement_version}")


@app.command()
def refresh() -> None:
    """Bring both snapshots up to date with the database."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

    from mail_pipelines.delivery import retention
    from mail_pipelines.delivery.ledger_archive import LedgerArchive
    from mail_pipelines.segments.snapshots import refresh_contacts, refresh_engagement

    engine, now = open_engine(), dt.datetime.now(dt.UTC)
    folder, min_free_mb = settings().snapshot_folder, settings().snapshots.min_free_mb
    with Progress(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), console=console, transient=True) as bar:
        tasks: dict[str, TaskID] = {}

        def progress(what: str, done: int, total: int | None) -> None:
            if what not in tasks:
                tasks[what] = bar.add_task(what)
            bar.update(tasks[what], completed=done, total=total)

        archive = LedgerArchive(settings().campaigns.archive)
        kept_from = retention.first_kept(now.date(), settings().retention.engagement_months)
        refreshed = [
            refresh_contacts(engine, folder, now=now, min_free_mb=min_free_mb, progress=progress),
            refresh_engagement(engine, folder, now=now, min_free_mb=min_free_mb, progress=progress, archive=archive, singles_from=kept_from),
        ]
    for info in refreshed:
        console.print(
            f"{info.kind}: version {info.version}, {info.rows:,} rows ({info.changed:,} read, {info.deleted:,} gone), "
            f"{info.files} files, {info.size / 1e6:,.1f} MB"
        )
        if info.unusable:
            console.print(f"{info.unusable:,} values do not fit the type of their field and count as absent", style="yellow")
