"""Simulate weeks of a large fleet with the planning code of production, in a world that blocks, slows down and loses servers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.markup import escape

from mail_pipelines.commands.context import console

if TYPE_CHECKING:
    from mail_pipelines.simulation import run


def simulate(
    recipients: Annotated[int | None, typer.Option(min=1, help="of all campaigns together; 100,000,000 if not given, --quick: 2,000,000")] = None,
    servers: Annotated[int | None, typer.Option(min=1, help="at the beginning; 300 if not given, --quick: 8")] = None,
    campaigns: Annotated[int | None, typer.Option(min=1, help="12 if not given, --quick: 6")] = None,
    days: Annotated[int | None, typer.Option(min=5, help="in which the campaigns begin; 28 if not given, --quick: 14")] = None,
    seed: Annotated[int, typer.Option(help="the same seed, the same campaigns and events")] = 1,
    provisioning: Annotated[Literal["off", "auto"], typer.Option(help="as provisioning.mode: whether servers are ordered")] = "auto",
    quick: Annotated[bool, typer.Option("--quick", help="a small fleet: seconds instead of minutes")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON instead")] = False,
) -> None:
    """100 million recipients, 300 servers, four weeks: when campaigns end, which servers are ordered, and whether all limits are kept. Times are UTC.

    No database and no server is touched. Ends with status 1 if a limit was broken, or a message lost or sent twice.
    """
    import json
    from dataclasses import asdict

    from mail_pipelines.simulation import run as simulation
    from mail_pipelines.simulation.scenario import Size

    defaults = Size(2_000_000, 8, 6, 14) if quick else Size()
    size = Size(recipients or defaults.recipients, servers or defaults.servers, campaigns or defaults.campaigns, days or defaults.days, seed)
    outcome = simulation.simulate(size, provisioning, None if as_json else console.print)
    if as_json:
        typer.echo(json.dumps(asdict(outcome)))
    else:
        _show(outcome)
    if any(outcome.figures[name] for name in ("limits broken", "lost", "extra")):
        raise typer.Exit(1)


def _show(outcome: run.Outcome) -> None:
    from rich.table import Table

    table = Table("campaign", "priority", "messages", "started", "forecast", "soonest", "finished", "finish by", "to soonest", "held up by")
    for one in outcome.campaigns:
        times = [_when(moment) for moment in (one.started, one.forecast, one.soonest, one.finished, one.finish_by)]
        ratio = "" if one.ratio is None else f"{one.ratio:.3f}"
        table.add_row(one.campaign, str(one.priority), f"{one.messages:,}", *times, ratio, escape(one.held_up_by))
    console.print(table)
    for decision in outcome.decisions:
        console.print(escape(f"{_when(decision.at)} {decision.what} ({decision.why})"))
    figures = Table("figure", "value")
    for name, value in outcome.figures.items():
        figures.add_row(name, f"{value:,}")
    console.print(figures)
    for line in (*outcome.violations, *outcome.failures):
        console.print(escape(line), style="red")


def _when(moment: str | None) -> str:
    return "" if moment is None else moment[:16].replace("T", " ")
