"""Dispatch servers."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from mail_pipelines.commands.context import console, open_engine, settings

if TYPE_CHECKING:
    from sqlalchemy.engine import Connection

    from mail_pipelines.dispatch.audit import Standing
    from mail_pipelines.dispatch.servers import ServerInfo
    from mail_pipelines.provisioning.listing import Listing

app = typer.Typer(no_args_is_help=True, help=__doc__)


@app.command("list")
def list_servers() -> None:
    """All servers with state, heartbeat and the alarms in their logs."""
    from rich.table import Table

    from mail_pipelines.database.engine import database_now, reading
    from mail_pipelines.dispatch import audit, holds, pools, servers

    table = Table("server", "kind", "pool", "address", "state", "heartbeat", "alarms")
    # What an operator copies stays in one piece, however narrow the terminal is.
    for column in table.columns[:4]:
        column.no_wrap, column.overflow = True, "fold"
    with reading(open_engine()) as connection:
        now = database_now(connection)
        audits = audit.standings(connection)
        held = holds.in_force(connection)
        keys = pools.keys(connection)
        listed = {key for key, found in _listings(connection).items() if found.listed}
        drained = _drained(connection)
        for server in servers.all_servers(connection):
            silent = server.is_silent(now, settings().server.heartbeat_seconds)
            beat = "never" if server.heartbeat_at is None else f"{(now - server.heartbeat_at).total_seconds():.0f} s ago"
            notes = (
                " (held)" if held.over_server(server.id, server.pool_id)
                else " (taken out)" if server.key in drained
                else " (block-listed)" if server.key in listed
                else ""
            )  # fmt: skip
            table.add_row(
                server.key,
                server.kind,
                keys[server.pool_id],
                f"{server.host}:{server.port}",
                f"{server.state}{notes}",
                f"{beat}{' (silent)' if silent else ' (log disk full)' if server.shortage else ' (clock is off)' if server.clock_error else ''}",
                _alarms(audits.get(server.key)),
            )
        making = _making(connection)
    console.print(table)
    for key, why in drained.items():
        console.print(f"{key} was taken out of service: {why}; `mail-pipelines server activate {key}` takes it back", markup=False, highlight=False)
    for key, standing in making.items():
        console.print(f"{key} is being made: {standing}; `mail-pipelines server provisions`", markup=False, highlight=False)


def _making(connection: Connection) -> Mapping[str, str]:
    """Where each server is that is being made. Only the centre may read it."""
    from mail_pipelines.provisioning import store

    return {one.key: one.standing for one in store.making(connection)} if settings().this_server is None else {}


def _drained(connection: Connection) -> Mapping[str, str]:
    """Servers that were drained by themselves, and why. Only the centre may read it."""
    from mail_pipelines.capacity import health

    if settings().this_server is not None:
        return {}
    return {key: f"{record.why} ({record.at:%Y-%m-%d %H:%M} UTC)" for key, record in health.drained(connection).items()}


def _health(health: Mapping[str, Any]) -> dict[str, str]:
    """What the last heartbeat told."""
    from mail_pipelines.dispatch import clock

    found = {}
    if "release" in health:
        found["mail_pipelines"] = str(health["release"])
    if "version" in health:
        found["mail server"] = str(health["version"])
    if "hostname" in health:
        found["sends as"] = f"{health['hostname']}, from {', '.join(health['addresses']) or 'no address with a route to the world'}"
    if "load" in health:
        found["load"] = f"{health['load']:.2f}"
        found["disk of its log"] = f"{health['free_mb']:,} MB free"
    if "clock_ahead" in health:
        remedy = f": {clock.REMEDY}" if clock.error("it", health["clock_ahead"]) else ""
        found["clock"] = f"{clock.words(health['clock_ahead'])}{remedy}"
    if "queue" in health:
        found["queue"] = f"{health['queue']:,} messages"
    if error := health.get("error"):
        found["last error"] = f"{error['at']} {error['what']}: {error['text']}"
    return found


def _listings(connection: Connection) -> Mapping[str, Listing]:
    """What block lists said of each server. A server's own account does not see it."""
    from mail_pipelines.provisioning import listing

    return listing.listings(connection) if settings().this_server is None else {}


def _shipped(server: ServerInfo) -> str:
    """How far its log is in the archive, by the last heartbeat; empty without an archive."""
    import datetime as dt

    from mail_pipelines.dispatch import registry

    shipped = (server.health or {}).get("shipped")
    if shipped is None:
        return ""
    at = f"{dt.datetime.fromtimestamp(shipped['at'], dt.UTC):%Y-%m-%d %H:%M:%S} UTC" if shipped["at"] else "never"
    return f"shipped {at}{f', {reason}' if (reason := registry.unshipped(server)) else ', to its end'}"


