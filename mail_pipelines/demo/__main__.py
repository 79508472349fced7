"""The main job on this machine: contacts, segments, one campaign, two dispatch servers, Dagster in between. Run by `script/demo`."""

from __future__ import annotations

import argparse
import datetime as dt
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table
from sqlalchemy.engine import Engine

from mail_pipelines import config, home, up
from mail_pipelines.campaigns import progress, scheduling, store, versions, yaml_form
from mail_pipelines.campaigns.states import CampaignState
from mail_pipelines.config import Settings
from mail_pipelines.contacts import importing
from mail_pipelines.database.engine import open_engine, reading, transact
from mail_pipelines.demo import campaign, data, own_home
from mail_pipelines.demo.reporting import reported
from mail_pipelines.demo.summary import Summary, summarise
from mail_pipelines.dispatch import servers
from mail_pipelines.domains import store as domains
from mail_pipelines.domains.domain import Names
from mail_pipelines.errors import MailPipelinesError
from mail_pipelines.segments import saved, snapshots
from mail_pipelines.supervision import Processes, Stopped

SEND_SECONDS = 300
REPORT_SECONDS = 90
LIMITS = {"connections": 24, "per_second": 80.0, "messages_per_connection": 500}

console = Console(stderr=True)


def prepare(folder: Path, contacts: int, check: Callable[[], None]) -> tuple[Settings, Engine]:
    """A fresh home with contacts, two lists, earlier engagement and three segments. `check` is called between the steps and may raise."""
    own_home.empty(folder)
    home.make()
    settings = config.load()
    engine = open_engine(settings.database)
    now = dt.datetime.now(dt.UTC)
    with console.status(f"writing {contacts:,} contacts"):
        files = data.write(folder / "files", contacts=contacts)
    check()
    for path, list_name in files.imports:
        columns = (SpinnerColumn(), TextColumn("import {task.description}", markup=False), BarColumn(), TimeElapsedColumn())
        with Progress(*columns, console=console) as bar:
            task = bar.add_task(path.name, total=1.0)

            def advance(_rows: int, share: float, bar: Progress = bar, task: TaskID = task) -> None:
                bar.update(task, completed=share)
                check()

            report = importing.import_file(engine, path, list_name=list_name, now=now, progress=advance)
        console.print(f"  {report.inserted:,} new, {report.updated:,} changed, {report.rejected:,} rejected ({report.reject_file})", markup=False)
    domains.add(engine, Names.of(campaign.FROM_DOMAIN), settings.token_key(), now)
    with console.status("earlier campaigns and what became of them"):
        data.engagement(engine, now)
    check()
    for text in campaign.SEGMENTS:
        saved.save(engine, saved.from_yaml(text), now=now)
    with console.status("snapshots"):
        snapshots.refresh_contacts(engine, settings.snapshot_folder, now=dt.datetime.now(dt.UTC))
        snapshots.refresh_engagement(engine, settings.snapshot_folder, now=dt.datetime.now(dt.UTC))
    check()
    return settings, engine


def schedule(engine: Engine, settings: Settings) -> None:
    """Put the campaign in as a marketer does, to start now. From here on Dagster's sensors do everything."""
    now = dt.datetime.now(dt.UTC)
    document = yaml_form.parse(campaign.CAMPAIGN)
    transact(engine, lambda connection: store.create(connection, document.definition, now))
    assert document.content is not None
    versions.set_content(engine, campaign.KEY, document.content, now)
    # A domain of a reserved name has no DNS; its mail is signed all the same.
    scheduling.start(engine, settings, campaign.KEY, now, allow_unverified=True)


def follow(engine: Engine, processes: Processes) -> None:
    """Show how far the campaign is until it has finished. Raises `MailPipelinesError` if it does not."""
    end = time.monotonic() + SEND_SECONDS
    columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("waiting for the daemon", total=None)

        def finished() -> bool:
            with reading(engine) as connection:
                now = store.load(connection, campaign.KEY)
                totals = progress.totals(connection, now)
            if totals.audience:
                words = f"{now.state}: {totals.delivered:,} delivered, {totals.bounced:,} bounced, {totals.deferred:,} deferred"
                bar.update(task, description=words, total=totals.audience, completed=totals.audience - totals.open)
            else:
                bar.update(task, description=str(now.state))
            if now.hold:
                raise MailPipelinesError(str(now.hold))
            return now.state is CampaignState.FINISHED

        processes.wait_until_ready(finished, seconds=end - time.monotonic(), what="the campaign")


def show(summary: Summary, address: str) -> None:
    table = Table(title="Spring sale", show_header=False)
    for name, value in summary.to_document().items():
        if name == "servers":
            for server, messages in sorted(summary.servers.items()):
                table.add_row(f"messages by {server}", f"{messages:,}")
        else:
            table.add_row(name.replace("_", " "), f"{value:,}")
    console.print(table)
    console.print(f"Dagster: [bold]{address}[/bold]")


def main() -> int:
    parser = argparse.ArgumentParser(prog="script/demo", description=__doc__)
    parser.add_argument("--exit", action="store_true", help="end when the campaign has finished, instead of leaving the UI up until Ctrl-C")
    parser.add_argument("--json", action="store_true", help="end standard output with one line of JSON")
    parser.add_argument("--contacts", type=int, default=100_000, help="how many contacts (default 100,000)")
    options = parser.parse_args()
    os.umask(0o077)
    try:
        environ = own_home.environment(os.environ)
        os.environ.clear()
        os.environ.update(environ)
        folder = config.home_folder()
        own_home.claim(folder)
        with Processes(up.lock(folder)) as processes:
            settings, engine = prepare(folder, options.contacts, processes.check)
            for name in up.catchers(engine, settings):
                up.start_catcher(processes, engine, settings, name)
                servers.set_limits(engine, name, "*", LIMITS)
            with console.status("starting Dagster"):
                address = up.start_dagster(processes, settings)
            console.print(f"Dagster is at [bold]{address}[/bold]; watch the campaign there")
            schedule(engine, settings)
            follow(engine, processes)
            with console.status("waiting for the results in Dagster"):
                processes.wait_until_ready(lambda: reported(settings, campaign.KEY), seconds=REPORT_SECONDS, what="the result run")
            summary = summarise(engine, settings, campaign.KEY)
            show(summary, address)
            if options.json:
                sys.stdout.write(json.dumps(summary.to_document()) + "\n")
                sys.stdout.flush()
            if not options.exit:
                console.print("Ctrl-C ends it.")
                processes.wait()
    except Stopped:
        return 0
    except MailPipelinesError as error:
        console.print(f"error: {error}", style="red", markup=False)
        return 1
    return 0 if summary.is_right else 2


if __name__ == "__main__":
    sys.exit(main())
