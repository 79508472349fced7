"""The home folder: make it, show it, examine it, run it."""

from __future__ import annotations

import dataclasses
import json
import shlex
from typing import Annotated

import typer

from mail_pipelines import config
from mail_pipelines.commands.context import console, settings

app = typer.Typer(no_args_is_help=True)
config_app = typer.Typer(no_args_is_help=True, help="Settings: which are in force, which exist.")
app.add_typer(config_app, name="config")


@app.command()
def init(
    production: Annotated[bool, typer.Option("--production", help="of a centre with workers, or with MAIL_PIPELINES_SERVER of a dispatch server")] = False,
) -> None:
    """Make the home folder, or bring it and the databases up to date; safe to repeat."""
    from mail_pipelines import home

    for line in home.make(production=production):
        console.print(line, markup=False, highlight=False)
    console.print(f"{config.home_folder()} is ready", markup=False, highlight=False)


@app.command()
def env() -> None:
    """Print what `dagster` commands need: eval "$(mail-pipelines env)"."""
    from mail_pipelines import home

    for name, value in home.environment(settings()).items():
        typer.echo(f"export {name}={shlex.quote(value)}")


@config_app.command("show")
def show(as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False) -> None:
    """Print every setting with its origin; secrets are masked."""
    rows = config.describe()
    if as_json:
        typer.echo(json.dumps([dataclasses.asdict(row) for row in rows], indent=2))
        return
    shown = [(row.key, _text(row.value), row.origin) for row in rows]
    key_width, value_width = (max(len(line[column]) for line in shown) for column in (0, 1))
    for key, value, origin in shown:
        typer.echo(f"{key:<{key_width}}  {value:<{value_width}}  {origin}")


def _text(value: object) -> str:
    if isinstance(value, list):
        return ", ".join(value)
    return "-" if value is None else str(value)


@config_app.command("reference")
def reference() -> None:
    """Print the page of all settings (Markdown)."""
    from mail_pipelines import config_text

    typer.echo(config_text.reference(), nl=False)


@app.command()
def doctor(
    host: Annotated[bool, typer.Option("--host", help="of a dispatch server: only whether this host could send now")] = False,
    wait: Annotated[float, typer.Option(help="with --host: look again for so long (s) until nothing is wrong")] = 0,
) -> None:
    """Look for what is wrong and say what to do; exit status 1 if anything is."""
    from mail_pipelines import readiness
    from mail_pipelines.doctor import examination

    findings = readiness.examine(wait_seconds=wait) if host else examination.examine()
    for finding in findings:
        console.print(f"{finding.check}: {finding.problem}\n    {finding.remedy}", markup=False, highlight=False)
    if findings:
        raise typer.Exit(1)
    console.print("nothing is wrong")


@app.command()
def up() -> None:
    """Run the Dagster UI and daemon, and built-in mail catchers where no server is registered, until Ctrl-C."""
    from mail_pipelines import up
    from mail_pipelines.commands.context import open_engine
    from mail_pipelines.supervision import Processes, Stopped

    engine = open_engine()
    try:
        with Processes(lock=up.lock(settings().home)) as processes:
            for name in up.catchers(engine, settings()):
                up.start_catcher(processes, engine, settings(), name)
            address = up.start_dagster(processes, settings())
            console.print(f"Dagster UI: {address}   (Ctrl-C stops)", markup=False, highlight=False)
            processes.wait()
    except Stopped:
        console.print("stopped")
