"""Campaigns: import, check, schedule, follow."""

from __future__ import annotations

import datetime as dt
import getpass
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated
from zoneinfo import ZoneInfo

import typer
from rich.markup import escape
from rich.table import Table

from mail_pipelines.commands.context import console, errors, open_engine, settings

if TYPE_CHECKING:
    import sqlalchemy as sa

    from mail_pipelines.campaigns.audience import Progress
    from mail_pipelines.campaigns.campaign import Campaign
    from mail_pipelines.campaigns.progress import Opening

app = typer.Typer(no_args_is_help=True, help=__doc__)

Key = Annotated[str, typer.Argument(help="key of a campaign")]
AllowUnverified = Annotated[bool, typer.Option("--allow-unverified", help="whatever the DNS has of the From domain: for test domains")]
FOLLOW_SECONDS = 1.0


def _now() -> dt.datetime:
    return dt.datetime.now(dt.UTC)


def _time(moment: dt.datetime | None) -> str:
    return f"{moment:%Y-%m-%d %H:%M:%S} UTC" if moment else ""


def _say(campaign: Campaign) -> None:
    console.print(f"campaign {campaign.key} is {campaign.state}{_held(campaign)}", markup=False)


def _held(campaign: Campaign) -> str:
    return f"; {campaign.hold} ({campaign.hold.by})" if campaign.hold else ""


