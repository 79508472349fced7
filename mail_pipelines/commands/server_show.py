"""`server list` and `server show`: what is known of servers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rich.markup import escape

from mail_pipelines.commands.context import console, open_engine, settings

if TYPE_CHECKING:
    from sqlalchemy.engine import Connection

    from mail_pipelines.dispatch.audit import Standing
    from mail_pipelines.dispatch.servers import ServerInfo
    from mail_pipelines.provisioning.listing import Listing


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
