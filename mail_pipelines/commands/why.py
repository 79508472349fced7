"""Why somebody did or did not get a mail."""

from __future__ import annotations

import datetime as dt
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from mail_pipelines.commands.context import console, open_engine, settings


def why(
    email: Annotated[str, typer.Argument(metavar="ADDRESS", help="an e-mail address")],
    campaign: Annotated[str | None, typer.Option("--campaign", help="key of a campaign; without it, the newest ones in a line each")] = None,
) -> None:
    """Why an address did or did not get a mail: segment and criterion, freeze, claim, server, every reply, later events."""
    from mail_pipelines.campaigns import why as reasons

    if campaign is None:
        table = Table("campaign", "what became of it")
        for answer in reasons.recent(open_engine(), settings(), email):
            table.add_row(answer.campaign, escape(answer.verdict))
        console.print(table)
        return
    answer = reasons.of_campaign(open_engine(), settings(), email, campaign, dt.datetime.now(dt.UTC))
    console.print(answer.verdict, markup=False)
    for moment in answer.moments:
        console.print(f"{f'{moment.at:%Y-%m-%d %H:%M:%S} UTC' if moment.at else '-':23} {moment.what}", markup=False, soft_wrap=True)
