"""Servers that are made here: commands of `mail-pipelines server`."""

from __future__ import annotations

import datetime as dt
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from mail_pipelines.commands.context import console, open_engine, settings

if TYPE_CHECKING:
    from sqlalchemy.engine import Connection

    from mail_pipelines.provisioning.interfaces import Parts
    from mail_pipelines.provisioning.store import Provision

app = typer.Typer(help=__doc__)


def _parts() -> Parts:
    from mail_pipelines.resources.provisioning import parts_of

    return parts_of(open_engine(), settings())


@app.command("provision")
def provision(
    proposal: Annotated[int | None, typer.Option(help="make the servers of this proposal")] = None,
    count: Annotated[int, typer.Option(min=1, help="how many, without a proposal")] = 1,
    pool: Annotated[str | None, typer.Option(help="their pool, without a proposal; else the default one")] = None,
    here: Annotated[bool, typer.Option("--here", help="make them in this process, one after the other, instead of by runs of provision_server")] = False,
) -> None:
    """Have servers made: host, accounts, software, DNS records, verification, service."""
    from mail_pipelines.database.engine import transact
    from mail_pipelines.dispatch import pools
    from mail_pipelines.provisioning import proposals, store
    from mail_pipelines.provisioning.interfaces import ProvisioningError

    parts = _parts()
    if not parts.sources:
        raise ProvisioningError(f"there is no host source: name one in {settings().provisioning.hosts} (docs/provisioning.md)")

    def work(connection: Connection) -> list[Provision]:
        if proposal is not None:
            return proposals.accept(connection, settings().provisioning, proposal)
        if pool is not None:
            pools.find(connection, pool)
        return [store.request(connection, settings().provisioning, "asked for by hand", pool=pool) for _ in range(count)]

    for asked in transact(parts.engine, work):
        if here:
            _advance(parts, asked.key)
        else:
            console.print(f"server {asked.key} is asked for; `mail-pipelines server provisions` tells how far it is", markup=False)


def _advance(parts: Parts, key: str) -> None:
    """Until it is in service, waits, or has failed."""
    from mail_pipelines.provisioning import making
    from mail_pipelines.provisioning.states import State

    def say(text: str) -> None:
        console.print(text, markup=False, highlight=False)

    found = making.advance(parts, key, say)
    if found.state is State.FAILED:
        say(f"server {key} could not be made: {found.reason}")
        raise typer.Exit(1)


@app.command("provisions")
def provisions(every: Annotated[bool, typer.Option("--all", help="those that are gone, too")] = False) -> None:
    """Servers that are made here: how far they are, what they wait for, what they cost."""
    from rich.table import Table

    from mail_pipelines.database.engine import database_now, reading
    from mail_pipelines.provisioning import budget, store

    table = Table("server", "state", "step", "host source", "host", "cost/h", "asked for (UTC)", "why it is there, waits, has failed or left")
    with reading(open_engine()) as connection:
        now = database_now(connection)
        found = store.all_provisions(connection, since=dt.datetime.fromtimestamp(0, dt.UTC) if every else None)
        month = store.all_provisions(connection, since=budget.month_of(now)[0])
    for one in found:
        table.add_row(*_row(one))
    console.print(table)
    for one in found:
        for line in one.records or []:
            console.print(f"{one.key} waits for: {line}", markup=False, highlight=False)
    console.print(f"this month {budget.cost_this_month(month, now):.2f} of {settings().provisioning.budget:.2f}, if all stay until its end")


def _row(one: Provision) -> list[str]:
    return [
        one.key,
        one.state,
        one.step,
        one.source or "",
        one.host.address if one.host else "",
        f"{one.cost_per_hour:g}" if one.cost_per_hour is not None else "",
        f"{one.requested_at:%Y-%m-%d %H:%M}",
        escape(one.reason or one.left_why or one.why),
    ]


@app.command("proposals")
def list_proposals(last: Annotated[int, typer.Option(help="show the newest so many")] = 20) -> None:
    """Servers that would help: why, what they cost, and what they would do."""
    from rich.table import Table

    from mail_pipelines.database.engine import reading
    from mail_pipelines.provisioning import proposals

    table = Table("proposal", "made (UTC)", "state", "servers", "pool", "cost/month", "why", "effect")
    with reading(open_engine()) as connection:
        for one in proposals.all_proposals(connection, last=last):
            made = f"{one.made_at:%Y-%m-%d %H:%M}"
            table.add_row(str(one.id), made, one.state, str(one.servers), one.pool or "", f"{one.cost_per_month:.2f}", escape(one.why), escape(one.effect))
    console.print(table)


@app.command("remove")
def remove(
    name: str,
    now: Annotated[bool, typer.Option("--now", help="also before provisioning.minimum_hours are over")] = False,
    here: Annotated[bool, typer.Option("--here", help="in this process, instead of by a run of retire_server")] = False,
) -> None:
    """Retire a server that was made here and delete its host; one that is still being made is given up. See `server retire` for others."""
    from mail_pipelines.database.engine import database_now, reading, transact
    from mail_pipelines.provisioning import budget, store
    from mail_pipelines.provisioning.interfaces import ProvisioningError
    from mail_pipelines.provisioning.states import IN_SERVICE

    parts = _parts()
    with reading(parts.engine) as connection:
        found, moment = store.find(connection, name), database_now(connection)
    until = budget.may_be_given_back_at(found, settings().provisioning)
    if found.state in IN_SERVICE and until is not None and moment < until and not now:
        raise ProvisioningError(f"server {name} is to be kept until {until:%Y-%m-%d %H:%M} UTC (provisioning.minimum_hours); with --now it goes at once")
    going = transact(parts.engine, lambda connection: store.give_back(connection, name, "given up by hand"))
    if here:
        _advance(parts, name)
    else:
        console.print(f"server {name} is {going.state}; `mail-pipelines server provisions` tells how far it is", markup=False)


@app.command("sources")
def sources(use_again: Annotated[str | None, typer.Option(help="use this one again, which was set aside")] = None) -> None:
    """Where hosts come from, in the order in which they are used, and which source is set aside."""
    from rich.table import Table

    from mail_pipelines.database.engine import reading, transact
    from mail_pipelines.provisioning import store

    parts = _parts()
    if use_again is not None:
        known = parts.source(use_again).name
        done = transact(parts.engine, lambda connection: store.use_again(connection, known))
        console.print(f"host source {known} is used again" if done else f"host source {known} is not set aside")
        return
    table = Table("host source", "cost/h", "servers", "at most", "warm-up", "set aside")
    with reading(parts.engine) as connection:
        aside = store.set_aside(connection)
        living = [one.source for one in store.all_provisions(connection)]
    for source in parts.sources:
        most = "" if source.most is None else str(source.most)
        warm = source.curve or "warm"
        table.add_row(source.name, f"{source.cost_per_hour:g}", str(living.count(source.name)), most, warm, escape(aside.get(source.name, "")))
    console.print(table)
    if not parts.sources:
        console.print(f"there is none: name one in {settings().provisioning.hosts} (docs/provisioning.md)", markup=False, highlight=False)
