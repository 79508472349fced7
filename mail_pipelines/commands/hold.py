"""Holds: stop everything, or all mail of a campaign, brand, pool, server or provider, until it is released."""

from __future__ import annotations

import datetime as dt
import getpass
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from mail_pipelines.commands.context import console, open_engine

if TYPE_CHECKING:
    from mail_pipelines.dispatch.holds import Kind

app = typer.Typer(help=__doc__)

Campaign = Annotated[str | None, typer.Option(help="key of a campaign")]
Brand = Annotated[str | None, typer.Option(help="key of a brand")]
Pool = Annotated[str | None, typer.Option(help="name of a pool: its servers, and the campaigns that send through it")]
Server = Annotated[str | None, typer.Option(help="name of a server")]
Provider = Annotated[str | None, typer.Option(help="provider group")]
By = Annotated[str | None, typer.Option("--by", help="who decides; without it the login name")]


@app.callback(invoke_without_command=True)
def hold(
    context: typer.Context,
    reason: Annotated[str | None, typer.Option(help="why, for those who find it")] = None,
    campaign: Campaign = None,
    brand: Brand = None,
    pool: Pool = None,
    server: Server = None,
    provider: Provider = None,
    by: By = None,
) -> None:
    """Stop everything, or all mail of a campaign, brand, pool, server or provider, until it is released."""
    from mail_pipelines.campaigns import holding
    from mail_pipelines.dispatch.holds import HoldError

    if context.invoked_subcommand:
        return
    if not (reason or "").strip():
        raise HoldError("a hold needs a reason: give --reason")
    kind, key = _scope(campaign=campaign, brand=brand, pool=pool, server=server, provider=provider)
    console.print(holding.hold(open_engine(), kind, key, str(reason), by or getpass.getuser(), dt.datetime.now(dt.UTC)), markup=False)


def release(campaign: Campaign = None, brand: Brand = None, pool: Pool = None, server: Server = None, provider: Provider = None, by: By = None) -> None:
    """End a hold: that over everything, or over a campaign, brand, pool, server or provider. Other holds stay."""
    from mail_pipelines.campaigns import holding

    kind, key = _scope(campaign=campaign, brand=brand, pool=pool, server=server, provider=provider)
    console.print(holding.release(open_engine(), kind, key, by or getpass.getuser(), dt.datetime.now(dt.UTC)), markup=False)


def _scope(**given: str | None) -> tuple[Kind, str]:
    from mail_pipelines.dispatch.holds import HoldError, Kind

    named = {kind: key for kind, key in given.items() if key is not None}
    if len(named) > 1:
        raise HoldError(f"a hold is over one thing, not {' and '.join(named)}: give one of them, or one hold for each")
    return next(((Kind(kind), key) for kind, key in named.items()), (Kind.EVERYTHING, ""))


@app.command("list")
def list_(
    released: Annotated[bool, typer.Option("--all", help="with those that were released")] = False,
    limit: Annotated[int, typer.Option(min=1, help="with --all, the newest so many")] = 50,
) -> None:
    """What is held: why, by whom, since when."""
    from rich.table import Table

    from mail_pipelines.database.engine import reading
    from mail_pipelines.dispatch import holds

    with reading(open_engine()) as connection:
        found = holds.recorded(connection, limit) if released else list(holds.in_force(connection).holds)
    if not found:
        console.print("nothing is held")
        return
    table = Table("held", "reason", "by", *(["released"] if released else []))
    for one in found:
        end = f"{one.released_by}, {one.released_at:%Y-%m-%d %H:%M} UTC" if one.released_at else ""
        table.add_row(one.what, escape(one.reason), escape(one.by), *([escape(end)] if released else []))
    console.print(table)
