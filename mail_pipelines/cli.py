"""`mail-pipelines`: the command line. Modules of `commands` hold the commands; this one only mounts them.

A user's mistake ends with one line on standard error and exit status 1; a traceback means a bug.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import typer
import typer.main

from mail_pipelines.commands import (
    alert,
    bench,
    campaign,
    catcher,
    contact,
    database,
    domain,
    exim,
    fleet,
    hold,
    home,
    inbound,
    metrics,
    migrate,
    plan,
    pool,
    recover,
    reputation,
    segment,
    server,
    server_dns,
    server_verify,
    simulate,
    source,
    unknown,
    why,
    worker,
)
from mail_pipelines.commands.context import errors
from mail_pipelines.errors import MailPipelinesError

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)
app.add_typer(home.app)
app.add_typer(recover.app)
app.add_typer(contact.app, name="contact")
app.command("migrate")(migrate.migrate)
app.add_typer(segment.app, name="segment")
app.add_typer(source.app, name="source")
app.add_typer(campaign.app, name="campaign")
app.add_typer(hold.app, name="hold")
app.command("release")(hold.release)
app.command("why")(why.why)
app.add_typer(unknown.app, name="unknown")
app.add_typer(domain.app, name="domain")
app.add_typer(database.app, name="database")
server.app.command("dns")(server_dns.dns)
server.app.command("verify")(server_verify.verify)
server.app.command("check-egress")(server_verify.check_egress)
server.app.add_typer(fleet.app)
app.add_typer(server.app, name="server")
app.add_typer(pool.app, name="pool")
app.add_typer(alert.app, name="alert")
app.add_typer(plan.app, name="plan")
app.add_typer(reputation.app, name="reputation")
app.command("simulate")(simulate.simulate)
app.add_typer(catcher.app, name="catcher")
app.add_typer(exim.app, name="exim")
app.add_typer(inbound.app, name="inbound")
app.add_typer(worker.app, name="worker")
app.command("metrics")(metrics.metrics)
app.add_typer(bench.app, name="bench")


@functools.cache
def command() -> Callable[..., Any]:
    """All commands with their options as Typer reads them from the functions: made once in a process, also for those that are forked of it."""
    return typer.main.get_command(app)


def main() -> None:
    try:
        command()()
    except MailPipelinesError as error:
        errors.print(f"error: {error}", style="red", markup=False)
        sys.exit(1)


if __name__ == "__main__":
    main()
