"""Contacts, lists and suppressions."""

from __future__ import annotations

import datetime as dt
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from mail_pipelines.commands.context import console, open_engine
from mail_pipelines.errors import MailPipelinesError

if TYPE_CHECKING:
    import sqlalchemy as sa

app = typer.Typer(no_args_is_help=True, help=__doc__)

Address = Annotated[str, typer.Argument(help="an e-mail address")]


class UsageError(MailPipelinesError):
    """Options that do not say what is wanted."""


@app.command("import")
def import_(
    file: Annotated[Path, typer.Argument(help="CSV (UTF-8, with a header) or Parquet")],
    list_: Annotated[str, typer.Option("--list", help="name of the list; made if there is none")],
    map_: Annotated[list[str] | None, typer.Option("--map", help="column=field; column=email has the addresses, column= is left out")] = None,
    field: Annotated[list[str] | None, typer.Option("--field", help="field=text|number|boolean|date|datetime")] = None,
) -> None:
    """Import contacts into a list. Nobody who unsubscribed is subscribed again. Can be run again at any time."""
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

    from mail_pipelines.contacts.fields import check_type
    from mail_pipelines.contacts.importing import import_file

    mapping = dict(_pair("--map", "column=field", text) for text in map_ or [])
    types = {key: check_type(type_) for key, type_ in (_pair("--field", "field=type", text) for text in field or [])}
    engine, now = open_engine(), dt.datetime.now(dt.UTC)
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), TaskProgressColumn(), TextColumn("{task.fields[rows]:,} rows"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(file.name, total=1.0, rows=0)
        report = import_file(
            engine, file, list_name=list_, mapping=mapping, types=types, now=now, progress=lambda rows, share: bar.update(task, completed=share, rows=rows)
        )
    console.print(
        f"{report.read:,} rows read into list {report.list_key}: {report.inserted:,} new, {report.updated:,} changed, {report.unchanged:,} unchanged, "
        f"{report.duplicates:,} duplicates, {report.rejected:,} rejected",
        markup=False,
    )
    if report.reject_file:
        console.print(f"lines and reasons of the rejected rows: {report.reject_file}", markup=False, style="yellow")


@app.command()
def show(email: Address) -> None:
    """Everything known of one address: fields, lists, suppressions, recent deliveries."""
    from mail_pipelines.contacts import lookup
    from mail_pipelines.database.engine import reading

    with reading(open_engine()) as connection:
        found = lookup.profile(connection, email)
    table = Table(title=escape(found.address), show_header=False)
    if found.contact_id is None:
        table.add_row("contact", "none (erased, or never imported)")
    else:
        table.add_row("contact", f"{found.contact_id}, since {found.created_at:%Y-%m-%d}, provider {found.provider}")
        if found.time_zone:
            table.add_row("time_zone", found.time_zone)
    for key, value in found.attributes.items():
        table.add_row(key, escape(str(value)))
    console.print(table)
    _print("lists", [(row.list_key, "subscribed" if row.subscribed else "ended", row.source, f"{row.changed_at:%Y-%m-%d %H:%M}") for row in found.lists])
    _print("suppressed", [(row.of, row.where, row.reason, f"{row.created_at:%Y-%m-%d %H:%M}") for row in found.suppressions])
    _print("bounces in another system", [(row.kind, f"{row.occurred_at:%Y-%m-%d}", row.reply) for row in found.bounces])
    _print("deliveries", [(row.campaign_key, row.state.name.lower(), f"attempt {row.attempt}", row.reply) for row in found.deliveries])


def _print(title: str, rows: list[tuple[str, ...]]) -> None:
    if rows:
        table = Table(title=title, show_header=False)
        for row in rows:
            table.add_row(*map(escape, row))
        console.print(table)


@app.command()
def suppress(
    target: Annotated[str, typer.Argument(metavar="ADDRESS_OR_DOMAIN", help="an e-mail address, or a domain for all its addresses")],
    reason: Annotated[str, typer.Option(help="manual, bounce, unsubscribe or complaint")] = "manual",
) -> None:
    """Never mail an address, or anybody at a domain, again."""
    from mail_pipelines.contacts import consent
    from mail_pipelines.contacts.addresses import parse
    from mail_pipelines.database.engine import transact

    def work(connection: sa.Connection) -> bool:
        if "@" in target:
            return consent.suppress(connection, [parse(target).hash], reason=reason, now=now) == 1
        return consent.suppress_domain(connection, target, reason=reason, now=now)

    now = dt.datetime.now(dt.UTC)
    console.print("suppressed" if transact(open_engine(), work) else "was suppressed already")


@app.command()
def unsubscribe(
    email: Address,
    list_: Annotated[str | None, typer.Option("--list", help="name of the list to leave")] = None,
    all_: Annotated[bool, typer.Option("--all", help="leave everything")] = False,
) -> None:
    """End a contact's subscription to one list, or to everything."""
    from mail_pipelines.contacts import consent, lists, lookup
    from mail_pipelines.database.engine import transact

    if (list_ is None) == (not all_):
        raise UsageError("say what to leave: either --list NAME or --all")

    def work(connection: sa.Connection) -> None:
        contact_id = lookup.contact_id_of(connection, email)
        if list_ is None:
            consent.unsubscribe(connection, [contact_id], scope="all", now=now)
        else:
            consent.unsubscribe(connection, [contact_id], scope="list", scope_id=lists.get(connection, list_).id, now=now)

    now = dt.datetime.now(dt.UTC)
    transact(open_engine(), work)
    console.print("unsubscribed")


@app.command()
def erase(email: Address, yes: Annotated[bool, typer.Option("--yes", help="do not ask")] = False) -> None:
    """Forget a person for good. Only a hash of the address is kept, so that no import brings it back."""
    from mail_pipelines.contacts import consent, lookup
    from mail_pipelines.database.engine import transact

    if not yes:
        typer.confirm("Erase this contact? It cannot be undone.", abort=True)
    now = dt.datetime.now(dt.UTC)
    transact(open_engine(), lambda connection: consent.erase(connection, lookup.contact_id_of(connection, email), now=now))
    console.print("erased")


def _pair(option: str, form: str, text: str) -> tuple[str, str]:
    left, sign, right = text.partition("=")
    if not left or not sign:
        raise UsageError(f"{option} {text!r}: expected {form}")
    return left.strip(), right.strip()
