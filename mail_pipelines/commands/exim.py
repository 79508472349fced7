"""Exim as a dispatch server."""

from __future__ import annotations

from typing import Annotated

import typer

from mail_pipelines.commands.context import settings

app = typer.Typer(no_args_is_help=True, help=__doc__)


@app.command("run")
def run(
    name: Annotated[str, typer.Argument(help="with commas between them, several that share one Exim, each with settings in servers/NAME.toml")],
    hostname: Annotated[
        str | None, typer.Option(help="name towards destinations, of several servers the first one's; has to match the reverse DNS; else server.hostname")
    ] = None,
    destination: Annotated[
        list[str] | None,
        typer.Option(help="ADDRESS:PORT that gets all mail in place of the recipients' mail exchangers, or DOMAIN=ADDRESS:PORT for one; for tests"),
    ] = None,
) -> None:
    """Run an own Exim as the registered server NAME until stopped. Nothing of the system's mail set-up is used or changed."""
    from mail_pipelines import config
    from mail_pipelines.dispatch.exim import process

    names = config.servers_of_this_host({config.SERVER_VARIABLE: name})
    for_all = [given for given in destination or () if "=" not in given]
    by_domain = [given.split("=", 1) for given in destination or () if "=" in given]
    process.run(
        {key: config.load_for(key) if len(names) > 1 or config.servers_of_this_host() else settings() for key in names},
        hostname=hostname,
        destinations=tuple(map(_address, for_all)),
        routes=tuple((domain, _address(address)) for domain, address in by_domain),
    )


def _address(text: str) -> tuple[str, int]:
    from mail_pipelines.errors import MailPipelinesError

    host, separator, port = text.rpartition(":")
    if not separator or not host or not port.isdigit():
        raise MailPipelinesError(f"--destination is {text!r}; expected ADDRESS:PORT, such as 127.0.0.1:2525")
    return host, int(port)
