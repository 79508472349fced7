"""Dispatch servers."""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING, Annotated

import typer

from mail_pipelines.commands import server_show
from mail_pipelines.commands.context import console, open_engine, settings

if TYPE_CHECKING:
    from sqlalchemy.engine import Connection

    from mail_pipelines.dispatch.servers import ServerInfo

app = typer.Typer(no_args_is_help=True, help=__doc__)
app.command("list")(server_show.list_servers)
app.command("show")(server_show.show)


class Kind(enum.StrEnum):
    CATCHER = "catcher"
    EXIM = "exim"


@app.command("add")
def add(
    name: str,
    port: Annotated[int, typer.Option(help="port it listens on")],
    host: str = "127.0.0.1",
    kind: Annotated[Kind, typer.Option(help="what serves there")] = Kind.CATCHER,
    pool: Annotated[str | None, typer.Option(help="its pool; without it the default one")] = None,
    curve: Annotated[str, typer.Option("--warm-up", help="curve by which a new address is warmed up: careful, normal, fast, manual")] = "none",
    with_account: Annotated[bool, typer.Option("--account", help="make its accounts, too, as `server account` does")] = False,
) -> None:
    """Register the server NAME (started by `mail-pipelines catcher run NAME` or `mail-pipelines exim run NAME`)."""
    from mail_pipelines.capacity import warm_up
    from mail_pipelines.database.engine import database_now, transact
    from mail_pipelines.dispatch import servers

    def work(connection: Connection) -> ServerInfo:
        now = database_now(connection)
        servers.write(connection, name, kind=kind.value, host=host, port=port, now=now, pool=pool)
        if curve != warm_up.NONE:
            warm_up.set_by_hand(connection, name, now, curve=curve)
        return servers.find(connection, name)

    server = transact(open_engine(), work)
    console.print(f"server {server.key} at {server.host}:{server.port} is {server.state}")
    if with_account:
        account(name)


@app.command("warm-up")
def warm(
    name: str,
    provider: Annotated[str | None, typer.Option(help="one provider group, or * for those that it has not sent to; without it all")] = None,
    curve: Annotated[str | None, typer.Option(help="begin on this curve: careful, normal, fast, manual; none ends the warm-up")] = None,
    step: Annotated[int | None, typer.Option(help="set the step of the curve, the first is 0; one behind the last lets the provider be warm")] = None,
    days: Annotated[int, typer.Option(help="show no more lines of the history than this")] = 30,
) -> None:
    """How far a server is warmed up for each provider and what each day came to; or begin, end or set it by hand."""
    from rich.table import Table

    from mail_pipelines.capacity import warm_up
    from mail_pipelines.database.engine import database_now, reading, transact
    from mail_pipelines.dispatch import servers

    engine = open_engine()
    if curve is not None or step is not None:
        transact(engine, lambda connection: warm_up.set_by_hand(connection, name, database_now(connection), provider=provider, curve=curve, step=step))
    with reading(engine) as connection:
        server = servers.find(connection, name)
        now = database_now(connection)
        pairs = [pair for pair in warm_up.standings(connection, now, server.id) if provider in (None, pair.provider)]
        past = [day for day in warm_up.history(connection, server.id, days) if provider in (None, day.provider)]
    console.print(f"server {name} is {server.state}{'' if pairs else ', without a warm-up'}")
    for pair in pairs:
        console.print(f"{pair.provider}: {pair.words}; {pair.reason}", markup=False, highlight=False)
    if past:
        table = Table("day", "provider", "step", "cap", "sent", "deferred", "bounced", "complaints", "then")
        for day in past:
            counts = day.counts
            cap = "none" if day.per_day is None else f"{day.per_day:,}"
            numbers = [f"{number:,}" for number in (counts.sent, counts.deferred, counts.bounced, counts.complaints)]
            table.add_row(str(day.day), day.provider, str(day.step), cap, *numbers, f"{day.verdict}: {day.why}")
        console.print(table)


@app.command("activate")
def activate(name: str) -> None:
    """Let a paused, draining or lost server send again."""
    _move(name, "activate")


@app.command("pause")
def pause(name: str) -> None:
    """Stop a server: it claims nothing more, and what it is late with is not sent."""
    _move(name, "pause")


@app.command("drain")
def drain(name: str) -> None:
    """Let a server end what it has in hand and claim nothing more; `server show` says when it is drained."""
    _move(name, "drain")


def _move(name: str, verb: str) -> None:
    from mail_pipelines.database.engine import transact
    from mail_pipelines.dispatch import registry, servers

    def work(connection: Connection) -> str:
        # It may have come there by itself meanwhile, as a listed server does.
        present = servers.find(connection, name).state
        return present if present == registry.MOVES[verb].target else registry.move(connection, name, verb)

    console.print(f"server {name} is {transact(open_engine(), work)}")


@app.command("retire")
def retire(name: str, lost: Annotated[bool, typer.Option("--lost", help="its host will not come back: what it has in hand becomes unknown")] = False) -> None:
    """Take a paused or drained server out for good, once nothing is in its hands and its log has been read, and shipped where there is an archive."""
    from mail_pipelines.dispatch import registry
    from mail_pipelines.dispatch.archive import Archive

    if lost:
        rows = registry.retire_lost(open_engine(), name)
        console.print(f"server {name} is retired; {rows:,} recipients it had in hand are unknown now")
    else:
        registry.retire(open_engine(), name, settings().server.heartbeat_seconds, Archive.of(settings().server.log_archive))
        console.print(f"server {name} is retired")


