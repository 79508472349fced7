"""What is done at each step of making a server. Each may be done again from its beginning, whatever the time before has left.

What belongs here: the work of a step, and what it brings for the row. What does not: the order (`states`), recording and failing (`making`), and the way
back (`removal`).
"""

from __future__ import annotations

import datetime as dt
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sqlalchemy.engine import Connection

from mail_pipelines.database.engine import database_now, reading, transact
from mail_pipelines.dispatch import registry, servers
from mail_pipelines.dispatch.files import replace_file
from mail_pipelines.domains import rotation
from mail_pipelines.domains import store as domains
from mail_pipelines.domains.domain import KeyState
from mail_pipelines.domains.records import dkim_record
from mail_pipelines.provisioning import dns_checks, reserving, ssh_keys, store
from mail_pipelines.provisioning.dns import records as dns
from mail_pipelines.provisioning.interfaces import CannotBeMade, Host, NoHost, Order, Parts, ProvisioningError, Say, Target
from mail_pipelines.provisioning.states import PATH, At, State, Step
from mail_pipelines.provisioning.store import Provision

# Sessions and the Exim of a server share its host.
LOOPBACK = "127.0.0.1"
EXIM_PORT = 2525
_BANNER_SECONDS = 5
# A check that every host of the same source would fail likewise, and one that a host fails by its own address.
_OF_NETWORK, _OF_ADDRESS = "port 25", "block lists"


class Waits(ProvisioningError):
    """Nothing is wrong, and nothing can be done now. `records`: lines of zone files that are waited for."""

    def __init__(self, reason: str, records: list[str] | None = None) -> None:
        super().__init__(reason)
        self.records = records


class Unfit(NoHost):
    """A host of this source cannot send, and no other one of it could."""


class Listed(CannotBeMade):
    """The address of a host is on a block list, where it stays for a while; another one of its source may be on none."""


# Where it leads and what it brings for the row; None of a step that has recorded both itself.
Done = tuple[At, Mapping[str, Any]] | None


def order_of(parts: Parts, provision: Provision) -> Order:
    """By what its host is made and found. The key of its SSH server is made once, and kept before anything is ordered."""
    place = parts.settings.home / "secrets" / "hosts" / provision.key
    if not place.exists():
        place.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        replace_file(place, ssh_keys.generate())
    return Order(provision.key, provision.host_id or "", place.read_text(encoding="ascii"))


def hostname_of(parts: Parts, provision: Provision) -> str:
    return f"{provision.key}.{parts.settings.provisioning.domain}".removesuffix(".")


def host_of(provision: Provision) -> Host:
    if provision.host is None:
        raise ProvisioningError(f"server {provision.key} has no host yet")
    return provision.host


def reserve(parts: Parts, provision: Provision, say: Say) -> Done:
    def work(connection: Connection) -> reserving.Reservation:
        reserved = reserving.reserve(connection, parts, provision)
        # With the choice itself: whoever reserves next counts this one.
        now, cost = database_now(connection), reserved.source.cost_per_hour
        store.move(connection, provision, PATH[provision.at], source=reserved.source.name, host_id=reserved.host_id or None, cost_per_hour=cost, ordered_at=now)
        return reserved

    try:
        reserved = transact(parts.engine, work)
    except reserving.Full as full:
        raise Waits(str(full)) from full
    say(f"{provision.key}: a host of {reserved.source.name}{f', {reserved.host_id}' if reserved.host_id else ''}, {reserved.source.cost_per_hour:g} an hour")
    return None


def create(parts: Parts, provision: Provision, say: Say) -> Done:
    source, order = parts.source(provision.source or ""), order_of(parts, provision)
    host = source.find(order)
    if host is not None:
        say(f"{provision.key}: the host {host.id} is there already")
    else:
        host = source.create(order)
        say(f"{provision.key}: the host {host.id} at {host.address} is made")
    values = asdict(host)
    return PATH[provision.at], {"host": values, "host_id": host.id, "created_at": _now(parts)}


def equip(parts: Parts, provision: Provision, say: Say) -> Done:
    kind = parts.source(provision.source or "").kind
    with reading(parts.engine) as connection:
        present = {server.key: server.state for server in servers.all_servers(connection)}
    if present.get(provision.key, registry.ServerState.PROVISIONING) != registry.ServerState.PROVISIONING:
        raise CannotBeMade(f"somebody else has registered a server {provision.key}")
    target, state = target_of(parts, provision), registry.ServerState.PROVISIONING.value
    server = servers.register(parts.engine, provision.key, kind=kind, host=LOOPBACK, port=target.port, now=_now(parts), pool=provision.pool, state=state)
    if kind == "exim":
        rotation.equip(parts.engine, parts.settings, server.id, _now(parts), allow_unverified=parts.settings.sending.allow_unverified)
    say(f"{provision.key}: registered, with keys of its own")
    return PATH[provision.at], {"server_id": server.id}


