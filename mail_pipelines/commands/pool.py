"""Pools: groups of servers that campaigns are sent through."""

from __future__ import annotations

import typer
from rich.markup import escape

from mail_pipelines.commands.context import console, open_engine

app = typer.Typer(no_args_is_help=True, help=__doc__)


@app.command("add")
def add(name: str) -> None:
    """Make a pool; `server add --pool NAME` puts servers into it, `pool: NAME` in a campaign's file sends through it."""
    from mail_pipelines.database.engine import transact
    from mail_pipelines.dispatch import pools

    transact(open_engine(), lambda connection: pools.add(connection, name))
    console.print(f"pool {name} is made")


@app.command("list")
def list_() -> None:
    """All pools, with how many servers and live campaigns each has."""
    from rich.table import Table

    from mail_pipelines.database.engine import reading
    from mail_pipelines.dispatch import pools

    table = Table("pool", "servers", "campaigns", "overflow of")
    with reading(open_engine()) as connection:
        for pool in pools.all_pools(connection):
            table.add_row(pool.key, f"{len(pool.servers):,}", f"{len(pool.campaigns):,}", f"{len(pool.overflow_of):,}")
    console.print(table)


@app.command("show")
def show(name: str) -> None:
    """One pool: its servers, and the live campaigns that it sends or helps to send."""
    from rich.table import Table

    from mail_pipelines.database.engine import reading
    from mail_pipelines.dispatch import holds, pools, servers

    with reading(open_engine()) as connection:
        pool_id = pools.find(connection, name)
        pool = next(pool for pool in pools.all_pools(connection) if pool.id == pool_id)
        states = {server.key: server.state for server in servers.all_servers(connection)}
        hold = next((hold for hold in holds.in_force(connection).holds if hold.scope == holds.Scope(holds.Kind.POOL, pool_id)), None)
    table = Table(show_header=False, box=None)
    table.add_row("pool", pool.key)
    if hold is not None:
        table.add_row("held", escape(f"{hold.reason} ({hold.by})"))
    table.add_row("servers", ", ".join(f"{key} ({states[key]})" for key in pool.servers) or "none: nothing is sent through it")
    table.add_row("campaigns", ", ".join(pool.campaigns) or "none")
    table.add_row("overflow of", ", ".join(pool.overflow_of) or "none")
    console.print(table)
