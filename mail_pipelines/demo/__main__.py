"""The main job on this machine: contacts, a CRM, segments, one campaign, two dispatch servers, Dagster in between. Run by `script/demo`."""

from __future__ import annotations

import argparse
import datetime as dt
import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table
from sqlalchemy.engine import Engine

from mail_pipelines import config, home, up
from mail_pipelines.campaigns import progress, scheduling, store, versions, yaml_form
from mail_pipelines.campaigns.states import CampaignState
from mail_pipelines.config import Settings
from mail_pipelines.contacts import importing
from mail_pipelines.database.engine import open_engine, reading, transact
from mail_pipelines.demo import campaign, data, own_home, reactions, shortage, source
from mail_pipelines.demo.reporting import reported
from mail_pipelines.demo.summary import Summary, summarise
from mail_pipelines.dispatch import servers
from mail_pipelines.domains import store as domains
from mail_pipelines.domains.domain import Names
from mail_pipelines.errors import MailPipelinesError
from mail_pipelines.inbound.reading import files_wait
from mail_pipelines.segments import saved, snapshots
from mail_pipelines.supervision import Processes, Stopped

CONTACTS = 100_000
# A host that is busy with something else takes its time, and whoever waits hears at once of a process that ends.
SEND_SECONDS = 1200
REPORT_SECONDS = 600
LIMITS = {"connections": 24, "per_second": 80.0, "messages_per_connection": 500}

console = Console(stderr=True)


def make_home(folder: Path) -> tuple[Settings, Engine]:
    """A fresh home."""
    own_home.empty(folder)
    home.make()
    settings = config.load()
    return settings, open_engine(settings.database)


def fill(engine: Engine, settings: Settings, contacts: int, segments: Sequence[str], check: Callable[[], None]) -> None:
    """Contacts, two lists, earlier engagement, segments, snapshots. `check` is called between the steps and may raise."""
    now = dt.datetime.now(dt.UTC)
    with console.status(f"writing {contacts:,} contacts"):
        files = data.write(settings.home / "files", contacts=contacts)
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
    for text in segments:
        saved.save(engine, saved.from_yaml(text), now=now)
    with console.status("snapshots"):
        # Dagster may be at it as well: its schedule comes every quarter of an hour.
        snapshots.in_turn(lambda: snapshots.refresh_contacts(engine, settings.snapshot_folder, now=dt.datetime.now(dt.UTC)))
        snapshots.in_turn(lambda: snapshots.refresh_engagement(engine, settings.snapshot_folder, now=dt.datetime.now(dt.UTC)))
    check()


def schedule(engine: Engine, settings: Settings, include: Sequence[str] = ()) -> None:
    """Put the campaign in as a marketer does, to start now, with the segments `include` besides. From here on Dagster's sensors do everything."""
    now = dt.datetime.now(dt.UTC)
    document = yaml_form.parse(campaign.CAMPAIGN)
    definition = replace(document.definition, include=(*document.definition.include, *include))
    transact(engine, lambda connection: store.create(connection, definition, now))
    assert document.content is not None
    versions.set_content(engine, campaign.KEY, document.content, now)
    # A domain of a reserved name has no DNS; its mail is signed all the same.
    scheduling.start(engine, settings, campaign.KEY, now, allow_unverified=True)


def follow(engine: Engine, processes: Processes, finish_by: dt.datetime | None = None) -> None:
    """Show how far the campaign is until it has finished. Raises `MailPipelinesError` if it does not within `SEND_SECONDS`, or so long after `finish_by`."""
    end = time.monotonic() + SEND_SECONDS + (max(0.0, (finish_by - dt.datetime.now(dt.UTC)).total_seconds()) if finish_by else 0.0)
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


def show(summary: Summary) -> None:
    """What became of the campaign."""
    table = Table(title="Spring sale", show_header=False)
    for name, value in summary.to_document().items():
        if name == "servers":
            for server, messages in sorted(value.items()):
                table.add_row(f"messages by {server}", f"{messages:,}")
        else:
            table.add_row(name.replace("_", " "), f"{value:,}")
    console.print(table)


def show_crm(counted: Mapping[str, Any]) -> None:
    table = Table("", "here", "there", title="The CRM, by both counts")
    here, there = counted["ours"], counted["theirs"]
    for part in ("people", "subscribed", "unsubscribed"):
        table.add_row(part, f"{here[part]:,}", f"{there[part]:,}")
    for kind in sorted({*here["events"], *there["events"]}):
        table.add_row(f"events: {kind}", *(f"{side['events'].get(kind, 0):,}" for side in (here, there)))
    console.print(table)


def show_shortage(judged: Mapping[str, Any]) -> None:
    table = Table(title="The shortage", show_header=False)
    for part, words in judged.items():
        table.add_row(part.replace("_", " "), escape(str(words)))
    console.print(table)


def start_platform(engine: Engine, settings: Settings, processes: Processes, limits: Mapping[str, float] | None = None) -> str:
    """Start catchers and Dagster; returns the address at which the UI will answer."""
    for name in up.catchers(engine, settings):
        up.start_catcher(processes, engine, settings, name)
        if limits:
            servers.set_limits(engine, name, "*", limits)
    with console.status("starting Dagster"):
        return up.begin_dagster(processes, settings)