@app.command("account")
def account(name: str) -> None:
    """Make the accounts of a server on another host, of all databases and at the broker, or give them new passwords, with its token key and DKIM keys; all is
    kept in the home.
    """
    from mail_pipelines.dispatch.accounts import KeyHeld
    from mail_pipelines.provisioning.credentials import Kept
    from mail_pipelines.resources.provisioning import accounts_of

    kept, credentials = Kept.of(settings(), name), accounts_of(open_engine(), settings())
    given = credentials.give_accounts(name)
    several = f"with several servers there: in servers/{name}.toml of the home, the token key too; docs/production.md"
    console.print(f"server {name} has an account; on its host set ({several})", markup=False, highlight=False)
    console.print(f"MAIL_PIPELINES_DATABASE__URL={given.url}", markup=False, highlight=False)
    console.print(f"and MAIL_PIPELINES_DATABASE__PASSWORD_FILE to a copy of {kept.password}", markup=False, highlight=False)
    if kept.environment.exists():
        console.print(f"and put the lines of {kept.environment} into its environment file", markup=False, highlight=False)
    if credentials.broker is not None:
        console.print(f"and give its MAIL_PIPELINES_BROKER__URL the password that is in {kept.broker}", markup=False, highlight=False)
    try:
        credentials.give_key(given)
    except KeyHeld as held:
        console.print(str(held), markup=False, highlight=False)
        return
    console.print(f"and put a copy of {kept.token_key} into its home as secrets/token_key", markup=False, highlight=False)
    _equip(name, allow_unverified=False)


@app.command("dkim")
def dkim(
    name: str,
    allow_unverified: Annotated[bool, typer.Option("--allow-unverified", help="take its keys into use whatever the DNS has: for test domains")] = False,
) -> None:
    """Give a server DKIM keys of its own for all domains: the first time makes them, repeated once they are published takes them into use."""
    if _equip(name, allow_unverified=allow_unverified):
        raise typer.Exit(1)
    console.print(f"server {name} signs the mail of all domains with keys of its own", markup=False)


def _equip(name: str, *, allow_unverified: bool) -> bool:
    """Take the next step of each DKIM key of a server; whether records wait to be published."""
    import datetime as dt

    from mail_pipelines.database.engine import reading
    from mail_pipelines.dispatch import servers
    from mail_pipelines.domains import records, rotation
    from mail_pipelines.domains.domain import KeyState

    engine = open_engine()
    with reading(engine) as connection:
        server = servers.find(connection, name)
    steps = rotation.equip(engine, settings(), server.id, dt.datetime.now(dt.UTC), allow_unverified=allow_unverified)
    waiting = [step for step in steps if step.key.state is KeyState.WAITING]
    for step in waiting:
        typer.echo(records.dkim_record(step.domain, step.key).zone_line())
    if waiting:
        console.print(f"publish the DKIM records above, then run: mail-pipelines server dkim {name}", markup=False)
    return bool(waiting)


@app.command("revoke")
def revoke(name: str) -> None:
    """Shut a stolen server out: its accounts at database and broker, its DKIM keys; what it has in hand becomes unknown. It never comes back."""
    from mail_pipelines.resources.provisioning import accounts_of

    credentials = accounts_of(open_engine(), settings())
    done = credentials.take(name)
    console.print(f"server {name} is revoked; {done.unknown:,} recipients it had in hand are unknown now")
    for record in done.records:
        console.print(f"remove from the DNS at once: {record}", markup=False, highlight=False)
    credentials.clear(name)
    if credentials.broker is not None:
        console.print("its account at the broker is deleted")


@app.command("retry")
def retry(name: str, provider: Annotated[str, typer.Argument(help="provider group that the server has stopped sending to")]) -> None:
    """Let a server send a few messages to a provider that refused it, without waiting further."""
    import datetime as dt

    from mail_pipelines.capacity import breakers
    from mail_pipelines.database.engine import reading
    from mail_pipelines.dispatch import servers

    engine = open_engine()
    with reading(engine) as connection:
        server = servers.find(connection, name)
    begun = breakers.try_now(engine, server.id, provider, dt.datetime.now(dt.UTC))
    console.print(f"server {name} tries {provider} again" if begun else f"server {name} has not stopped sending to {provider}")


@app.command("dead-domains")
def dead_domains(most: Annotated[int, typer.Option(help="list no more than this")] = 50) -> None:
    """Recipient domains that do not answer, and when one message asks again. All servers leave them alone until then."""
    from rich.table import Table

    from mail_pipelines.database.engine import reading
    from mail_pipelines.delivery import domain_health

    table = Table("domain", "silent in a row", "asked again")
    with reading(open_engine()) as connection:
        for domain in domain_health.dead_domains(connection, most):
            table.add_row(domain.domain, f"{domain.failures:,}", f"{domain.dead_until:%Y-%m-%d %H:%M:%S} UTC")
    console.print(table)


class Mode(enum.StrEnum):
    CUTTHROUGH = "cutthrough"
    BURST = "burst"


@app.command("limits")
def limits(
    provider: Annotated[str, typer.Argument(help="provider group, or * for all others")],
    server: Annotated[str | None, typer.Option(help="one server; without it the default of all servers")] = None,
    connections: int = 10,
    per_second: float = 100,
    per_hour: int | None = None,
    per_day: int | None = None,
    messages_per_connection: int = 100,
    mode: Annotated[Mode, typer.Option(help="how Exim hands messages on; mail catchers know only cutthrough")] = Mode.CUTTHROUGH,
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
            "mode": mode.value,
        },
    )
    console.print(f"limits for {provider} on {server or 'all servers'} are set")