def _alarms(standing: Standing | None) -> str:
    """How often the mail server did what it should never have to do, as far as its log was audited."""
    if standing is None:
        return "not audited"
    count = standing.totals.get("alarms", 0)
    return f"{count:,}, last found {standing.last_alarm_at:%Y-%m-%d %H:%M} UTC" if standing.last_alarm_at else f"{count:,}"


@app.command("show")
def show(name: str) -> None:
    """One server: its state and health, its warm-up, which providers it has stopped sending to, and what the audits of its log have found so far."""
    from rich.table import Table

    from mail_pipelines.capacity import breakers, verdicts, warm_up
    from mail_pipelines.database.engine import database_now, reading
    from mail_pipelines.dispatch import audit, holds, pools, registry, servers, token_keys

    interval = settings().server.heartbeat_seconds
    with reading(open_engine()) as connection:
        server = servers.find(connection, name)
        now = database_now(connection)
        silent = server.is_silent(now, interval)
        claims = registry.open_claims(connection, server.id)
        pool = pools.keys(connection)[server.pool_id]
        draining = server.state == registry.ServerState.DRAINING
        left = registry.left(connection, server, interval) if draining else []
        standing = audit.standings(connection).get(name)
        listed = _listings(connection).get(name)
        hold = holds.in_force(connection).over_server(server.id, server.pool_id)
        stopped = [breaker for breaker in breakers.all_breakers(connection) if breaker.server_id == server.id and breaker.state != breakers.CLOSED]
        # Only the centre may read them.
        warming = warm_up.standings(connection, now, server.id) if settings().this_server is None else []
        making = _making(connection).get(name)
        drained = _drained(connection).get(name)
        verdict = verdicts.standing(connection, now).get(name) if settings().this_server is None else None
    table = Table(show_header=False, box=None)
    table.add_row("server", server.key)
    table.add_row("kind", server.kind)
    table.add_row("pool", pool)
    table.add_row("address", f"{server.host}:{server.port}")
    table.add_row("state", "drained" if draining and not claims else server.state)
    if making is not None:
        table.add_row("being made", escape(making))
    if drained is not None:
        table.add_row("taken out of service", escape(drained))
    if verdict is not None:
        table.add_row("kept" if verdict.keep else "not needed", escape(verdict.why))
    for reason in left:
        table.add_row("before it retires", reason)
    if hold is not None:
        table.add_row("held", escape(f"{hold} ({hold.by})"))
    table.add_row("heartbeat", f"{server.heartbeat_at:%Y-%m-%d %H:%M:%S} UTC{' (silent)' if silent else ''}" if server.heartbeat_at else "never")
    if server.shortage:
        table.add_row("sends nothing", server.shortage)
    # Only the centre has the key by which others are told.
    if settings().this_server is None and (key := token_keys.in_use(server, settings().token_key())):
        table.add_row("token key", key)
    for what, value in _health(server.health or {}).items():
        table.add_row(what, escape(value))
    if shipped := _shipped(server):
        table.add_row("log archive", escape(shipped))
    table.add_row("open claims", f"{claims:,}")
    if listed is not None:
        words = "; ".join((*listed.listed, *listed.unknown)) or "on none"
        table.add_row("block lists", escape(f"{words} ({listed.at:%Y-%m-%d %H:%M} UTC)"))
    for pair in warming:
        table.add_row(f"warm-up to {pair.provider}", f"{pair.words}; {pair.reason}")
    for breaker in stopped:
        until = f" until {breaker.until:%Y-%m-%d %H:%M} UTC" if breaker.until else ""
        table.add_row(f"to {breaker.provider}", f"{'stopped' if breaker.state == breakers.OPEN else 'on trial'}{until}, {breaker.reason}")
    table.add_row("alarms", _alarms(standing))
    if standing is not None and standing.audited_at is not None:
        table.add_row("audited", f"{standing.audited_at:%Y-%m-%d %H:%M:%S} UTC{', new lines since' if audit.unread(server, standing) else ''}")
        for count_of, count in standing.totals.items():
            if count and count_of != "alarms":
                table.add_row(count_of.replace("_", " "), f"{count:,}")
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
    pool: Annotated[str | None, typer.Option(help="its pool; without it the default one")] = None,
    curve: Annotated[str, typer.Option("--warm-up", help="curve by which a new address is warmed up: careful, normal, fast, manual")] = "none",
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
