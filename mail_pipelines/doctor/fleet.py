"""The servers: whether they speak, can sign and send; by what they told, and what `server verify` last found of them."""

from __future__ import annotations

from collections.abc import Iterator

import sqlalchemy as sa
from sqlalchemy.engine import Engine

from mail_pipelines import __version__, config
from mail_pipelines.capacity import breakers, health
from mail_pipelines.database.engine import database_now, reading
from mail_pipelines.dispatch import clock, servers, token_keys
from mail_pipelines.dispatch.exim import instance
from mail_pipelines.dispatch.recovery import standing
from mail_pipelines.dispatch.registry import ServerState
from mail_pipelines.dispatch.token_keys import InUse
from mail_pipelines.doctor.finding import SHOWN, Finding, names
from mail_pipelines.domains import store
from mail_pipelines.provisioning import last_verified, listing
from mail_pipelines.runbook import Chapter


def check_servers(engine: Engine, heartbeat_seconds: float, *, is_centre: bool = True) -> Iterator[Finding]:
    """Servers in service. A server sees only itself."""
    with reading(engine) as connection:
        active = [server for server in servers.all_servers(connection) if server.sends]
        now = database_now(connection)
        recovery = standing.newest(connection)
    if recovery is not None and recovery.is_open:
        yield Finding(
            "recovery",
            "the database is being recovered: nothing is sent",
            f"run `mail-pipelines recover`; it says which logs it awaits ({Chapter.RESTORED.place})",
        )
    if is_centre and not active:
        yield Finding("servers", "no dispatch server is active: nothing can be sent", "`mail-pipelines up` starts built-in catchers")
    silent = [server.key for server in active if server.is_silent(now, heartbeat_seconds)]
    if silent:
        yield Finding(
            "servers",
            f"{len(silent)} of {len(active)} active servers are silent: {names(silent)}",
            "start them (`mail-pipelines up` starts built-in catchers), or look into their logs",
        )
    if other := [f"{server.key} ({release})" for server in active if (release := (server.health or {}).get("release", __version__)) != __version__]:
        yield Finding("servers", f"not of this version ({__version__}): {names(other)}", "upgrade the centre first, then its servers")
    for server in [server for server in active if server.shortage and server.key not in silent][:SHOWN]:
        yield Finding("servers", server.shortage, f"make room on that disk, sending goes on by itself; {Chapter.DISK_FULL.place}")
    for server in [server for server in active if server.clock_error and server.key not in silent][:SHOWN]:
        yield Finding("clock", server.clock_error, clock.REMEDY)


def check_server_keys(connection: sa.Connection, settings: config.Settings) -> Iterator[Finding]:
    """Servers on hosts of their own: each has a token key that makes tokens of its own mail alone, and DKIM keys that it can open by that."""
    if not settings.sending.token_key:
        return
    remote = token_keys.remote(connection)
    uses = {server.key: token_keys.in_use(server, settings.token_key()) for server in remote}
    if shared := [key for key, use in uses.items() if use is InUse.INSTALLATION]:
        yield Finding(
            "token key",
            f"who steals {names(shared)} can unsubscribe everybody: the installation's token key is there",
            "drain each, then `mail-pipelines server account NAME`, which says what to copy there",
        )
    if foreign := [key for key, use in uses.items() if use is InUse.FOREIGN]:
        yield Finding(
            "token key",
            f"{names(foreign)}: bounces and links of its mail are not recognised, since its token key is none of this installation",
            "pause each, then `mail-pipelines server account NAME`, which says what to copy there",
        )
    lacking = store.without_key(connection, [server.id for server in token_keys.with_own(remote, settings.token_key())])
    for server in [server for server in remote if server.id in lacking][:SHOWN]:
        yield Finding(
            "DKIM keys",
            f"server {server.key} sends nothing from {names(lacking[server.id])}: it has no DKIM key of its own there",
            f"`mail-pipelines server dkim {server.key}`",
        )


def check_sending(connection: sa.Connection, *, is_centre: bool) -> Iterator[Finding]:
    """Of each server in service what keeps its mail from leaving or from being taken. Only the centre has what it has found itself."""
    at_centre = last_verified.at_centre(connection) if is_centre else {}
    listings = listing.listings(connection) if is_centre else {}
    for key, record in (health.drained(connection) if is_centre else {}).items():
        yield Finding("servers", f"server {key} was taken out of service: {record.why}", f"find the cause, then `mail-pipelines server activate {key}`")
    if is_centre and (words := health.trouble(connection)):
        yield Finding("servers", words, "look at what the campaigns send, and hold them: `mail-pipelines campaign list`")
    stopped = [breaker for breaker in breakers.all_breakers(connection) if breaker.state != breakers.CLOSED] if is_centre else []
    for server in servers.all_servers(connection):
        if not server.sends and server.state != ServerState.DRAINING:
            continue
        version = str((server.health or {}).get("version", ""))
        if instance.is_too_old(version):
            needed = ".".join(map(str, instance.OLDEST))
            yield Finding("servers", f"server {server.key} runs {version}: it needs {needed} at least", "upgrade exim4-daemon-light on its host")
        for where, verified in (("on its host", last_verified.on_host(server)), ("at the centre", at_centre.get(server.key))):
            if verified is None:
                continue
            for name, text in verified.failed.items():
                problem = f"server {server.key}: {name} failed at {verified.at:%Y-%m-%d %H:%M} UTC: {text}"
                yield Finding("verify", problem, f"correct it, then `mail-pipelines server verify {server.key}` {where}")
        for text in listings[server.key].listed if server.key in listings else ():
            yield Finding("block lists", f"server {server.key}: {text}", Chapter.LISTED.place)
        for breaker in stopped:
            if breaker.server_id == server.id:
                what = "has stopped sending" if breaker.state == breakers.OPEN else "is on trial"
                problem = f"server {server.key} {what} to {breaker.provider} ({breaker.reason})"
                yield Finding("breakers", problem, f"it tries again by itself; {Chapter.BLOCKED.place}")
