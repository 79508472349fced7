"""Alerts to operators."""

from __future__ import annotations

import typer
from rich.markup import escape

from mail_pipelines.commands.context import console, open_engine, settings

app = typer.Typer(no_args_is_help=True, help=__doc__)


@app.command("test")
def test() -> None:
    """Send a test message over every channel that is configured; exit status 1 if one does not take it."""
    from mail_pipelines.alerts.channels import ChannelError, channels_of

    channels = channels_of(settings().alerts)
    if not channels:
        raise ChannelError("nobody would be told: set alerts.relay_host, alerts.from_address and alerts.to, or alerts.webhook_url (docs/alerts.md)")
    failed = False
    for channel in channels:
        try:
            channel.send("[mail_pipelines] test", "This is a test: alerts of this installation come here.\n")
        except ChannelError as error:
            failed = True
            console.print(f"{channel.name}: {error}", markup=False, highlight=False)
        else:
            console.print(f"{channel.name}: taken", markup=False, highlight=False)
    if failed:
        raise typer.Exit(1)


@app.command("list")
def list_() -> None:
    """What is wrong now, since when, and the command to type; what was told of it, and what is over."""
    from rich.table import Table

    from mail_pipelines.alerts import memory
    from mail_pipelines.database.engine import reading

    table = Table("since", "cause", "type", "told")
    with reading(open_engine()) as connection:
        for alert in memory.load(connection):
            told = ", ".join(f"{channel} {at:%Y-%m-%d %H:%M}" for channel, at in alert.sent.items()) or "not yet"
            over = f"over {alert.resolved_at:%Y-%m-%d %H:%M}; " if alert.resolved_at else ""
            table.add_row(f"{alert.first_seen:%Y-%m-%d %H:%M} UTC", escape(alert.text), escape(alert.command), f"{over}{told}")
    console.print(table)