@app.command("import")
def import_(
    file: Annotated[Path, typer.Argument(help="YAML as `campaign export` writes it")],
    confirm: Annotated[bool, typer.Option("--confirm", help="give a sending campaign this content, for recipients not claimed yet")] = False,
) -> None:
    """Make a draft of a YAML file, or write it over the draft with the same key."""
    from mail_pipelines.campaigns import check, documents, yaml_form
    from mail_pipelines.campaigns.campaign import CampaignError
    from mail_pipelines.campaigns.states import CampaignState

    try:
        text = file.read_text(encoding="utf-8")
    except OSError as error:
        raise CampaignError(f"{file} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise CampaignError(f"{file} is not UTF-8 text (byte {error.start})") from error
    engine = open_engine()
    campaign = documents.put(engine, yaml_form.parse(text), _now(), confirmed=confirm)
    _say(campaign)
    if campaign.state is CampaignState.DRAFT:
        # The DNS may need seconds, and what it has today says little of the day of the start.
        for problem in check.check(engine, settings(), campaign.key, _now(), allow_unverified=True):
            errors.print(f"note: {problem}", style="yellow", markup=False)


@app.command()
def export(key: Key) -> None:
    """One campaign as YAML, as `campaign import` reads it."""
    from mail_pipelines.campaigns import documents, yaml_form

    typer.echo(yaml_form.render(documents.get(open_engine(), key)), nl=False)


@app.command("list")
def list_() -> None:
    """All campaigns, newest first."""
    import sqlalchemy as sa

    from mail_pipelines.campaigns import store
    from mail_pipelines.database.engine import reading
    from mail_pipelines.database.models import Campaign

    with reading(open_engine()) as connection:
        campaigns = store.select(connection, sa.true(), order_by=(Campaign.id.desc(),))
    table = Table("key", "name", "state", "start", "audience")
    table.columns[4].justify = "right"
    for campaign in campaigns:
        counts = campaign.audience_counts
        state = f"{campaign.state} (held)" if campaign.hold else str(campaign.state)
        table.add_row(campaign.key, escape(campaign.definition.name), state, _time(campaign.definition.start_at), f"{counts['audience']:,}" if counts else "")
    console.print(table)


@app.command()
def show(key: Key) -> None:
    """What a campaign is and what became of it."""
    from mail_pipelines.campaigns import store, versions
    from mail_pipelines.capacity import domain_breakers
    from mail_pipelines.database.engine import reading

    with reading(open_engine()) as connection:
        campaign = store.load(connection, key)
        version = versions.current(connection, campaign)
        stopped = [breaker for (number, _), breaker in domain_breakers.stopped(connection).items() if number == campaign.id]
    definition, counts = campaign.definition, campaign.audience_counts or {}
    excluded = ", ".join(f"{number:,} {reason}" for reason, number in counts.get("excluded", {}).items())
    table = Table(show_header=False, box=None)
    for name, value in {
        "key": campaign.key,
        "name": definition.name,
        "state": campaign.state,
        "held": f"{campaign.hold} ({campaign.hold.by})" if campaign.hold else None,
        "stopped": "; ".join(map(str, stopped)),
        "segments": ", ".join(definition.include) + (f" without {', '.join(definition.exclude)}" if definition.exclude else ""),
        "brand": definition.brand,
        "pool": definition.pool + (f", overflow {definition.overflow_pool}" if definition.overflow_pool else ""),
        "unsubscribe": f"list {definition.list}" if definition.list else definition.unsubscribe,
        "on unknown": definition.on_unknown,
        "priority": definition.priority.name.lower(),
        "start": _time(definition.start_at),
        "finish by": _time(definition.finish_by),
        "expires": _time(campaign.expires_at),
        "window": definition.window,
        "content": f"version {version.number}, {version.content.subject!r}" if version else None,
        "matched": f"{counts['matched']:,}" if counts else None,
        "excluded": excluded,
        "audience": f"{counts['audience']:,} in {campaign.shards} shards" if counts else None,
        "started": _time(campaign.started_at),
        "finished": _time(campaign.finished_at),
        "archived": _time(campaign.archived_at),
    }.items():
        if value:
            table.add_row(name, escape(str(value)))
    console.print(table)


@app.command()
def check(key: Key, allow_unverified: AllowUnverified = False) -> None:
    """Everything that would keep a campaign from working; exit status 1 if there is anything."""
    from mail_pipelines.campaigns.check import check as find_problems

    problems = find_problems(open_engine(), settings(), key, _now(), allow_unverified=allow_unverified)
    for problem in problems:
        errors.print(str(problem), style="red", markup=False)
    if problems:
        raise typer.Exit(1)
    console.print(f"campaign {key} can be scheduled", markup=False)


@app.command()
def schedule(
    key: Key,
    at: Annotated[str | None, typer.Option(help="time to start, with its zone, as in 2026-03-02T09:00:00+01:00")] = None,
    allow_unverified: AllowUnverified = False,
) -> None:
    """Check a draft and schedule it for its start."""
    from mail_pipelines.campaigns import scheduling
    from mail_pipelines.campaigns.yaml_form import parse_time

    start_at = None if at is None else parse_time(at, "--at")
    campaign = scheduling.schedule(open_engine(), settings(), key, _now(), start_at=start_at, allow_unverified=allow_unverified)
    console.print(f"campaign {key} starts at {_time(campaign.definition.start_at)}", markup=False)


@app.command()
def start(key: Key, allow_unverified: AllowUnverified = False) -> None:
    """Check a draft and schedule it for now, or bring a scheduled campaign forward to now."""
    from mail_pipelines.campaigns import scheduling

    _say(scheduling.start(open_engine(), settings(), key, _now(), allow_unverified=allow_unverified))


@app.command()
def unschedule(key: Key) -> None:
    """Make a scheduled campaign a draft again, to edit it."""
    from mail_pipelines.campaigns import scheduling

    _say(scheduling.unschedule(open_engine(), key, _now()))


@app.command()
def deadline(
    key: Key,
    at: Annotated[str | None, typer.Argument(help="time with its zone, as in 2026-03-02T15:00:00+01:00; none: no deadline")] = None,
) -> None:
    """Set the time to finish by that the capacity plan aims at, also while the campaign is sending."""
    from mail_pipelines.campaigns import store
    from mail_pipelines.campaigns.yaml_form import parse_time
    from mail_pipelines.database.engine import transact

    finish_by = None if at is None else parse_time(at, "AT")
    transact(open_engine(), lambda connection: store.move_deadline(connection, key, finish_by, _now()))
    console.print(f"campaign {key} {'has no deadline' if finish_by is None else f'is to finish by {_time(finish_by)}'}; the next plan follows", markup=False)


@app.command()
def pause(key: Key) -> None:
    """Stop a sending campaign."""
    from mail_pipelines.campaigns import scheduling

    _say(scheduling.pause(open_engine(), key, _now()))


@app.command()
def resume(key: Key) -> None:
    """Let a paused campaign send again; release a held one."""
    from mail_pipelines.campaigns import scheduling

    _say(scheduling.resume(open_engine(), key, _now(), getpass.getuser()))


@app.command()
def cancel(key: Key) -> None:
    """End a campaign: nobody waiting gets it any more. There is no way back."""
    from mail_pipelines.campaigns import lifecycle

    rows = lifecycle.cancel(open_engine(), key, _now())
    console.print(f"campaign {key} is cancelled; {rows:,} waiting recipients will not get it", markup=False)


@app.command()
def build(key: Key) -> None:
    """Freeze the audience of a campaign that is due, or go on with a freeze that was interrupted."""
    from mail_pipelines.campaigns import audience

    engine = open_engine()
    with _progress_bar() as progress:
        built = audience.build(engine, settings(), key, _now(), progress)
    excluded = ", ".join(f"{count:,} {reason}" for reason, count in built.excluded.items()) or "nobody"
    console.print(f"matched {built.matched:,}, excluded {excluded}, audience {built.audience:,}", markup=False)
    if built.reason:
        console.print(f"nothing was frozen now: {built.reason}", markup=False)
    _say(built.campaign)


@contextmanager
def _progress_bar() -> Iterator[Progress]:
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bar

    with Bar(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), console=console, transient=True) as bar:
        tasks: dict[str, int] = {}

        def progress(step: str, done: int, total: int) -> None:
            if step not in tasks:
                tasks[step] = bar.add_task(step)
            bar.update(bar.task_ids[tasks[step]], completed=done, total=total or None)

        yield progress


