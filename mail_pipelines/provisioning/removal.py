"""What is done at each step of giving a server back: one that was in service, and one that could not be made. Each may be done again.

What belongs here: the work of these steps. What does not: the order (`states`), and recording (`making`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from sqlalchemy.engine import Connection

from mail_pipelines.capacity import allotments
from mail_pipelines.database.engine import reading, transact
from mail_pipelines.dispatch import registry, servers
from mail_pipelines.domains.domain import RETIRED_DAYS
from mail_pipelines.domains.records import Purpose
from mail_pipelines.provisioning import store
from mail_pipelines.provisioning.dns import records as dns
from mail_pipelines.provisioning.interfaces import Parts, ProvisioningError, Say
from mail_pipelines.provisioning.states import PATH, State, Step
from mail_pipelines.provisioning.steps import Done, Waits, hostname_of, order_of, target_of
from mail_pipelines.provisioning.store import Provision

_S = registry.ServerState


def server_of(parts: Parts, provision: Provision) -> servers.ServerInfo | None:
    """The server as sending knows it; None if it was never registered, or one of its name is somebody else's."""
    with reading(parts.engine) as connection:
        server = next((server for server in servers.all_servers(connection) if server.key == provision.key), None)
    # The state is of servers that are made here: one killed between registering and recording that has it, too.
    ours = server is not None and (server.id == provision.server_id or server.state == _S.PROVISIONING)
    return server if ours else None


def drain(parts: Parts, provision: Provision, say: Say) -> Done:
    server = server_of(parts, provision)
    if server is not None and server.state != _S.RETIRED:
        server_id, sends = server.id, server.state not in (_S.DRAINING, _S.LOST)

        def work(connection: Connection) -> None:
            if sends:
                registry.move(connection, provision.key, "drain")
            allotments.take_back(connection, server_id)

        transact(parts.engine, work)
        say(f"{provision.key} claims nothing any more")
    return PATH[provision.at], {}


def settle(parts: Parts, provision: Provision, say: Say) -> Done:
    """Retire it when nothing is in its hands and its log is read to the end; of a lost one what it had becomes unknown."""
    server = server_of(parts, provision)
    if server is not None and server.state == _S.LOST:
        _blame(parts, provision, say)
        say(f"{provision.key} is lost: {registry.retire_lost(parts.engine, provision.key):,} recipients that it had in hand are unknown")
    elif server is not None and server.state != _S.RETIRED:
        try:
            registry.retire(parts.engine, provision.key, parts.settings.server.heartbeat_seconds, parts.archive)
        except registry.ServerStateError as error:
            raise Waits(str(error)) from error
        say(f"{provision.key} has nothing in hand, and its log is read")
    return PATH[provision.at], {}


def _blame(parts: Parts, provision: Provision, say: Say) -> None:
    """Set the source aside if the host of a lost server is gone without us: the hoster has switched it off."""
    source = parts.source(provision.source or "")
    if source.find(order_of(parts, provision)) is None:
        reason = f"the host of {provision.key} is gone without having been deleted here: the hoster has switched it off"
        transact(parts.engine, lambda connection: store.put_aside(connection, source.name, reason))
        say(f"{source.name} is set aside: {reason}")


def revoke(parts: Parts, provision: Provision, say: Say) -> Done:
    if server_of(parts, provision) is not None:
        parts.credentials.take(provision.key)
        say(f"{provision.key}: its accounts and keys are ended")
    return PATH[provision.at], {}


def delete(parts: Parts, provision: Provision, say: Say) -> Done:
    """Delete its host, also one that was made by a `create` whose answer never came."""
    if provision.source is not None:
        source, order = parts.source(provision.source), order_of(parts, provision)
        found = source.find(order)
        identity = provision.host_id or (found.id if found is not None else "")
        if identity and source.reused and provision.created_at is not None:
            _take_off(parts, provision, say)
        if identity:
            source.delete(order, identity)
            say(f"{provision.key}: the host {identity} is given back")
    return PATH[provision.at], {}


def _take_off(parts: Parts, provision: Provision, say: Say) -> None:
    """Take everything off a host that the next server may get. One where that is not possible has no accounts any more, and is installed anew by the next."""
    try:
        parts.players[parts.source(provision.source or "").kind].remove(target_of(parts, provision), say)
    except ProvisioningError as error:
        say(f"{provision.key}: its host stays as it is: {error}")


def clear(parts: Parts, provision: Provision, say: Say) -> Done:
    server = server_of(parts, provision)
    if server is not None and provision.host is not None and server.kind == "exim":
        with reading(parts.engine) as connection:
            name, addresses = hostname_of(parts, provision), [provision.host.address]
            found = dns.of_gone_server(connection, server.id, name, addresses, parts.settings.dns.spf_include)
        # What it has signed is on its way for days; one that was never in service has signed nothing.
        stay = [record for record in found.own if record.purpose is Purpose.DKIM and provision.state is not State.FAILED]
        go = [record for record in found.own if record not in stay]
        parts.dns.withdraw(go)
        parts.dns.publish(found.shared)
        for record in parts.dns.missing(found.shared):
            say(f"change in the DNS: {record.zone_line()}")
        for record in go:
            say(f"not in the DNS any more, or to be removed: {record.name} {record.type}")
        for record in stay:
            say(f"to be removed from the DNS in {RETIRED_DAYS} days: {record.name} {record.type}")
    parts.credentials.clear(provision.key)
    (parts.settings.home / "secrets" / "hosts" / provision.key).unlink(missing_ok=True)
    return PATH[provision.at], {}


DO: Mapping[Step, Callable[[Parts, Provision, Say], Done]] = {
    Step.DRAIN: drain,
    Step.SETTLE: settle,
    Step.REVOKE: revoke,
    Step.DELETE: delete,
    Step.CLEAR: clear,
}
