"""Moving from Interspire, MailWizz or listmonk."""

from __future__ import annotations

import csv
import datetime as dt
import enum
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from mail_pipelines.commands.context import console, open_engine
from mail_pipelines.errors import MailPipelinesError

if TYPE_CHECKING:
    from mail_pipelines.migration.running import Report
    from mail_pipelines.migration.source import Source

# Not one of our settings: it is wanted once.
URL_VARIABLE = "MIGRATE_FROM_URL"


class System(enum.StrEnum):
    INTERSPIRE = "interspire"
    MAILWIZZ = "mailwizz"
    LISTMONK = "listmonk"


class Holds(enum.StrEnum):
    SUBSCRIBERS = "subscribers"
    BOUNCES = "bounces"
    COMPLAINTS = "complaints"
    BLACKLIST = "blacklist"


class MigrateError(MailPipelinesError):
    """A move that cannot begin as asked for, or whose counts do not agree."""


def migrate(
    system: Annotated[System, typer.Argument(help=f"whose database is read, at the URL in the environment variable {URL_VARIABLE}")],
    check: Annotated[bool, typer.Option("--check", help="only print what would come")] = False,
    file: Annotated[Path | None, typer.Option(help="read this CSV export instead of a database")] = None,
    list_: Annotated[str | None, typer.Option("--list", help="with --file: name of the list; made if there is none")] = None,
    state: Annotated[str | None, typer.Option(help="with --file: what its rows are, where no column says that one left, bounced or is blocked")] = None,
    holds: Annotated[Holds, typer.Option(help="with --file: what its rows are about")] = Holds.SUBSCRIBERS,
    rejects: Annotated[Path | None, typer.Option(help="write the reasons of what did not come to this CSV file")] = None,
) -> None:
    """Move lists, fields, subscribers, suppressions and bounces from another system. Nobody who left is subscribed. Can be run again at any time."""
    from mail_pipelines.migration import running

    source = _source(system, file, list_, state, holds)
    engine = open_engine()
    with console.status(f"reading {system}") as status:

        def progress(name: str, rows: int) -> None:
            status.update(f"{escape(name)}: {rows:,} rows")

        report = running.check(engine, source, progress) if check else running.move(engine, source, dt.datetime.now(dt.UTC), progress)
    _print(report)
    if rejects:
        with rejects.open("w", encoding="utf-8", newline="") as out:
            csv.writer(out).writerows([("where", "reason", "rows"), *((*key, number) for key, number in sorted((report.reasons + report.values).items()))])
    if not report.agrees:
        raise MigrateError(f"the counts of {system} and ours do not agree; if subscribers changed meanwhile, run the same command again")


def _source(system: System, file: Path | None, list_: str | None, state: str | None, holds: Holds) -> Source:
    from mail_pipelines.migration import exports, reports
    from mail_pipelines.migration.interspire import Interspire
    from mail_pipelines.migration.listmonk import Listmonk
    from mail_pipelines.migration.mailwizz import MailWizz
    from mail_pipelines.migration.source import open_database

    if file is not None and holds is not Holds.SUBSCRIBERS:
        if list_ is not None or state is not None:
            raise MigrateError(f"--list and --state are for subscribers; a file of {holds} has neither")
        return reports.Report(system, file, holds.value)
    if file is not None:
        if list_ is None:
            raise MigrateError("say with --list which list the rows of the file go to")
        known = next((known for known in exports.STATES if known == state), None)
        if state is not None and known is None:
            raise MigrateError(f"{state!r} is no state; expected one of {', '.join(exports.STATES)}")
        return exports.Export(system, file, list_, known)
    if list_ is not None or state is not None or holds is not Holds.SUBSCRIBERS:
        raise MigrateError("--list, --state and --holds are for --file; a database says all of it itself")
    url = os.environ.get(URL_VARIABLE)
    if not url:
        raise MigrateError(f"set {URL_VARIABLE} to the URL of its database, like mysql://USER:PASSWORD@HOST/DATABASE, or give an export with --file")
    if system is System.LISTMONK:
        return Listmonk(open_database(url, family="postgresql"))
    return (Interspire if system is System.INTERSPIRE else MailWizz)(open_database(url, family="mysql"))


def _print(report: Report) -> None:
    if report.fields:
        table = Table("field", "type", "named there", "", title="fields")
        for field in report.fields:
            table.add_row(field.key, field.type, escape(field.label), field.why)
        console.print(table)
    table = Table("list", "state there", title="would come" if report.is_check else "came")
    outcomes = sorted({outcome for of_list in report.lists for _, outcome in of_list.rows}, key=lambda name: (name in ("rejected", "duplicate"), name))
    for name in (report.system, *outcomes, ""):
        table.add_column(name, justify="right")
    for of_list in report.lists:
        read = of_list.read()
        for state in sorted({*read, *(of_list.there or {})}):
            there = read[state] if of_list.there is None else of_list.there.get(state, 0)  # type: ignore[call-overload]
            cells = [f"{of_list.rows[state, outcome]:,}" if of_list.rows[state, outcome] else "" for outcome in outcomes]
            table.add_row(escape(of_list.name), state, f"{there:,}", *cells, "agrees" if there == read[state] else "DIFFERS")
    console.print(table)
    for what, (there, here) in (("bans", report.bans), ("bounces", report.bounces)):
        console.print(f"{what}: {there:,} in {report.system}" + ("" if report.is_check else f", {here:,} here"), markup=False)
    for title, reasons in (("rows that do not come", report.reasons), ("values that do not come", report.values)):
        if reasons:
            table = Table("where", "reason", "number", title=title)
            for (where, reason), number in sorted(reasons.items()):
                table.add_row(escape(where), escape(reason), f"{number:,}")
            console.print(table)