@app.command()
def status(key: Key, follow: Annotated[bool, typer.Option("--follow", help="until the campaign is over")] = False) -> None:
    """Recipients by state, with how many reach it a minute."""
    engine = open_engine()
    if not follow:
        console.print(_status(engine, key)[0])
        return
    from rich.live import Live

    table, is_over = _status(engine, key)
    with Live(table, console=console, auto_refresh=False) as live:
        while not is_over:
            time.sleep(FOLLOW_SECONDS)
            table, is_over = _status(engine, key)
            live.update(table, refresh=True)


def _opening(opening: Opening) -> str:
    """What recipients wait for."""
    if opening.last:
        return "  whose send window does not open again"
    zones = opening.zones[0] + (f" and {len(opening.zones) - 1} more" if len(opening.zones) > 1 else "")
    local = opening.at.astimezone(ZoneInfo(opening.zones[0]))
    return f"  until {opening.at:%a %H:%M} UTC, {local:%H:%M} in {zones}"


def _status(engine: sa.Engine, key: str) -> tuple[Table, bool]:
    """The table, and whether nothing in it will change any more."""
    from mail_pipelines.campaigns import progress, store
    from mail_pipelines.database.engine import reading
    from mail_pipelines.database.models import State

    with reading(engine) as connection:
        campaign = store.load(connection, key)
        totals = progress.totals(connection, campaign)
        openings = progress.openings(connection, campaign, _now())
        rates = {
            state.name.lower(): progress.per_minute(connection, campaign.id, state, _now()) for state in State if state.is_final or state is State.DEFERRED
        }
    table = Table("state", "recipients", "share", "a minute", title=escape(f"{campaign.key} is {campaign.state}{_held(campaign)}"), title_justify="left")
    for column in table.columns[1:]:
        column.justify = "right"
    for name, count in totals.parts().items():
        share = f"{count / totals.audience:.1%}" if totals.audience else ""
        table.add_row(name, f"{count:,}", share, f"{rates[name]:,.0f}" if rates.get(name) else "")
        for opening in openings if name == "deferred" else ():
            table.add_row(_opening(opening), f"{opening.recipients:,}", "", "", style="dim")
    table.add_row("audience", f"{totals.audience:,}", "", "", style="bold")
    return table, campaign.state.is_terminal and totals.open == 0
