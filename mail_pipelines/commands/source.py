"""External sources: list, check, run, status, dead letters."""

from __future__ import annotations

import datetime as dt
import json
from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from mail_pipelines.commands.context import console, open_engine, settings

if TYPE_CHECKING:
    from sqlalchemy.engine import Engine

    from mail_pipelines.sources.declaration import Part, Section, Source

app = typer.Typer(no_args_is_help=True, help=__doc__)

Name = Annotated[str, typer.Argument(help="name of a source: of its file in the folder `sources` of the home, without .yaml")]


def _named(name: str) -> Source:
    from mail_pipelines.sources import declaration

    return declaration.load(settings().home, name)


def _all() -> tuple[list[Source], dict[str, str]]:
    """All sources whose declaration can be read, and by name what is wrong with the others."""
    from mail_pipelines.sources import declaration
    from mail_pipelines.sources.errors import DeclarationError

    found, wrong = [], {}
    for path in declaration.files(settings().home):
        try:
            found.append(declaration.read_file(path))
        except DeclarationError as error:
            wrong[path.stem] = str(error)
    return found, wrong


@app.command("list")
def list_() -> None:
    """All declared sources, with what is wrong with a declaration."""
    table = Table("source", "kind", "reads", "is told", "schedule")
    sources, unreadable = _all()
    for source in sources:
        told = ", ".join(source.write_back.what) if source.write_back else ""
        table.add_row(source.name, source.kind, ", ".join(source.sections), told, source.schedule or "by hand")
    for name in unreadable:
        table.add_row(escape(name), "", "cannot be read", "", "")
    console.print(table)
    _print_wrong(unreadable.values())


def _print_wrong(wrong: Iterable[str]) -> None:
    for words in wrong:
        console.print(words, style="red", markup=False)


@app.command()
def check(name: Name) -> None:
    """Read a declaration, log in and read the first page; nothing is written."""
    from mail_pipelines.sources import landing

    source = _named(name)
    for section, resource in source.sections.items():
        page = landing.check(source, resource)
        console.print(f"{source.name} {section}: the first page has {page.rows:,} rows, {page.usable:,} with a usable address", markup=False)
        if page.rows and page.empty:
            console.print(f"  nothing stands in {', '.join(page.empty)}; the columns there: {page.columns}", markup=False, style="yellow")


@app.command()
def run(
    name: Name,
    whole: Annotated[bool, typer.Option("--whole", help="read everything, also what did not change since the last run")] = False,
    accept_deletions: Annotated[bool, typer.Option("--accept-deletions", help="records that are gone at the source are meant to be, however many")] = False,
) -> None:
    """Bring a source up to date now, and tell it what is new here."""
    from mail_pipelines.sources import turns
    from mail_pipelines.sources.declaration import ENGAGEMENT

    source, engine = _named(name), open_engine()

    def bring_up_to_date(part: Part) -> None:
        if part == ENGAGEMENT:
            _tell(engine, source)
        else:
            _read(engine, source, part, whole=whole, accept_deletions=accept_deletions)

    errors = [outcome for _, outcome in turns.in_turn(source.parts, bring_up_to_date) if outcome]
    if errors:
        raise turns.together(errors)


def _read(engine: Engine, source: Source, section: Section, *, whole: bool, accept_deletions: bool) -> None:
    from mail_pipelines.sources import running

    report = running.run(engine, settings().home, source, section, whole=whole, accept_deletions=accept_deletions)
    counts = ", ".join(f"{number:,} {what}" for what, number in report.standing.counts.items() if number) or "nothing new"
    console.print(f"{source.name} {section}: {counts}", markup=False)
    for reason, number in sorted(report.standing.rejected.items(), key=lambda item: -item[1]):
        console.print(f"  {number:,} rejected: {reason}", markup=False, style="yellow")
    if report.reject_file:
        console.print(f"  which ones: {report.reject_file}", markup=False)
    if report.ended:
        console.print(f"  {report.ended:,} subscriptions ended: gone at the source", markup=False)
    if report.standing.note:
        console.print(f"  {report.standing.note}", markup=False, style="yellow")


def _tell(engine: Engine, source: Source) -> None:
    from mail_pipelines.sources import telling

    told = telling.run(engine, settings().home, source)
    counts = ", ".join(f"{number:,} {what}" for what, number in told.counts.items() if number) or "nothing new"
    console.print(f"{source.name} engagement: {counts}", markup=False)
    if told.standing.dead:
        console.print(f"  {told.standing.dead:,} dead letters: mail-pipelines source dead-letters {source.name}", markup=False, style="yellow")


@app.command()
def dead_letters(name: Name, most: Annotated[int, typer.Option("--most", min=1, help="how many of them, the newest first")] = 100) -> None:
    """What a source refused, or failed to take too often, and why."""
    from mail_pipelines.database.engine import reading
    from mail_pipelines.sources import outbox

    source = _named(name)
    with reading(open_engine()) as connection:
        letters = outbox.dead_letters(connection, source.name, most)
    table = Table("event", "contact", "attempts", "at", "reason")
    for letter in letters:
        table.add_row(f"{letter.kind}-{letter.event_id}", str(letter.contact_id), str(letter.attempts), letter.at.isoformat(), escape(letter.reason))
    console.print(table if letters else f"{source.name} has no dead letters")


@app.command()
def retry(name: Name) -> None:
    """Send the dead letters of a source again in its next run."""
    from mail_pipelines.database.engine import transact
    from mail_pipelines.sources import outbox

    source = _named(name)
    count = transact(open_engine(), lambda connection: outbox.retry(connection, source.name))
    console.print(f"{count:,} events wait again: mail-pipelines source run {source.name}", markup=False)


@app.command()
def status(
    name: Annotated[str | None, typer.Argument(help="a source; all if not given")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON line a section, and one a declaration that cannot be read")] = False,
) -> None:
    """When each source was read last (UTC), how old that is, and what went wrong."""
    import dataclasses

    from mail_pipelines.sources import running
    from mail_pipelines.sources import status as standings
    from mail_pipelines.sources.declaration import ENGAGEMENT

    engine, now = open_engine(), dt.datetime.now(dt.UTC)
    table = Table("source", "section", "last good run", "age", "rows", "merged", "rejected")
    sources, unreadable = ([_named(name)], {}) if name is not None else _all()
    wrong: list[str] = []
    for source in sources:
        for section in source.parts:
            standing = standings.read(engine, source.name, section)
            lag = standing.lag_seconds(now)
            if as_json:
                row = {"source": source.name, "section": section, "lag_seconds": lag, "merged": standing.merged, **dataclasses.asdict(standing)}
                typer.echo(json.dumps(row))
                continue
            good = "never" if standing.good_at is None else f"{dt.datetime.fromisoformat(standing.good_at):%Y-%m-%d %H:%M}"
            age = "" if lag is None else str(dt.timedelta(seconds=int(lag)))
            numbers = (standing.counts.get("read", 0), standing.merged, sum(standing.rejected.values()))
            if section == ENGAGEMENT:
                counts = standing.counts
                numbers = (counts.get("taken_up", 0), counts.get("pushed", 0), counts.get("dead", 0))
            table.add_row(source.name, section, good, age, *(f"{number:,}" for number in numbers))
            if words := running.wrong(settings().home, source.name, standing) or standing.note:
                wrong.append(f"{source.name} {section}: {words}")
    if as_json:
        for source_name, words in unreadable.items():
            typer.echo(json.dumps({"source": source_name, "section": None, "error": words}))
        return
    console.print(table)
    _print_wrong([*wrong, *unreadable.values()])
