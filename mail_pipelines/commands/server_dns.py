"""`server dns`: a server's records in the DNS."""

from __future__ import annotations

import datetime as dt
from typing import TYPE_CHECKING, Annotated

import typer

from mail_pipelines.commands.context import console, open_engine, settings

if TYPE_CHECKING:
    from mail_pipelines.dispatch.servers import ServerInfo


def dns(
    name: str,
    publish: Annotated[bool, typer.Option("--publish", help="publish what is missing, as dns.publisher says")] = False,
    withdraw: Annotated[bool, typer.Option("--withdraw", help="remove the server's own records, and its addresses from the shared one")] = False,
    hostname: Annotated[str | None, typer.Option(help="name that it greets with [default: what its last heartbeat told]")] = None,
    address: Annotated[list[str] | None, typer.Option(help="address that it sends from, may be repeated [default: what its last heartbeat told]")] = None,
) -> None:
    """The records of server NAME as lines of a zone file, and which of them resolvers do not see; exit status 1 while any is missing."""
    from mail_pipelines.database.engine import reading
    from mail_pipelines.dispatch import servers
    from mail_pipelines.provisioning.dns import records
    from mail_pipelines.provisioning.dns.publishers import publisher_of

    include = settings().dns.spf_include
    publisher = publisher_of(settings().dns)
    with reading(open_engine()) as connection:
        server = servers.find(connection, name)
        told = _told(server, hostname, address)
        now = dt.datetime.now(dt.UTC)
        gone = records.of_gone_server(connection, server.id, *told, include) if withdraw else None
        found = gone or records.of_server(connection, server.id, *told, include, now)
    if withdraw:
        publisher.withdraw(found.own)
        publisher.publish(found.shared)
        for record in found.own:
            typer.echo(f"; withdrawn, or to be removed by hand: {record.zone_line()}")
        return
    missing = publisher.missing(found.all)
    if publish and missing:
        # All: a name's addresses are one set, and those that are there already belong to it.
        publisher.publish(found.all)
        missing = publisher.missing(found.all)
    for record in found.all:
        typer.echo(record.zone_line())
    if not missing:
        console.print(f"resolvers see all {len(found.all)} records of server {name}", markup=False, highlight=False)
        return
    console.print(
        f"{len(missing)} of {len(found.all)} records are not seen yet: {', '.join(f'{record.type} of {record.name}' for record in missing)}", markup=False
    )
    raise typer.Exit(1)


def _told(server: ServerInfo, hostname: str | None, addresses: list[str] | None) -> tuple[str, list[str]]:
    """Name and addresses as given, or else as the server's heartbeat told them. Raises `DnsError` if neither has."""
    from mail_pipelines.provisioning.dns.records import DnsError, is_public

    health = server.health or {}
    name, found = hostname or health.get("hostname"), addresses or [text for text in health.get("addresses", ()) if is_public(text)]
    if not (name and found):
        raise DnsError(f"server {server.key} has not told by which name and from which public address it sends: give --hostname and --address")
    return name, found