def play(parts: Parts, provision: Provision, say: Say) -> Done:
    kind, host = parts.source(provision.source or "").kind, host_of(provision)
    if kind == "exim":
        _wait_for_ssh(host, parts.settings.provisioning.boot_seconds)
    # Passwords that are given anew are those that the play installs, so it may be repeated.
    files = parts.credentials.give(provision.key, kind)
    parts.players[kind].play(target_of(parts, provision, files), say)
    return PATH[provision.at], {}


def target_of(parts: Parts, provision: Provision, files: Sequence[Path] = ()) -> Target:
    host = host_of(provision)
    port = host.port if parts.source(provision.source or "").kind == "catcher" else EXIM_PORT
    return Target(provision.key, hostname_of(parts, provision), host, port, files)


def publish(parts: Parts, provision: Provision, say: Say) -> Done:
    """Publish its records and take its keys into use; `Waits` while resolvers do not see them."""
    if parts.source(provision.source or "").kind != "exim":
        return PATH[provision.at], {}
    settings, address, hostname = parts.settings, host_of(provision).address, hostname_of(parts, provision)
    unverified = settings.sending.allow_unverified
    with reading(parts.engine) as connection:
        server, now = servers.find(connection, provision.key), database_now(connection)
        records = dns.of_server(connection, server.id, hostname, [address], settings.dns.spf_include, now).all
        sending = domains.all_domains(connection)
    parts.dns.publish(records)
    lines = [] if unverified else [record.zone_line() for record in parts.dns.missing(records)]
    if not lines:
        steps = rotation.equip(parts.engine, settings, server.id, now, allow_unverified=unverified)
        lines = [dkim_record(step.domain, step.key).zone_line() for step in steps if step.key.state is KeyState.WAITING]
    if not lines and not unverified and (policy := dns_checks.sender_policy(settings.dns, provision.key, [address], sending)).ok is False:
        # A return path that does not include the shared record, or has its own.
        lines = [policy.text]
    if lines:
        waited = _now(parts) - provision.state_at
        if waited > dt.timedelta(hours=parts.settings.provisioning.dns_hours):
            raise CannotBeMade(f"its DNS records have not appeared within {parts.settings.provisioning.dns_hours:g} h: {'; '.join(lines)}")
        raise Waits(f"{len(lines)} DNS records are not to be seen yet: publish them, it goes on by itself", lines)
    say(f"{provision.key}: all {len(records)} DNS records are to be seen")
    return PATH[provision.at], {}


def verify(parts: Parts, provision: Provision, say: Say) -> Done:
    findings = parts.verify[parts.source(provision.source or "").kind](target_of(parts, provision))
    for finding in findings:
        say(f"{provision.key}: {finding.name}: {finding.word}, {finding.text}")
    failed = {finding.name: finding.text for finding in findings if finding.ok is False}
    if failed:
        kind = Unfit if _OF_NETWORK in failed else Listed if _OF_ADDRESS in failed else ProvisioningError
        raise kind("; ".join(f"{name}: {text}" for name, text in failed.items()))
    return PATH[provision.at], {}


def serve(parts: Parts, provision: Provision, say: Say) -> Done:
    """Let it claim: as one that warms up where there is warm-up and its address needs it."""

    def work(connection: Connection) -> str:
        # A repetition finds it in service.
        if servers.find(connection, provision.key).state == registry.ServerState.PROVISIONING:
            registry.move(connection, provision.key, "serve")
            if parts.warm_up is not None and (curve := parts.source(provision.source or "").curve):
                parts.warm_up(connection, provision.key, curve)
        return servers.find(connection, provision.key).state

    to = At(State.WARMING, Step.NONE) if transact(parts.engine, work) == State.WARMING else PATH[provision.at]
    say(f"{provision.key} is {to.state}")
    return to, {}


DO: Mapping[Step, Callable[[Parts, Provision, Say], Done]] = {
    Step.RESERVE: reserve,
    Step.CREATE: create,
    Step.EQUIP: equip,
    Step.PLAY: play,
    Step.PUBLISH: publish,
    Step.VERIFY: verify,
    Step.SERVE: serve,
}


def _now(parts: Parts) -> dt.datetime:
    with reading(parts.engine) as connection:
        return database_now(connection)


def _wait_for_ssh(host: Host, seconds: float) -> None:
    """Until an SSH server answers there. Raises `ProvisioningError`."""
    end, last = time.monotonic() + seconds, ""
    while True:
        try:
            with socket.create_connection((host.address, host.port), timeout=_BANNER_SECONDS) as connection:
                if connection.recv(4).startswith(b"SSH"):
                    return
                last = "what answers is no SSH server"
        except OSError as error:
            last = error.strerror or str(error)
        if time.monotonic() > end:
            raise ProvisioningError(f"the host {host.id} does not answer by SSH at {host.address} port {host.port} for {seconds:.0f} s: {last}")
        time.sleep(0.2)