def show_ui(processes: Processes, address: str) -> None:
    with console.status("waiting for Dagster"):
        up.wait_for_ui(processes, address)
    console.print(f"Dagster is at [bold]{address}[/bold]; watch the campaign there")


def results(engine: Engine, settings: Settings, processes: Processes) -> Summary:
    with console.status("waiting for the results in Dagster"):
        processes.wait_until_ready(lambda: reported(settings, campaign.KEY), seconds=REPORT_SECONDS, what="the result run")
    return summarise(engine, settings, campaign.KEY)


def with_crm(engine: Engine, settings: Settings, processes: Processes, contacts: int) -> tuple[str, dict[str, Any], bool]:
    """The campaign, with a CRM in step: the address of the UI, the result, and whether all is right."""
    crm = source.start(engine, settings, processes, contacts)
    console.print(f"a CRM is at [bold]{crm.address}[/bold]")
    # Before the contacts are there, so that the minute in which the CRM is read is not waited for.
    address = start_platform(engine, settings, processes, LIMITS)
    fill(engine, settings, contacts - source.people_of(contacts), (*campaign.SEGMENTS, campaign.CRM_SEGMENT), processes.check)
    show_ui(processes, address)
    with console.status("waiting for the CRM's people, whom Dagster reads at the full minute"):
        crm.wait_until_read()
    schedule(engine, settings, include=[campaign.CRM_KEY])
    follow(engine, processes)
    with console.status("recipients open, click, and leave by mail"):
        reactions.react(engine, settings, campaign.KEY)
        processes.wait_until_ready(lambda: not files_wait(settings), seconds=REPORT_SECONDS, what="reading the mail of those who leave")
    summary = results(engine, settings, processes)
    show(summary)
    with console.status("waiting for the CRM to be told what is new, at the full minute"):
        counted = crm.compare()
    show_crm(counted)
    agree = counted["ours"] == counted["theirs"]
    if not agree:
        console.print("error: the CRM counts otherwise than we do", style="red")
    return address, summary.to_document() | {"crm": counted}, summary.is_right and agree


def with_shortage(engine: Engine, settings: Settings, processes: Processes, contacts: int) -> tuple[str, dict[str, Any], bool]:
    """The campaign, with two servers that would be late and a third one that is made: as `with_crm`."""
    Path(settings.provisioning.hosts).write_text(shortage.HOSTS, encoding="utf-8")
    fill(engine, settings, contacts, campaign.SEGMENTS, processes.check)
    address = start_platform(engine, settings, processes)
    show_ui(processes, address)
    story = shortage.Shortage(engine, settings, processes, console, address)
    schedule(engine, settings)
    story.tell()
    follow(engine, processes, story.finish_by)
    story.retire()
    summary = results(engine, settings, processes)
    show(summary)
    judged = story.judge(summary)
    show_shortage(judged)
    return address, summary.to_document() | {"shortage": judged}, summary.is_right


def play(options: argparse.Namespace, folder: Path, processes: Processes) -> bool:
    """The whole demo, up to its summary, and until Ctrl-C if it is not to end there; whether all is right."""
    settings, engine = make_home(folder)
    if options.shortage:
        address, result, right = with_shortage(engine, settings, processes, options.contacts or shortage.CONTACTS)
    else:
        address, result, right = with_crm(engine, settings, processes, options.contacts or CONTACTS)
    console.print(f"Dagster: [bold]{address}[/bold]")
    if options.json:
        sys.stdout.write(json.dumps(result) + "\n")
        sys.stdout.flush()
    if not options.exit:
        console.print("Ctrl-C ends it.")
        processes.wait()
    return right


def main() -> int:
    parser = argparse.ArgumentParser(prog="script/demo", description=__doc__)
    parser.add_argument("--shortage", action="store_true", help="let two servers be too slow for a deadline, so that a third one is made while they send")
    parser.add_argument("--exit", action="store_true", help="end when the campaign has finished, instead of leaving the UI up until Ctrl-C")
    parser.add_argument("--json", action="store_true", help="end standard output with one line of JSON")
    parser.add_argument("--contacts", type=int, help=f"how many contacts (default {CONTACTS:,}, with --shortage {shortage.CONTACTS:,})")
    options = parser.parse_args()
    os.umask(0o077)
    try:
        environ = own_home.environment(os.environ, shortage.SETTINGS if options.shortage else {})
        os.environ.clear()
        os.environ.update(environ)
        folder = config.home_folder()
        own_home.claim(folder)
        with Processes(up.lock(folder)) as processes:
            try:
                right = play(options, folder, processes)
            finally:
                # Servers that were made go on when those who made them have ended.
                processes.stop_all()
                own_home.end_servers(folder)
    except Stopped:
        return 0
    except MailPipelinesError as error:
        console.print(f"error: {error}", style="red", markup=False)
        return 1
    return 0 if right else 2


if __name__ == "__main__":
    sys.exit(main())
