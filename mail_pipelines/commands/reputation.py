"""What mailbox providers tell of our domains and addresses, and what is stopped because of it."""

from __future__ import annotations

import datetime as dt
import json
from dataclasses import asdict
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from mail_pipelines.commands.context import console, open_engine, settings
from mail_pipelines.errors import MailPipelinesError, nearest

app = typer.Typer(no_args_is_help=True, help=__doc__)


class ReputationError(MailPipelinesError):
    """There is nothing of that name to ask, or to try again."""


@app.command()
def show(
    days: Annotated[int, typer.Option(min=1, help="of so many days, the newest first")] = 7,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON line a reading")] = False,
) -> None:
    """Readings day by day, where each provider stands, and the breakers of domains."""
    from mail_pipelines.capacity import domain_breakers, told
    from mail_pipelines.database.engine import database_now, reading
    from mail_pipelines.reputation import readings, standing

    with reading(open_engine()) as connection:
        now = database_now(connection)
        found = readings.read(connection, int(now.timestamp()) - days * readings.DAY)
        breakers = [one for one in domain_breakers.all_breakers(connection) if one.state != domain_breakers.CLOSED]
        bad = [one.words("back") for one in told.bad(connection, now)]
        asked = readings.configured(settings().reputation)
        standings = {source: (standing.read(connection, source), standing.stale(connection, source, now)) for source in asked}
    if as_json:
        for one in found:
            typer.echo(json.dumps(asdict(one) | {"day": str(readings.date_of(one.day))}))
        return
    table = Table("source", "of", "day", "reported as spam", "delivery errors", "filter result", "trap hits", "messages")
    for one in sorted(found, key=lambda one: (one.source, -one.day, one.subject)):
        rates = ("" if rate is None else f"{rate:.2%}" for rate in (one.spam_rate, one.delivery_errors))
        rest = ("" if value is None else str(value) for value in (one.filter_result, one.trap_hits, one.messages))
        table.add_row(one.source, escape(one.subject), str(readings.date_of(one.day)), *rates, *rest)
    console.print(table)
    for line in [*map(str, breakers), *bad]:
        console.print(line, style="red", markup=False)
    for source, (known, stale) in standings.items():
        console.print(f"{source}: asked last at {known.good_at or 'no time'}", markup=False)
        for line in filter(None, [stale, *known.problems, known.error and f"the newest run failed: {known.error}"]):
            console.print(f"  {line}", style="yellow", markup=False)
    if not asked:
        console.print("no provider is asked: docs/reputation.md says how to get credentials", markup=False)


@app.command()
def sync(source: Annotated[str | None, typer.Argument(help="google_postmaster or microsoft_snds; all that have credentials if not given")] = None) -> None:
    """Ask providers now."""
    from mail_pipelines.capacity import domain_breakers
    from mail_pipelines.reputation import readings, syncing

    engine, told = open_engine(), settings().reputation
    asked = readings.configured(told)
    if source is not None and source not in asked:
        raise ReputationError(f"{source} has no credentials: see docs/reputation.md; {nearest(source, readings.PROVIDERS)}")
    for one in (source,) if source is not None else asked:
        standing = syncing.run(engine, told, one, dt.datetime.now(dt.UTC))
        counts = ", ".join(f"{number:,} {what}" for what, number in standing.counts.items()) or "nothing"
        console.print(f"{one}: {counts}", markup=False)
        for line in standing.problems:
            console.print(f"  {line}", style="yellow", markup=False)
    for breaker in domain_breakers.judge(engine):
        console.print(str(breaker), style="red", markup=False)
    if not asked:
        console.print("no provider is asked: docs/reputation.md says how to get credentials", markup=False)


@app.command()
def sign_in() -> None:
    """Sign in to Microsoft's SNDS with the account that has access there; once, then each run renews it."""
    from mail_pipelines.reputation.microsoft_login import SignIn
    from mail_pipelines.sources.kinds.http import PatientSession

    begun = SignIn.begin(settings().reputation)
    console.print("Open this address in a browser and sign in:", markup=False)
    typer.echo(begun.address)
    console.print("The browser ends at an address that begins with http://localhost/?code= and shows no page. Copy that address at once.", markup=False)
    begun.finish(typer.prompt("The address"), PatientSession())
    console.print("signed in: ask by `mail-pipelines reputation sync microsoft_snds`; Dagster knows it when what loads it is started again", markup=False)


@app.command()
def retry(domain: Annotated[str, typer.Argument(help="domain of From addresses that is stopped at a provider")]) -> None:
    """Begin the trial of a stopped domain at once."""
    from mail_pipelines.capacity import domain_breakers

    if not domain_breakers.try_now(open_engine(), domain, dt.datetime.now(dt.UTC)):
        raise ReputationError(f"{domain} is not stopped: `mail-pipelines reputation show` says what is")
    console.print(f"{domain} is on trial: a few messages go out in each slot", markup=False)
