"""Mail that comes back: bounces, complaints, unsubscribing."""

from __future__ import annotations

import typer

from mail_pipelines.commands.context import console, open_engine, settings

app = typer.Typer(no_args_is_help=True, help=__doc__)


@app.command("run")
def run() -> None:
    """Receive mail for the return-path domains with an own Exim until stopped. Nothing of the system's mail set-up is used or changed."""
    from mail_pipelines.inbound import process

    process.run(settings())


@app.command("read")
def read() -> None:
    """Read what has come back since, as Dagster's job `read_inbound_mail` does by itself; prints how many messages of which kind."""
    import datetime as dt

    from mail_pipelines.inbound import reading

    report = reading.read(open_engine(), settings(), dt.datetime.now(dt.UTC))
    for name, count in sorted(report.numbers().items()):
        console.print(f"{name}: {count:,}")
