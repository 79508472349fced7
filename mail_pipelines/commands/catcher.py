"""Built-in mail catchers, which stand in as dispatch servers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mail_pipelines.commands.context import console, settings

if TYPE_CHECKING:
    from mail_pipelines.dispatch.catcher.store import Kept

app = typer.Typer(no_args_is_help=True, help=__doc__)


@app.command("run")
def run(name: str, play: Annotated[Path | None, typer.Option(help="TOML file with the destinations' behaviour; else that of server.play")] = None) -> None:
    """Serve as the registered server NAME until stopped."""
    from mail_pipelines.dispatch.catcher import process

    process.run(settings(), name, play)


@app.command("destinations")
def destinations(
    name: str,
    port: Annotated[int, typer.Option(help="port of the loopback to listen on")],
    play: Annotated[Path | None, typer.Option(help="TOML file with the destinations' behaviour; else that of server.play")] = None,
) -> None:
    """Play only the destinations, behind real mail servers, until stopped; NAME is the folder of what arrives."""
    from mail_pipelines.dispatch.catcher import process

    process.run_destinations(settings(), name, port, play)


@app.command("list")
def list_messages(last: Annotated[int, typer.Option(help="show the newest so many")] = 20) -> None:
    """Messages the catchers keep: how many each server has, and the newest ones with their numbers."""
    import datetime as dt
    from collections import Counter

    from rich.table import Table

    messages = _all_messages()
    counts = Counter(Path(message.file).parent.name for message in messages)
    for server, count in sorted(counts.items()):
        console.print(f"{server}: {count} messages")
    table = Table("number", "received (UTC)", "server", "recipient", "bytes")
    for number, message in list(enumerate(messages, 1))[-last:]:
        when = dt.datetime.fromtimestamp(message.at, dt.UTC).strftime("%Y-%m-%d %H:%M:%S")
        table.add_row(str(number), when, Path(message.file).parent.name, message.recipient, str(message.size))
    console.print(table)


@app.command("show")
def show(number: int) -> None:
    """Print message NUMBER (as `catcher list` counts them) with its headers."""
    from mail_pipelines.errors import MailPipelinesError

    messages = _all_messages()
    if not 1 <= number <= len(messages):
        raise MailPipelinesError(f"there is no message {number}; the catchers keep {len(messages)}")
    typer.echo(messages[number - 1].data().decode("utf-8", "replace"))


def _all_messages() -> list[Kept]:
    from mail_pipelines.dispatch.catcher.store import kept

    return sorted(kept(Path(settings().server.mail_folder)), key=lambda message: message.at)
