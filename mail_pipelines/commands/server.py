"""Dispatch servers."""

from __future__ import annotations

import enum
from typing import Annotated

import typer

from mail_pipelines.commands.context import console, open_engine, settings

app = typer.Typer(no_args_is_help=True, help=__doc__)


@app.command("list")
def list_servers() -> None:
    """All servers with state and heartbeat."""
    from rich.table import Table

    from mail_pipelines.database.engine import database_now, reading
    from mail_pipelines.dispatch import servers

    table = Table("server", "kind", "address", "state", "heartbeat")
    with reading(open_engine()) as connection:
        now = database_now(connection)
        for server in servers.all_servers(connection):
            silent = server.is_silent(now, settings().server.heartbeat_seconds)
            beat = "never" if server.heartbeat_at is None else f"{(now - server.heartbeat_at).total_seconds():.0f} s ago"
            table.add_row(server.key, server.kind, f"{server.host}:{server.port}", server.state, f"{beat}{' (silent)' if silent else ''}")
    console.print(table)


class Kind(enum.StrEnum):
    CATCHER = "catcher"
    EXIM = "exim"


@app.command("add")
def add(
    name: str,
    port: Annotated[int, typer.Option(help="port it listens on")],
    host: str = "127.0.0.1",
    kind: Annotated[Kind, typer.Option(help="what serves there")] = Kind.CATCHER,
) -> None:
    """Register the server NAME (started by `mail-pipelines catcher run NAME` or `mail-pipelines exim run NAME`)."""
    import datetime as dt

    from mail_pipelines.dispatch import servers

    server = servers.register(open_engine(), name, kind=kind.value, host=host, port=port, now=dt.datetime.now(dt.UTC))
    console.print(f"server {server.key} at {server.host}:{server.port} is {server.state}")


@app.command("state")
def state(name: str, state: str) -> None:
    """Set the state of a server: active, paused, draining, retired or lost. Sending reacts within seconds.

    `lost` is for a server that will not come back: what it had in hand becomes unknown.
    """
    from mail_pipelines.database.engine import reading
    from mail_pipelines.dispatch import servers, settlement

    engine = open_engine()
    with reading(engine) as connection:
        found = servers.find(connection, name)
    servers.set_state(engine, name, state)
    console.print(f"server {name} is {state}")
    if state == "lost":
        console.print(f"{settlement.give_up(engine, found.id):,} recipients it had in hand are unknown now")


@app.command("limits")
def limits(
    provider: Annotated[str, typer.Argument(help="provider group, or * for all others")],
    server: Annotated[str | None, typer.Option(help="one server; without it the default of all servers")] = None,
    connections: int = 10,
    per_second: float = 100,
    per_hour: int | None = None,
    per_day: int | None = None,
    messages_per_connection: int = 100,
) -> None:
    """Set what servers may send to a provider."""
    from mail_pipelines.dispatch import servers

    servers.set_limits(
        open_engine(),
        server,
        provider,
        {
            "connections": connections,
            "per_second": per_second,
            "per_hour": per_hour,
            "per_day": per_day,
            "messages_per_connection": messages_per_connection,
        },
    )
    console.print(f"limits for {provider} on {server or 'all servers'} are set")
