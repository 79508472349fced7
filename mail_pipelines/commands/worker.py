"""Workers: processes that execute the runs of a queue (docs/production.md)."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from mail_pipelines.commands.context import console, settings

app = typer.Typer(no_args_is_help=True, help=__doc__)


@app.callback()
def _group() -> None:
    """Workers: processes that execute the runs of a queue (docs/production.md)."""


@app.command("run")
def run(control: Annotated[bool, typer.Option("--control", help="what the server does beside sending, one run at a time")] = False) -> None:
    """Execute runs until SIGTERM: the centre's, or with MAIL_PIPELINES_SERVER those of that dispatch server, or of all that are named there."""
    from mail_pipelines import config, home
    from mail_pipelines.resources import queues

    servers = config.servers_of_this_host()
    if control and not servers:
        raise config.ConfigError("--control is for a dispatch server: set MAIL_PIPELINES_SERVER to its name")
    # At the centre servers are made and external sources are read beside everything else: runs for minutes and more, and plans cannot wait for them.
    centre = settings().server.slots + settings().provisioning.at_once + queues.SOURCES_AT_ONCE
    slots = sum(own.server.slots for own in config.members().values()) or centre
    names: tuple[str, ...] = (queues.CENTRE,)
    if servers:
        names = tuple(map(queues.control_queue, servers)) if control else queues.sending_queues(*servers)
    # What the worker is called: by the broker's rights, after its first server.
    own = names[-max(1, len(servers))]
    # Not by `dagster-celery worker start`: it passes no SIGTERM on, takes four queues at most, and keeps a process of 110 MB that does nothing.
    # Never `solo`: such a worker hears no termination while it works. The others are of no use here: nothing asks the workers for news of each other.
    options = ["--pool", "prefork", "--without-gossip", "--without-mingle", "--without-heartbeat", "--loglevel", "INFO"]
    arguments = ["-A", "mail_pipelines.worker", "worker", "-Q", ",".join(names), "-n", f"{own}@%h", "-c", str(1 if control else slots), *options]
    os.execve(sys.executable, [sys.executable, "-m", "celery", *arguments], {**os.environ, **home.environment(settings())})


@app.command("settle")
def settle() -> None:
    """Settle what dead sessions of this host's dispatch servers left, once, and read late outcomes; their mail server's process does so all the time."""
    import datetime as dt

    from mail_pipelines import config
    from mail_pipelines.database import migrate
    from mail_pipelines.database.engine import open_engine, reading
    from mail_pipelines.dispatch import servers
    from mail_pipelines.dispatch.files import ServerFolders
    from mail_pipelines.dispatch.settler import Settler

    members = config.members()
    if not members:
        raise config.ConfigError("MAIL_PIPELINES_SERVER is not set: only a dispatch server can settle, by its own log")
    for name, own in members.items():
        engine = open_engine(own.database)
        migrate.require_schema(engine)
        with reading(engine) as connection:
            found = servers.find(connection, name)
        if not ServerFolders.of(own.server, name).journal.exists():
            # On a new host this comes before the mail server's first line.
            console.print(f"{name} has no journal yet by which anything could be settled")
            continue
        Settler(engine, own, found).round(dt.datetime.now(dt.UTC))
        console.print(f"what could be settled on {name} is settled")
