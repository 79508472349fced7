"""Recipients whose outcome nobody recorded: list, look, decide."""

from __future__ import annotations

import datetime as dt
import enum
import getpass
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from mail_pipelines.commands.context import console, open_engine, settings

app = typer.Typer(no_args_is_help=True, help=__doc__)

Campaign = Annotated[str | None, typer.Option("--campaign", help="key of a campaign")]
ClaimId = Annotated[int | None, typer.Option("--claim", help="id of a claim")]
ContactId = Annotated[int | None, typer.Option("--contact", help="id of a recipient, with --campaign or --claim")]


class As(enum.StrEnum):
    DELIVERED = "delivered"
    RESEND = "resend"
    UNRESOLVED = "unresolved"


def _time(moment: dt.datetime | None) -> str:
    return f"{moment:%Y-%m-%d %H:%M:%S} UTC" if moment else ""


@app.command("list")
def list_(
    campaign: Campaign = None,
    claim: ClaimId = None,
    limit: Annotated[int, typer.Option(min=1, help="how many recipients at most")] = 50,
) -> None:
    """Unknown recipients of a campaign or claim; without either, the campaigns that have any."""
    from mail_pipelines.campaigns import unknown
    from mail_pipelines.database.engine import reading

    with reading(open_engine()) as connection:
        if campaign is None and claim is None:
            table = Table("campaign", "unknown")
            table.columns[1].justify = "right"
            for key, count in unknown.with_doubts(connection).items():
                table.add_row(key, f"{count:,}")
            console.print(table)
            return
        found = unknown.doubts(connection, unknown.scope_of(connection, campaign=campaign, claim_id=claim), limit)
    table = Table("contact", "address", "provider", "since", "server", "claim", "why", "sent again")
    for doubt in found:
        again = "yes" if doubt.sent_again else ""
        claimed = str(doubt.claim_id or "")
        table.add_row(str(doubt.contact_id), escape(doubt.address), doubt.provider, _time(doubt.since), doubt.server, claimed, doubt.reason, again)
    console.print(table)


@app.command()
def show(campaign: Annotated[str, typer.Argument(help="key of a campaign")], contact: Annotated[int, typer.Argument(help="id of a recipient")]) -> None:
    """The evidence about one unknown recipient: claim, events, and the lines of its server's log if that is on this host."""
    from mail_pipelines import config
    from mail_pipelines.campaigns import unknown

    members = config.members()
    found = unknown.evidence(open_engine(), lambda server: members.get(server, settings()), campaign, contact, dt.datetime.now(dt.UTC))
    doubt = found.doubt
    lines = [
        f"{doubt.address} ({doubt.provider}), attempt {doubt.attempt}, unknown since {_time(doubt.since)}: {doubt.reason}",
        f"claim {doubt.claim_id} on {doubt.server}, opened {_time(found.opened_at)}, closed {_time(found.closed_at)}, run {found.run_id}"
        if found.opened_at
        else "its claim is not kept any more",
    ]
    for event in found.events:
        words = " ".join(str(part) for part in (event.code, event.enhanced, event.reason, event.text) if part)
        lines.append(f"{_time(event.at)} {event.kind} (attempt {event.attempt}) {words}")
    if found.lines is None:
        lines.append(f"the log of {doubt.server} is not on this host: ask there")
    else:
        lines += found.lines or ["no line of the log names the message"]
    for line in lines:
        console.print(line, markup=False)


@app.command()
def resolve(
    as_: Annotated[As, typer.Option("--as", help="`delivered` and `unresolved` end them, `resend` offers each once more under the same Message-ID")],
    why: Annotated[str, typer.Option(help="the reason, kept with each recipient")],
    campaign: Campaign = None,
    claim: ClaimId = None,
    contact: ContactId = None,
    yes: Annotated[bool, typer.Option("--yes", help="resend although somebody may get a second copy")] = False,
) -> None:
    """Decide about the unknown recipients of a campaign or claim, or about one. Who decided, when and why is kept."""
    from mail_pipelines.campaigns import unknown
    from mail_pipelines.database.engine import reading

    engine = open_engine()
    with reading(engine) as connection:
        scope = unknown.scope_of(connection, campaign=campaign, claim_id=claim, contact_id=contact)
    rows = unknown.decide(engine, scope, unknown.Verdict(as_.value), dt.datetime.now(dt.UTC), who=getpass.getuser(), why=why, confirmed=yes)
    become = "to be sent again" if as_ is As.RESEND else as_.value
    console.print(f"{rows:,} unknown recipients are now {become}", markup=False)
