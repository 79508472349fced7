"""Workers: processes that execute the runs of a queue (docs/production.md)."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from mail_pipelines.commands.context import console, open_engine, settings

app = typer.Typer(no_args_is_help=True, help=__doc__)


@app.callback()
def _group() -> None:
    """Workers: processes that execute the runs of a queue (docs/production.md)."""


@app.command("run")
def run(control: Annotated[bool, typer.Option("--control", help="what the server does beside sending, one run at a time")] = False) -> None:
    """Execute runs until SIGTERM: the centre's, or with MAIL_PIPELINES_SERVER those of that dispatch server."""
    from mail_pipelines import home
    from mail_pipelines.config import ConfigError
    from mail_pipelines.resources import queues

    server = queues.this_server()
    if control and not server:
        raise ConfigError("--control is for a dispatch server: set MAIL_PIPELINES_SERVER to its name")
    slots = settings().server.slots
    names: tuple[str, ...] = (queues.CENTRE,)
    if server is not None:
        names = (queues.control_queue(server),) if control else queues.sending_queues(server)
    # Never `solo`: such a worker hears no termination while it works. The others are of no use here: nothing asks the workers for news of each other.
    options = ["--pool", "prefork", "--without-gossip", "--without-mingle", "--without-heartbeat", "--loglevel", "INFO"]
    arguments = ["-A", "mail_pipelines.worker", "worker", "-Q", ",".join(names), "-n", f"{names[-1]}@%h", "-c", str(1 if control else slots), *options]
    os.execve(sys.executable, [sys.executable, "-m", "celery", *arguments], {**os.environ, **home.environment(settings())})


@app.command("settle")
def settle() -> None:
    """Settle what dead sessions of this dispatch server left, once, and read late outcomes; its mail server's process does so all the time."""
    import datetime as dt

    from mail_pipelines.config import ConfigError
    from mail_pipelines.database.engine import reading
    from mail_pipelines.dispatch import servers
    from mail_pipelines.dispatch.settler import Settler
    from mail_pipelines.resources import queues

    server = queues.this_server()
    if server is None:
        raise ConfigError("MAIL_PIPELINES_SERVER is not set: only a dispatch server can settle, by its own log")
    engine = open_engine()
    with reading(engine) as connection:
        found = servers.find(connection, server)
    Settler(engine, settings(), found).round(dt.datetime.now(dt.UTC))
    console.print(f"what could be settled on {server} is settled")
