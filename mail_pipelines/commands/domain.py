"""Sending domains: DKIM keys, the DNS records to publish, and whether they are published."""

from __future__ import annotations

import datetime as dt
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from mail_pipelines.commands.context import console, open_engine, settings

if TYPE_CHECKING:
    import sqlalchemy as sa

    from mail_pipelines.domains.domain import SendingDomain, Verdict
    from mail_pipelines.domains.records import Record

app = typer.Typer(no_args_is_help=True, help=__doc__)

Domain = Annotated[str, typer.Argument(help="domain of From addresses")]


def _now() -> dt.datetime:
    return dt.datetime.now(dt.UTC)


def _time(moment: dt.datetime) -> str:
    return f"{moment:%Y-%m-%d %H:%M:%S} UTC"


def _records(engine: sa.Engine, domain: SendingDomain) -> list[Record]:
    from mail_pipelines.database.engine import reading
    from mail_pipelines.domains import records, store

    with reading(engine) as connection:
        hosts = records.Hosts.of(settings(), store.sending_hosts(connection))
    return records.records_of(domain, hosts, _now())


@app.command()
def add(
    domain: Domain,
    return_path: Annotated[str | None, typer.Option(help="domain of the envelope sender, which takes bounces [default: bounces.DOMAIN]")] = None,
    tracking: Annotated[str | None, typer.Option(help="host of unsubscribe and tracking links [default: links.DOMAIN]")] = None,
) -> None:
    """Register a domain, make its first DKIM keys, and print the records to publish."""
    from mail_pipelines.domains import domain as domains
    from mail_pipelines.domains import store

    engine = open_engine()
    added = store.add(engine, domains.Names.of(domain, return_path, tracking), settings().token_key(), _now())
    for record in _records(engine, added):
        typer.echo(record.zone_line())
    console.print(f"publish these records, then run: mail-pipelines domain check {added.names.domain}", markup=False)


@app.command()
def show(domain: Domain) -> None:
    """A domain's names and keys, and its records as lines of a zone file."""
    from mail_pipelines.database.engine import reading
    from mail_pipelines.dispatch import servers
    from mail_pipelines.domains import store

    engine = open_engine()
    with reading(engine) as connection:
        found = store.load(connection, domain)
        server_keys = {server.id: server.key for server in servers.all_servers(connection)}
    lines = {"return path": found.names.return_path_domain, "tracking": found.names.tracking_domain, "last check": _summary(found.verdict)}
    for key in found.keys:
        scope = f", for server {server_keys.get(key.server_id, key.server_id)}" if key.server_id else ""
        until = f"; its record may go after {_time(key.published_until)}" if key.published_until else ""
        lines[f"key {key.selector}"] = f"{key.state}, made {_time(key.created_at)}{scope}{until}"
    for name, value in lines.items():
        # A comment of a zone file, so that the whole output can be pasted.
        typer.echo(f"; {name}: {value}")
    for record in _records(engine, found):
        typer.echo(record.zone_line())


@app.command("list")
def list_() -> None:
    """All sending domains with their last check."""
    from mail_pipelines.database.engine import reading
    from mail_pipelines.domains import store
    from mail_pipelines.domains.domain import KeyState

    table = Table("domain", "signs with", "last check")
    with reading(open_engine()) as connection:
        for domain in store.all_domains(connection):
            active = ", ".join(key.selector for key in domain.keys if key.state is KeyState.ACTIVE)
            table.add_row(domain.names.domain, active, _summary(domain.verdict))
    console.print(table)


@app.command()
def check(domain: Domain) -> None:
    """Look up each record: what was expected, what was found; exit status 1 if no campaign may start from the domain."""
    from mail_pipelines.domains import checking
    from mail_pipelines.domains.domain import Status

    verdict = checking.check(open_engine(), settings(), domain, _now())
    colours = {Status.PUBLISHED: "green", Status.MISSING: "red", Status.DIFFERENT: "red", Status.UNKNOWN: "yellow"}
    table = Table("record", "expected", "found", "", show_lines=True)
    for finding in verdict.findings:
        needed = " (required)" if finding.required else ""
        table.add_row(
            f"{finding.purpose}{needed}\n{finding.type} of {finding.name}",
            escape(finding.expected),
            escape("\n".join(finding.found) or "nothing"),
            f"[{colours[finding.status]}]{finding.status}[/]" + (f"\n{escape(finding.advice)}" if finding.advice else ""),
        )
    console.print(table)
    console.print(_summary(verdict), markup=False)
    if verdict.hindrances:
        raise typer.Exit(1)


@app.command()
def rotate(
    domain: Domain,
    server: Annotated[str | None, typer.Option(help="the key of one server; without it the key of all that have none of their own")] = None,
    allow_unverified: Annotated[bool, typer.Option("--allow-unverified", help="take the new key into use whatever the DNS has: for test domains")] = False,
) -> None:
    """Change the DKIM key: the first time makes the new key, the second time, once it is published, takes it into use."""
    from mail_pipelines.database.engine import reading
    from mail_pipelines.dispatch import servers
    from mail_pipelines.domains import records, rotation
    from mail_pipelines.domains.domain import ALL_SERVERS, RETIRED_DAYS, KeyState

    engine = open_engine()
    server_id = ALL_SERVERS
    if server is not None:
        with reading(engine) as connection:
            server_id = servers.find(connection, server).id
    step = rotation.rotate(engine, settings(), domain, _now(), server_id=server_id, allow_unverified=allow_unverified)
    if step.key.state is KeyState.WAITING:
        typer.echo(records.dkim_record(step.domain, step.key).zone_line())
        console.print(f"publish this record, then run the same command again to sign with {step.key.selector}", markup=False)
        return
    console.print(f"mail from {step.domain} is signed with {step.key.selector} now", markup=False)
    if step.retired is not None:
        console.print(f"leave the record of {step.retired.selector} published for {RETIRED_DAYS} days", markup=False)


def _summary(verdict: Verdict | None) -> str:
    if verdict is None:
        return "never checked"
    hindrances = verdict.hindrances
    answer = "campaigns may start" if not hindrances else f"not usable: {', '.join(dict.fromkeys(finding.purpose for finding in hindrances))}"
    return f"{answer} ({_time(verdict.checked_at)})"
