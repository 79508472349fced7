"""Completing a restored database from the servers' logs."""

from __future__ import annotations

import datetime as dt
import time
from typing import TYPE_CHECKING, Annotated

import typer

from mail_pipelines.commands.context import console, open_engine, settings

if TYPE_CHECKING:
    from mail_pipelines.dispatch.recovery.standing import Standing
    from mail_pipelines.dispatch.recovery.steps import Report

app = typer.Typer()
_POLL_SECONDS = 1.0


@app.command()
def recover(
    lost: Annotated[list[str] | None, typer.Option(help="a server that will not come back; may be given several times")] = None,
    yes: Annotated[bool, typer.Option("--yes", help="do not ask")] = False,
) -> None:
    """After a backup of the central database was restored: complete the ledger from the logs of all servers, then let them send again.

    Nothing is sent meanwhile. Each server reads its own log, so its process (`exim run`, `catcher run` or `up`) has to be started; that of a server which
    is gone is read from the archive of logs, if there is one. Where a log lacks something, whatever may have been mailed becomes unknown. Ctrl-C
    interrupts it; the same command goes on.
    """
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    from mail_pipelines.database.engine import reading
    from mail_pipelines.dispatch.recovery import applying, standing, steps

    engine = open_engine()
    with reading(engine) as connection:
        found = standing.newest(connection)
    if found is None or not found.is_open:
        if not yes:
            typer.confirm("All sending stops, and every campaign is held until you resume it. Was a backup of the central database restored?", abort=True)
        found = steps.begin(engine, dt.datetime.now(dt.UTC))
    for key in lost or []:
        given_up = steps.lose(engine, settings(), key)
        console.print(f"server {key} is given up: {given_up.rows:,} recipients it had in hand are unknown now", highlight=False)
    shown: dict[str, str] = {}
    while True:
        with reading(engine) as connection:
            found, claims = standing.newest(connection), applying.open_claims(connection)
        assert found is not None
        _show(found, shown)
        if not found.awaited() and not claims:
            break
        time.sleep(_POLL_SECONDS)
    offers = sum(part.offers for part in found.servers)
    with Progress(TextColumn("recipients in the logs"), BarColumn(), MofNCompleteColumn(), console=console, transient=True) as bar:
        task = bar.add_task("", total=offers)
        report = steps.finish(engine, settings(), dt.datetime.now(dt.UTC), lambda count: bar.advance(task, count))
    _tell(report)


def _show(found: Standing, shown: dict[str, str]) -> None:
    """Say what has changed of each server."""
    for part in found.servers:
        match part.part.value:
            case "awaited":
                line = "is awaited: its process has to run; for one that will not come back, give --lost"
            case "lost":
                line = "will not come back"
            case state:
                line = f"has read {part.offers:,} offers in its log{'' if state == 'read' else ', which may lack some'}"
        line += f" ({part.note})" if part.note else ""
        if shown.get(part.server) != line:
            console.print(f"{part.server} {line}", highlight=False, markup=False)
            shown[part.server] = line


def _tell(report: Report) -> None:
    for key, ends in report.ends.items():
        console.print(f"{key}: {', '.join(f'{count:,} {state.name.lower()}' for state, count in sorted(ends.items()))}", highlight=False)
    for key, offers in report.lost.items():
        console.print(f"{key}: {offers:,} offers in a campaign that the backup does not have", highlight=False)
    if report.doubtful:
        servers = ", ".join(report.uncovered)
        console.print(f"{report.doubtful:,} recipients are unknown, since {servers} may have mailed them: see `mail-pipelines unknown list`", highlight=False)
    if report.mails_again:
        console.print(f"{report.mails_again:,} messages that came back are read again", highlight=False)
    console.print("The ledger is complete. Every campaign that was scheduled or under way is held: look at each, then `mail-pipelines campaign resume KEY`.")
